"""The columns of a row: by our names, whatever the file calls them, and as what they should be."""

import math
from typing import Any

from models.data.dialogue import Message
from models.data.messages import ONE_IN_A_CELL, text, turns
from models.data.readers import Row, Unusable

TRUTHS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}


class Fields:
    """A row by the names that formats use; it remembers what was read of it."""

    def __init__(self, row: Row, columns: dict[str, str], metric: str, label: str) -> None:
        """Take a row; `columns` maps our names to the file's, where they differ."""
        self.row, self.columns, self.metric, self.label = row, columns, metric, label
        self.used: set[str] = set()

    def called(self, name: str) -> str:
        """Return the file's name of a column."""
        return self.columns.get(name, name)

    def get(self, name: str) -> Any:
        """Return the value of a column, None if there is none."""
        column = self.called(name)
        self.used.add(column)
        return self.row.get(column)

    @property
    def names(self) -> set[str]:
        """The columns by our names."""
        return set(self.columns) | (self.row.keys() - set(self.columns.values()))

    @property
    def unused(self) -> list[str]:
        """The columns that hold something and were not read."""
        return [name for name, held in self.row.items() if name not in self.used and held not in (None, "", [], {})]

    def turns(self, name: str, role: str, one: bool = True) -> list[Message]:
        """Return a column as messages; plain text is a turn of `role`, but a single message in JSON, with `one`."""
        self._there(name)
        return turns(self.get(name), self.called(name), role, one)

    def holds_a_message(self, name: str) -> bool:
        """Return whether a column is a text that begins as a single message in JSON does."""
        value = self.get(name)
        return isinstance(value, str) and ONE_IN_A_CELL.match(value) is not None

    def text(self, name: str) -> str:
        """Return a column that is text and not empty."""
        self._there(name)
        return text(self.get(name), self.called(name))

    def truth(self, name: str) -> bool:
        """Return a column that is true or false."""
        told = truth(self.get(name))
        if told is None:
            raise Unusable(f"{self.called(name)}: must be true or false")
        return told

    def _there(self, name: str) -> None:
        if self.called(name) not in self.row:
            raise Unusable(f"{self.called(name)}: is missing")


def truth(value: Any) -> bool | None:
    """Return true, false, 1, 0, yes or no, as values or as words, as a bool; None if it is none of them."""
    return TRUTHS.get(str(value).strip().lower())


def number(value: Any) -> float:
    """Return a number, which in a table stands as text; NaN for anything else, which equals and exceeds nothing."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
