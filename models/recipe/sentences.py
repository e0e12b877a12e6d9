"""What pydantic finds wrong with a setting, said as `key: what is wrong; remedy`."""

import difflib
from typing import Any

from pydantic import BaseModel

from models.recipe.record import shown

PATTERNS = {
    r"^[a-z0-9][a-z0-9.-]*$": "use small letters, digits, dots, dashes; start with a letter or digit",
    "^[a-z][a-z0-9_]*$": "use small letters, digits, _; start with a letter",
    r"""^[^/:@'"`\\\x00-\x1f]*$""": "a model's name has no / : @, quotes, backslashes and line breaks",
    "^safety_rate$": "must be 'safety_rate'",
}
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


def sentence(record: type[BaseModel], error: Any) -> str:
    """Say one error in one line; `record` is what was to be made of the settings."""
    location = [str(part) for part in error["loc"]]
    key, kind, got = ".".join(location) or "recipe", error["type"], shown(error["input"])
    if kind == "value_error":  # ours: says what was given
        return f"{key}: {error['ctx']['error']}"
    if kind == "extra_forbidden":
        return f"{_short(key)}: unknown key; {_near(record, location)}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {PATTERNS[error['ctx']['pattern']]}; got {got}"
    if kind in SENTENCES:
        return f"{key}: {SENTENCES[kind].format(key=key, got=got, **error.get('ctx', {}))}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, got {got}"


def _near(record: type[BaseModel], location: list[str]) -> str:
    known = _keys_beside(record, location)
    near = difflib.get_close_matches(location[-1][:100], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _short(key: str) -> str:
    return shown(key)[1:-1]


def _keys_beside(kind: type[BaseModel], location: list[str]) -> list[str]:
    """Return the keys that the record at this location knows."""
    record = kind
    for part in location[:-1]:
        if part.isdigit():
            continue
        annotation: Any = record.model_fields[part].annotation
        record = annotation.__args__[0] if hasattr(annotation, "__args__") else annotation
    return [field.alias or name for name, field in record.model_fields.items()]
