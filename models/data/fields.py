"""The columns of a row: by our names, whatever the file calls them, as what they should be, and what they may mean."""

import math
import re
from collections.abc import Collection, KeysView
from typing import Any

from models.data.dialogue import Message
from models.data.messages import ONE_IN_A_CELL, text, turns
from models.files.raw_rows import Row, Unusable

TRUTHS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
NEUTRAL = (
    ("answer_a", "response_a", "answer_1", "response_1"),
    ("answer_b", "response_b", "answer_2", "response_2"),
)
"""What two answers are often called where another column says which one is better."""
LIKELY = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "context", "messages"),
    "chosen": ("chosen", "preferred", "better", "best", "winning", "good", *NEUTRAL[0]),
    "rejected": ("reject", "worse", "worst", "losing", "bad", *NEUTRAL[1]),
    "completion": ("completion", "response", "answer", "output"),
    "label": ("label", "desirable", "good", "safe", "thumb", "rating"),
}
"""What a column is often called, in part, for a first guess at a mapping."""
OTHERWISE = re.compile(r"(^|_)(id|model|rating|score|dis\w+|not|down|harm\w*)$|^un|_un|toxic")
"""What is called so is no text of a comparison, or says the contrary of what a label should say."""
DECIDES = ("prefer", "win", "label", "score", "rating", "better", "best", "choice")
"""Where a column is called so, in part, the names of two answers (`answer_a`) do not tell which one is better."""


class Fields:
    """A row of a user's file by the names that formats use; it remembers which columns were read.

    An accessor returns a typed value, or raises `Unusable` with a sentence that begins with the file's name of the
    column. File and row number stand around it: in `quarantine.jsonl`, or in the error (`raw_rows.bad_row`).
    """

    def __init__(self, row: Row, columns: dict[str, str] | None = None, metric: str = "", label: str = "") -> None:
        """Take a row.

        Args:
            columns: our names → the file's, where they differ.
            metric: what the preferences are about; some formats have a label per metric.
            label: the column with the index of the preferred answer; empty for the one that the metric names.
        """
        self.row, self.columns, self.metric, self.label = row, columns or {}, metric, label
        self.used: set[str] = set()

    def called(self, name: str) -> str:
        """Return the file's name of a column."""
        return self.columns.get(name, name)

    def get(self, name: str) -> object:
        """Return the value of a column, None if there is none."""
        column = self.called(name)
        self.used.add(column)
        return self.row.get(column)

    def cell(self, column: str) -> object:
        """Return the value under the file's own name of a column, None if there is none; it does not count as read."""
        return self.row.get(column)

    @property
    def file_columns(self) -> KeysView[str]:
        """The columns by the file's names."""
        return self.row.keys()

    @property
    def names(self) -> set[str]:
        """The columns by our names."""
        return set(self.columns) | (self.row.keys() - set(self.columns.values()))

    @property
    def unused(self) -> list[str]:
        """The columns that hold something and were not read."""
        return [name for name, value in self.row.items() if name not in self.used and value not in (None, "", [], {})]

    def turns(self, name: str, role: str, single_in_json: bool = True) -> list[Message]:
        """Return a column as messages; plain text is a turn of `role`, but a text in JSON may be a message."""
        self._refuse_missing(name)
        return turns(self.get(name), self.called(name), role, single_in_json)

    def holds_a_message(self, name: str) -> bool:
        """Return whether a column is a text that begins as a single message in JSON does."""
        value = self.get(name)
        return isinstance(value, str) and ONE_IN_A_CELL.match(value) is not None

    def text(self, name: str) -> str:
        """Return a column that is text and not empty."""
        self._refuse_missing(name)
        return text(self.get(name), self.called(name))

    def truth(self, name: str) -> bool:
        """Return a column that is true or false."""
        value = truth(self.get(name))
        if value is None:
            raise Unusable(f"{self.called(name)}: must be true or false")
        return value

    def _refuse_missing(self, name: str) -> None:
        # a column that is missing and one that is null get sentences of their own
        if self.called(name) not in self.row:
            raise Unusable(f"{self.called(name)}: is missing")


def truth(value: object) -> bool | None:
    """Return true, false, 1, 0, yes or no, as values or as words, as a bool; None if it is none of them."""
    return TRUTHS.get(str(value).strip().lower())


def number(value: Any) -> float:
    """Return a number, which in a table stands as text; NaN for anything else, which equals and exceeds nothing."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def guessed_columns(columns: Collection[str], names: tuple[str, ...]) -> dict[str, str]:
    """Return our name → the column that is most likely meant, `…` for none; each column once.

    A wrong guess could turn labels round, and people copy what an error suggests: where in doubt, it is `…`.
    """
    candidates = [column for column in sorted(columns) if not OTHERWISE.search(column.lower())]
    decided = any(word in column.lower() for column in columns for word in DECIDES)
    neutral = {*NEUTRAL[0], *NEUTRAL[1]} if decided else set()
    guesses: dict[str, str] = {}
    for name in names:
        words = [word for word in LIKELY[name] if word not in neutral]
        # words in the outer loop: they stand in the order of how sure they are, columns in that of the alphabet
        guesses[name] = next((column for word in words for column in candidates if word in column.lower()), "…")
        candidates = [column for column in candidates if column != guesses[name]]
    return guesses


def listed(names: Collection[str]) -> str:
    """Return up to twenty names for an error, in the order of the alphabet."""
    ordered = sorted(names)
    return (", ".join(ordered[:20]) + (", …" if len(ordered) > 20 else "")) or "(none)"
