"""A TOML file and the changes of a command line become a recipe, or one sentence per mistake."""

import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar, get_origin

from pydantic import BaseModel, ValidationError

from models.errors import BadRecipe
from models.recipe.assessment import Assessment
from models.recipe.places import TOWN, seen_from
from models.recipe.recipe import Recipe
from models.recipe.record import Setting, SettingTree, record_of, short_json
from models.recipe.sentences import sentence

R = TypeVar("R", bound=BaseModel)
RECIPES = Path(__file__).parents[2] / "flows" / "recipes"
LARGEST = 2**20
"""Bytes of a recipe that are read; the largest shipped recipe has some 4,000."""


def shipped() -> dict[str, Path]:
    """Return the recipes that come with sacpo, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def read(recipe: str, changes: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path, and apply `key=value` changes.

    A relative path in the file starts from the file's folder, a path in a change from where the command was started.

    Raises:
        BadRecipe: no such recipe, broken TOML, unknown key, value out of range; names file, key and remedy.
    """
    path = shipped().get(recipe, Path(recipe))
    tree = _tree(path, recipe)
    for change in changes or []:
        _change(tree, change)
    changed_keys = {change.partition("=")[0].strip() for change in changes or []}
    return _valid(Recipe, seen_from(Recipe, tree, path.absolute().parent, changed_keys), str(path))


def _tree(path: Path, recipe: str) -> SettingTree:
    """Return what a recipe's file says; `recipe` is how the user named it.

    Raises:
        BadRecipe: there is no such file, or it is no TOML.
    """
    try:
        exists = path.is_file()
    except (OSError, ValueError):  # the name is too long, or holds NUL
        exists = False
    if not exists or path.suffix != ".toml":
        raise BadRecipe(f"no recipe {short_json(recipe)}: give a TOML file (.toml), or one of {', '.join(shipped())}")
    try:
        with path.open("rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise BadRecipe(f"{path}: is larger than {LARGEST:,} bytes; a recipe is a short text")
        return _parsed(text.decode("utf-8"))
    except OSError as error:
        raise BadRecipe(f"{path}: cannot be read ({error.strerror}); give a TOML file") from error
    except ValueError as error:
        raise BadRecipe(f"{path}: not valid TOML: {error}") from error


def _parsed(text: str) -> SettingTree:
    """Return what a TOML text says.

    Raises:
        ValueError: it is no TOML, or holds a number of thousands of digits, or lists in lists in lists.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("its lists or tables are nested too deeply") from None
    except tomllib.TOMLDecodeError:  # is a ValueError too
        raise
    except ValueError as error:  # Python refuses longer numbers, since the time grows with the square of the length
        raise ValueError("holds a number of more than 4,300 digits") from error


def keys(record: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default as TOML would say it, what it means) for everything that a recipe can say."""
    for name, field in record.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        description = " ".join((field.description or "").split())
        if inner := record_of(field):
            yield key, "", description
            yield from keys(inner, f"{key}.N." if get_origin(field.annotation) is list else f"{key}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield key, "" if field.is_required() else json.dumps(default, ensure_ascii=False), description


def assessment(
    policies: list[str], like: str, changes: list[str], suites: Sequence[str] = (), judges: Sequence[str] = ()
) -> Assessment:
    """Return the assessment that the options of `sacpo evaluate` describe.

    Args:
        policies: their places.
        like: a recipe whose judges, suites and bound are taken.
        changes: `key=value` of --set.
        suites: `role=file` of --suite.
        judges: `role=kind` of --judge.

    Raises:
        BadRecipe: no such recipe, unknown key, value out of range.
    """
    tree: SettingTree = {"policies": [*policies]}
    if like:
        settings = read(like).model_dump(mode="json", by_alias=True)
        suite_of = settings["evaluation"]["suites"]
        # In a recipe the town's suites come with its data, which an assessment has not.
        if any(judge["kind"] == "oracle" for judge in settings["evaluation"]["judges"].values()):
            suite_of |= {role: suite_of[role] or TOWN for role in ("helpful", "harmless", "over_refusal")}
        tree |= {key: settings[key] for key in ("evaluation", "constraint", "template", "seed", "compute")}
    for option, values, key in (("suite", suites, "suites.{}"), ("judge", judges, "judges.{}.kind")):
        for text in values:
            role, equals, value = text.partition("=")
            if not equals:
                example = {"suite": "harmless=red-team.jsonl", "judge": "harmless=oracle"}[option]
                raise BadRecipe(f"--{option} {text}: say for which role, for instance --{option} {example}")
            _change(tree, f"evaluation.{key.format(role)}={json.dumps(value, ensure_ascii=False)}")
    for change in changes:
        _change(tree, change)
    return _valid(Assessment, tree, "evaluate")


def _valid(record: type[R], tree: Setting, where: str) -> R:
    """Return the record that a tree of settings describes; `where` begins the sentences about what is wrong."""
    try:
        return record.model_validate(tree)
    except ValidationError as error:
        raise BadRecipe("\n".join(f"{where}: {sentence(record, e)}" for e in error.errors())) from error


def _change(tree: SettingTree, change: str) -> None:
    """Apply one `steps.1.lambda=[1,2]` to the tree, in place; a value that is not TOML is taken as text."""
    key, equals, text = change.partition("=")
    if not equals:
        raise BadRecipe(f"--set {short_json(change)}: write it as key=value, for instance steps.1.lambda=[1,2]")
    value = _value(key, text)
    *path, last = key.strip().split(".")
    node: Setting = tree
    try:
        for part in path:
            node = _child(node, part)
        if isinstance(node, list):
            node[_index(last)] = value
        elif isinstance(node, dict):
            node[last] = value
        else:
            raise ValueError("a plain value has no keys")
    except (ValueError, IndexError) as error:
        count = f" (there are {len(node)}, counted from 0)" if isinstance(node, list) else ""
        raise BadRecipe(f"--set {short_json(change)}: {short_json(key)} leads nowhere in this recipe{count}") from error


def _child(node: Setting, part: str) -> Setting:
    """Return what stands under a key, which is made if it is not there, or at a place in a list.

    Raises:
        ValueError, IndexError: there is no such place.
    """
    if isinstance(node, list):
        return node[_index(part)]
    if isinstance(node, dict):
        return node.setdefault(part, {})
    raise ValueError("a plain value has no keys")


def _value(key: str, text: str) -> Setting:
    """Return the value of a change as TOML reads it, or the text itself if it is no TOML."""
    try:
        table = _parsed(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except ValueError as error:
        raise BadRecipe(f"--set {short_json(key)}: {error}") from error
    # A line break in the text lets it set more keys than `value`, which would be lost.
    others = ", ".join(short_json(name) for name in table if name != "value")
    if others:
        raise BadRecipe(f"--set {short_json(key)}: the value sets {others} too; give each a --set of its own")
    return table["value"]


def _index(part: str) -> int:
    """Return a place in a list, counted from 0 and from the front only.

    Raises:
        ValueError: it is none.
    """
    if not (part.isascii() and part.isdecimal() and len(part) < 10):
        raise ValueError(part)
    return int(part)
