"""Where a recipe's files are: which keys name a place, where relative paths start, and digests without places."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from models.errors import BadRecipe
from models.files import hub
from models.recipe.record import Setting, SettingTree, Written, record_of, short_json, usable_place

TOWN = "town"
"""The embedded world of the quickstart, in place of a policy or a file of data."""
_REGISTERED = re.compile(r"models:/(?!\.\.?[/@])[^/:@]+(/\d{1,9}|@[\w.-]+)")
SAME = "-"
"""What stands for a local path where only content counts."""


@dataclass(frozen=True)
class Lies:
    """Marks a key whose text is a place: a file, a folder, or a name on a hub."""

    when: Callable[[SettingTree, str], bool] = lambda record, text: True
    """(settings of the record, text) → whether the text is a place; a chat model's name, for instance, is none."""


def _registered(place: str) -> str:
    if place.startswith("models:") and not _REGISTERED.fullmatch(place):
        raise ValueError(
            f"write a registered version as models:/NAME/VERSION or models:/NAME@ALIAS, got {short_json(place)}"
        )
    return place


Place = Annotated[Written, Lies()]
"""A file, a folder, a hub id, `models:/NAME@ALIAS` or `town`."""
PolicyPlace = Annotated[Place, AfterValidator(_registered)]
"""Where a policy is: a folder, a GGUF file, a repository of the hub, or a registered version."""


def placed(
    kind: type[BaseModel],
    tree: Setting,
    change: Callable[[str, str], str],
    keep: Collection[str] = (),
    prefix: str = "",
) -> Setting:
    """Return the tree of a record, valid or not, with every place in it changed.

    Args:
        change: (key, place) → what stands there instead.
        keep: keys that stay as they are, with all that is below them, as `steps.0.data`.
    """
    if not isinstance(tree, dict):  # not valid; the record will say so
        return tree
    new = dict(tree)
    for name, field in kind.model_fields.items():
        key = field.alias or name
        path, value = f"{prefix}{key}", tree.get(key)
        if key in tree and path not in keep:
            if isinstance(value, list):
                new[key] = [_item(field, tree, item, change, keep, f"{path}.{i}") for i, item in enumerate(value)]
            else:
                new[key] = _item(field, tree, value, change, keep, path)
    return new


def _item(
    field: FieldInfo,
    record: SettingTree,
    item: Setting,
    change: Callable[[str, str], str],
    keep: Collection[str],
    path: str,
) -> Setting:
    """Return the value of a field, or one item of its list, with every place in it changed; `path` is its key."""
    if inner := record_of(field):
        return placed(inner, item, change, keep, f"{path}.")
    mark = next((m for m in field.metadata if isinstance(m, Lies)), None)
    return change(path, item) if mark and isinstance(item, str) and mark.when(record, item) else item


def seen_from(kind: type[BaseModel], tree: Setting, folder: Path, keep: Collection[str]) -> Setting:
    """Return a recipe's tree with its relative paths as seen from the recipe's folder; hub ids stay.

    Args:
        keep: keys whose paths were typed in a shell, and so start from its folder.

    Raises:
        BadRecipe: a text looks like a hub id seen from the recipe's folder, but is a path where the command started.
    """

    def change(key: str, place: str) -> str:
        try:
            usable_place(place)
        except ValueError:  # the record will say so
            return place
        if not is_local(place, folder):
            if is_local(place):
                raise BadRecipe(
                    f"{key} {place!r}: {folder} holds no {place.partition('/')[0]}/, and paths in a recipe are "
                    "relative to the recipe's folder; write the path from there, or a whole one"
                )
            return place
        return str(folder / Path(place).expanduser())

    return placed(kind, tree, change, keep)


def by_content(record: BaseModel) -> Setting:
    """Return a record's tree without local paths: digests name content, and a moved folder stays the same run."""
    tree = record.model_dump(mode="json", by_alias=True)
    return placed(type(record), tree, lambda _, place: SAME if is_local(place) else place)


def is_local(place: str, folder: Path = Path()) -> bool:
    """Return whether this names a file or folder; the other names are empty, the town, a registered version, a hub id.

    `owner/name` can be both: it is a path if `folder` holds `owner/`.
    """
    return not (place in ("", TOWN) or place.startswith("models:/") or hub.is_name(place, folder))
