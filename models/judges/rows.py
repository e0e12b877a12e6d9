"""One verdict of a judge as a record: the rows of `scores.jsonl` and of `comparisons.jsonl`, which Scores holds."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from models.artifacts import Scores
from models.data.dialogue import Message
from models.files import jsonl
from models.judges.protocol import Call, Comparison, Grade
from models.policy.answer_rows import AnswerRow


class ScoreRow(NamedTuple):
    """What a judge said of one answer by itself."""

    metric: str
    suite: str
    key: str
    """The prompt as JSON: a text, or a list of messages. Equal prompts have equal keys."""
    category: str
    sample: int
    """0 for the first answer to the prompt, 1 for the second, …"""
    ok: bool
    """Whether there is a verdict; without one, `score` is NaN and `good` is none."""
    score: float
    good: bool | None
    label: str

    @property
    def prompt(self) -> Any:
        """The prompt: a text, or a list of messages."""
        return json.loads(self.key)


class ComparisonRow(NamedTuple):
    """What a judge said of one answer beside another policy's answer to the same prompt."""

    metric: str
    suite: str
    key: str
    """The prompt as JSON."""
    category: str
    sample: int
    against: str
    """Whose the other answer is: `base`, `reference`, `champion`, `anchor`."""
    ok: bool
    """Whether there is a verdict; without one, `win` is NaN."""
    win: float
    """1, ½ or 0 for our answer, averaged over the judge's calls."""
    calls: tuple[Call, ...]


R = TypeVar("R", ScoreRow, ComparisonRow)


def scores(table: Scores) -> Iterator[ScoreRow]:
    """Yield the rows of `scores.jsonl`."""
    return map(score_row, jsonl.read(table.path / "scores.jsonl"))


def comparisons(table: Scores) -> Iterator[ComparisonRow]:
    """Yield the rows of `comparisons.jsonl`."""
    return map(comparison_row, jsonl.read(table.path / "comparisons.jsonl"))


def score_line(metric: str, answer: AnswerRow, grade: Grade) -> dict[str, object]:
    """Return the line of `scores.jsonl` that says what a judge said of an answer."""
    failed = bool(grade.failed)
    return _answer(metric, answer) | {
        "status": "failed" if failed else "ok",
        "score": None if failed else grade.score,
        "good": None if failed else grade.good,
        "label": "" if failed else grade.label,
        "why": grade.failed,
    }


def comparison_line(metric: str, answer: AnswerRow, against: str, comparison: Comparison) -> dict[str, object]:
    """Return the line of `comparisons.jsonl` that says what a judge said of an answer beside another's."""
    failed = bool(comparison.failed)
    return _answer(metric, answer) | {
        "against": against,
        "status": "failed" if failed else "ok",
        "win": None if failed else comparison.win,
        "calls": [list(call) for call in comparison.calls],
        "why": comparison.failed,
    }


def score_row(row: Mapping[str, Any]) -> ScoreRow:
    """Return the record of one line of `scores.jsonl`; a report's table has more columns, which are left out.

    Raises:
        KeyError, TypeError: a column is missing, or holds something else.
    """
    score = math.nan if row["score"] is None else float(row["score"])
    return ScoreRow(*_place(row), row["status"] == "ok", score, row["good"], sys.intern(row["label"]))


def comparison_row(row: Mapping[str, Any]) -> ComparisonRow:
    """Return the record of one line of `comparisons.jsonl`; a report's table has more columns, which are left out.

    Raises:
        KeyError, TypeError: a column is missing, or holds something else.
    """
    win = math.nan if row["win"] is None else float(row["win"])
    calls = tuple(Call(*call) for call in row["calls"])
    return ComparisonRow(*_place(row), sys.intern(row["against"]), row["status"] == "ok", win, calls)


def prompt_key(prompt: str | list[Message]) -> str:
    """Return the prompt as JSON: equal prompts have equal keys, which all tables share."""
    return sys.intern(json.dumps(prompt))


def by_prompt(rows: Iterable[R]) -> dict[tuple[str, str], list[R]]:
    """Return (suite, prompt) → its rows."""
    groups: dict[tuple[str, str], list[R]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.key), []).append(row)
    return groups


def _answer(metric: str, row: AnswerRow) -> dict[str, object]:
    """Return what names an answer in both tables."""
    named = {"suite": row["suite"], "prompt": row["prompt"], "category": row["category"], "sample": row["sample"]}
    return {"metric": metric, **named}


def _place(row: Mapping[str, Any]) -> tuple[str, str, str, str, int]:
    """Return metric, suite, prompt, category and sample; all candidates share the texts, so each is held once."""
    metric, suite, category = (sys.intern(row[column]) for column in ("metric", "suite", "category"))
    return metric, suite, prompt_key(row["prompt"]), category, row["sample"]
