"""What pydantic finds wrong with a setting, said as `key: what is wrong; remedy`."""

import difflib
from typing import TYPE_CHECKING

from pydantic import BaseModel

from models.recipe.record import record_of, short_json

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

PATTERNS = {
    r"^[a-z0-9][a-z0-9.-]*$": "use small letters, digits, dots, dashes; start with a letter or digit",
    "^[a-z][a-z0-9_]*$": "use small letters, digits, _; start with a letter",
    r"""^[^/:@'"`\\\x00-\x1f]*$""": "a model's name has no / : @, quotes, backslashes and line breaks",
    "^safety_rate$": "must be 'safety_rate'",
}
"""Pattern of a field → what is wrong with a text that does not match it."""
SENTENCES = {
    "missing": "must be given",
    "int_type": "must be a whole number, not {got}",
    "int_parsing": "must be a whole number, not {got}",
    "int_from_float": "must be a whole number, not {got}",
    "int_parsing_size": "is too large a number",
    "float_type": "must be a number, not {got}",
    "float_parsing": "must be a number, not {got}",
    "finite_number": "must be a finite number, not {got}",
    "bool_type": "must be true or false, not {got}",
    "bool_parsing": "must be true or false, not {got}",
    "string_type": "must be text in quotes, not {got}",
    "enum": "must be {expected}, not {got}",
    "greater_than": "must be above {gt}, got {got}",
    "greater_than_equal": "must be at least {ge}, got {got}",
    "less_than": "must be below {lt}, got {got}",
    "less_than_equal": "must be at most {le}, got {got}",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters, got {got}",
    "too_short": "must not be empty",
    "too_long": "must hold at most {max_length} items, got {actual_length}",
    "list_type": "must be a list, written as [1, 2], got {got}",
    "model_type": "is a table of its own; set a key in it, as in {key}.KEY = …, got {got}",
    "model_attributes_type": "is a table of its own; set a key in it, as in {key}.KEY = …, got {got}",
}
"""Kind of pydantic's error → our sentence."""


def sentence(record: type[BaseModel], error: "ErrorDetails") -> str:
    """Return one of pydantic's errors in one line; `record` is the class that the settings were to become."""
    location = [str(part) for part in error["loc"]]
    key, kind, got = ".".join(location) or "recipe", error["type"], short_json(error["input"])
    context = error.get("ctx", {})
    if kind == "value_error":  # raised by our own validators, whose messages name the value
        return f"{key}: {context['error']}"
    if kind == "extra_forbidden":
        return f"{_short(key)}: unknown key; {_suggestion(record, location)}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {PATTERNS[context['pattern']]}; got {got}"
    if kind in SENTENCES:
        return f"{key}: {SENTENCES[kind].format(key=key, got=got, **context)}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {got}"


def _suggestion(record: type[BaseModel], location: list[str]) -> str:
    names = _keys_beside(record, location)
    # difflib's time grows with the square of the length, and a key may have thousands of characters.
    similar = difflib.get_close_matches(location[-1][:100], names, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(names)}"


def _short(key: str) -> str:
    """Return a key as `short_json` writes it, without the quotes: any text can be a key."""
    return short_json(key)[1:-1]


def _keys_beside(record: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys that the record at this location has."""
    for part in location[:-1]:
        if not part.isdigit():  # a place in a list
            record = record_of(record.model_fields[part]) or record
    return [field.alias or name for name, field in record.model_fields.items()]
