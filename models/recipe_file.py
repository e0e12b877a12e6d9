"""A TOML file and the changes of a command line become a recipe, or one sentence per mistake."""

import difflib
import json
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from models.assessment import Assessment
from models.errors import BadRecipe
from models.places import TOWN, seen_from
from models.recipe import Recipe

REMEDIES = {
    "model_type": "is a table of its own; set a key in it, as in {key}.KEY = …",
    "model_attributes_type": "is a table of its own; set a key in it, as in {key}.KEY = …",
    "list_type": "must be a list, written as [1, 2]",
    "too_short": "must not be empty",
}
R = TypeVar("R", bound=BaseModel)
RECIPES = Path(__file__).parent.parent / "flows" / "recipes"


def shipped() -> dict[str, Path]:
    """Return the recipes that come with sacpo, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.toml"))}


def read(recipe: str, changes: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a TOML file by path, and apply `key=value` changes.

    A relative path in the file is seen from the file's folder, one in a change from where the command was started.

    Raises:
        BadRecipe: no such recipe, broken TOML, unknown key, value out of range; names file, key and remedy.
    """
    path = shipped().get(recipe, Path(recipe))
    if not path.is_file():
        raise BadRecipe(f"no recipe {recipe!r}: give a TOML file or one of {', '.join(shipped())}")
    try:
        tree = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadRecipe(f"{path}: not valid TOML: {error}") from error
    for change in changes or []:
        _change(tree, change)
    typed = {change.partition("=")[0].strip() for change in changes or []}
    return _valid(Recipe, seen_from(Recipe, tree, path.absolute().parent, typed), str(path))


def keys(record: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default as TOML would say it, what it means) for everything that a recipe can say."""
    for name, field in record.model_fields.items():
        key, annotation = f"{prefix}{field.alias or name}", cast(Any, field.annotation)
        inner = annotation.__args__[0] if hasattr(annotation, "__args__") else annotation
        said = " ".join((field.description or "").split())
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield key, "", said
            yield from keys(inner, f"{key}.N." if inner is not annotation else f"{key}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield key, "" if field.is_required() else json.dumps(default, ensure_ascii=False), said


def assessment(
    policies: list[str], like: str, changes: list[str], suites: Sequence[str] = (), judges: Sequence[str] = ()
) -> Assessment:
    """Return what `sacpo evaluate` is asked for.

    Args:
        policies: their places.
        like: a recipe whose judges, suites and bound are taken.
        changes: `key=value` of --set.
        suites: `role=file` of --suite.
        judges: `role=kind` of --judge.

    Raises:
        BadRecipe: no such recipe, unknown key, value out of range.
    """
    tree: dict[str, Any] = {"policies": policies}
    if like:
        told = read(like).model_dump(mode="json", by_alias=True)
        tree |= {key: told[key] for key in ("evaluation", "constraint", "template", "seed", "compute")}
        towns = {role: TOWN for role in ("helpful", "harmless", "over_refusal")}
        if any(judge["kind"] == "oracle" for judge in told["evaluation"]["judges"].values()):
            tree["evaluation"]["suites"] |= towns
    for option, given, key in (("suite", suites, "suites.{}"), ("judge", judges, "judges.{}.kind")):
        for one in given:
            role, equals, value = one.partition("=")
            if not equals:
                example = {"suite": "harmless=red-team.jsonl", "judge": "harmless=oracle"}[option]
                raise BadRecipe(f"--{option} {one}: say for which role, for instance --{option} {example}")
            _change(tree, f"evaluation.{key.format(role)}={json.dumps(value, ensure_ascii=False)}")
    for change in changes:
        _change(tree, change)
    return _valid(Assessment, tree, "evaluate")


def _valid(record: type[R], tree: dict[str, Any], where: str) -> R:
    try:
        return record.model_validate(tree)
    except ValidationError as error:
        raise BadRecipe("\n".join(f"{where}: {_sentence(record, e)}" for e in error.errors())) from error


def _change(tree: dict[str, Any], change: str) -> None:
    """Apply one `steps.1.lambda=[1,2]` to the tree, in place; a value that is not TOML is taken as text."""
    key, equals, text = change.partition("=")
    if not equals:
        raise BadRecipe(f"--set {change}: write it as key=value, for instance steps.1.lambda=[1,2]")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *path, last = key.strip().split(".")
    node: Any = tree
    try:
        for part in path:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        count = f" (there are {len(node)}, counted from 0)" if isinstance(node, list) else ""
        raise BadRecipe(f"--set {change}: {key!r} leads nowhere in this recipe{count}") from error


def _sentence(kind: type[BaseModel], error: Any) -> str:
    """Say one pydantic error as `key: what is wrong; remedy`."""
    location = [str(part) for part in error["loc"]]
    key, said = ".".join(location) or "recipe", error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _keys_beside(kind, location), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(_keys_beside(kind, location))}"
        return f"{key}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{key}: must be given"
    if error["type"] == "value_error":  # ours: says what was given
        return f"{key}: {said}"
    if error["type"] in REMEDIES:
        return f"{key}: {REMEDIES[error['type']].format(key=key)}, got {json.dumps(error['input'], default=str)[:80]}"
    return f"{key}: {said[0].lower()}{said[1:]}, got {json.dumps(error['input'], default=str)[:80]}"


def _keys_beside(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys that the record at this location knows."""
    record = kind
    for part in location[:-1]:
        if part.isdigit():
            continue
        annotation: Any = record.model_fields[part].annotation
        record = annotation.__args__[0] if hasattr(annotation, "__args__") else annotation
    return [field.alias or name for name, field in record.model_fields.items()]
