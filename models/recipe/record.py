"""The base of all records that a recipe is made of, and their settings as a flat list."""

import json
import re
from datetime import date, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

if TYPE_CHECKING:
    from pydantic.config import JsonDict

Setting: TypeAlias = "dict[str, Setting] | list[Setting] | str | int | float | bool | date | time | None"
"""What a TOML or JSON file can hold; a datetime is a date."""
SettingTree: TypeAlias = dict[str, Setting]
"""Settings before they are a valid recipe: any key may stand there, with any value."""

LONGEST_TEXT = 100_000
"""Characters; the longest chat templates in use have some 20,000."""
LONGEST_NAME = 255
"""Bytes of one part of a path, on all common file systems."""
LONGEST_PLACE = 2000
"""Bytes of a whole path; Linux takes 4,096 with the folder in which the command was given."""


class Record(BaseModel):
    """Base of all records: unknown keys are errors, values never change, and nothing is turned into another type."""

    # The docstring below a field is its description in the schema, in Prefect's form and in `sacpo keys`. A field can
    # be named by its Python name beside its alias, since `lambda` is a reserved word.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_type(cls, value: object, info: ValidationInfo) -> object:
        """Refuse `true` where a number is meant, and text where a number or `true` is; pydantic would convert them."""
        kind = str(cls.model_fields[info.field_name or ""].annotation)  # `list[float]` for a list
        whole, number, flag = (re.search(rf"\b{name}\b", kind) for name in ("int", "float", "bool"))
        # Text in place of a whole list is left to pydantic, which says that the value must be a list.
        wrong = bool if kind.startswith("list[") and not isinstance(value, list) else (bool, str)
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                storable(item)
            if (whole or number) and isinstance(item, wrong):
                raise ValueError(f"must be a {'whole ' if whole else ''}number, not {short_json(item)}")
            if flag and not isinstance(item, bool):
                raise ValueError(f"must be true or false, not {short_json(item)}")
        return value


def storable(text: str) -> str:
    """Return a text that can be stored and shown.

    Raises:
        ValueError: it holds NUL or bytes that are no UTF-8, or is longer than any template.
    """
    # Bytes of a command line that are no UTF-8 reach Python as lone surrogates, which no file and no database takes.
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise ValueError(f"holds a NUL character, or bytes that are no UTF-8: {short_json(text)}; take them out")
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"is {len(text):,} characters long; at most {LONGEST_TEXT:,} are allowed")
    return text


def short_json(value: object) -> str:
    """Return a value of a recipe in one short line, as JSON writes it."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, RecursionError):  # a hexadecimal number of 5,000 digits, or lists nested too deeply
        return "(too large to be shown)"
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return line if len(line) <= 80 else f"{line[:77]}..."


def usable_place(place: str) -> str:
    """Return a text that a path can be made of.

    Raises:
        ValueError: it is too long, holds control characters, or leads out of a repository of the hub.
    """
    storable(place)
    if len(place.encode("utf-8", "replace")) > LONGEST_PLACE or any(
        len(part.encode("utf-8", "replace")) > LONGEST_NAME for part in place.split("/")
    ):
        raise ValueError(f"is too long for a path, {len(place):,} characters; got {short_json(place)}")
    if not place.isprintable():
        raise ValueError(f"holds a line break or another control character; got {short_json(place)}")
    try:
        Path(place).expanduser()
    except RuntimeError as error:  # `~name` raises it, where the machine has no such user
        raise ValueError(f"begins with the home of a user who is not here; got {short_json(place)}") from error
    # A revision names a folder in the hub's cache: with `..` in it, it would name any folder of this disk.
    if re.match(r"[\w-][\w.-]*/[\w.-]+@", place) and ".." in place.partition("@")[2].split("/"):
        raise ValueError(f"leads out of the hub's repository; write owner/name@revision, got {short_json(place)}")
    return place


Written = Annotated[str, AfterValidator(usable_place)]
"""A file, a folder, a repository of the hub, or a registered version: something that a path can be made of."""


def first(*names: str) -> ConfigDict:
    """Return the setting that shows these keys before the inherited ones, wherever a schema is drawn as a form."""

    def reorder(schema: "JsonDict") -> None:
        fields = schema["properties"]
        assert isinstance(fields, dict)
        schema["properties"] = {key: fields[key] for key in (*names, *(key for key in fields if key not in names))}

    return ConfigDict(json_schema_extra=reorder)


def record_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the record that a field holds, alone or in a list; none if it holds plain values."""
    kind = next(iter(get_args(field.annotation)), field.annotation)
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def flat(tree: Setting, prefix: str = "") -> SettingTree:
    """Return a tree of settings as `steps.1.lambda` → value; a list of plain values is one value."""
    if isinstance(tree, list) and any(isinstance(item, (dict, list)) for item in tree):
        tree = {str(i): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for key, item in tree.items() for k, v in flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
