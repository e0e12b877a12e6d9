"""A row as a user's file holds it, and JSON in which what cannot be used is named instead of raised."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from models.errors import BadData

Row = dict[str, Any]
"""Columns and values of one row. The user chose the keys; `models.data.fields.Fields` reads it by ours."""
HALF = re.compile("[\ud800-\udfff]")
"""A lone surrogate: half of a character, which no UTF-8 file can hold."""


class Unusable(Exception):
    """Why a row goes to quarantine."""


class Dropped(Unusable):
    """Why a row is not used that is no sign of a broken file: counted and named, but not as a bad row."""


def bad_row(source: Path, number: int, reason: object) -> BadData:
    """Return the error for a file in which every row must be usable: it names file, row (from 1) and reason."""
    return BadData(f"{source}: row {number}: {reason}")


def parse(text: str) -> tuple[object, bool]:
    """Return a value of JSON, and whether parts of it may be unusable, which `sound` then finds.

    An object with a key twice, or a whole number of thousands of digits, stands in the value as `Unusable`.

    Raises:
        ValueError, RecursionError: not JSON, or nested too deeply.
    """
    flaws: list[Unusable] = []

    def flaw(reason: str) -> Unusable:
        flaws.append(Unusable(reason))
        return flaws[-1]

    def unique_keys(pairs: list[tuple[str, object]]) -> object:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        return flaw(f"the key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} stands twice")

    def whole_number(digits: str) -> object:
        # int() refuses more than 4,300 digits (CVE-2020-10735); its ValueError would read like "not valid JSON"
        return int(digits) if len(digits) <= 4300 else flaw("a number has more than 4,300 digits")

    value = json.loads(text, object_pairs_hook=unique_keys, parse_int=whole_number)
    # UTF-8 holds no surrogates, so half a character can come from an escape only; most rows need no second look
    return value, bool(flaws) or "\\u" in text


def sound(row: object) -> object:
    """Return the row, or why it is unusable: what `parse` found inside, or half a character (a lone surrogate)."""
    # a list instead of recursion: JSON that the parser just accepts may be too deep for a recursive function
    waiting = [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Unusable):
            return value
        if isinstance(value, str) and HALF.search(value):
            return Unusable("a text holds half a character (a lone surrogate)")
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
    return row
