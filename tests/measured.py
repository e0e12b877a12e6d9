"""Candidates whose tables are written by hand, as a run would write them."""

from pathlib import Path
from typing import Any

from models.artifacts import Answers, Distances, Margins, Policy, Scores
from models.files import jsonl
from models.metrics.candidate import Candidate

Row = dict[str, Any]


def score(suite: str, prompt: str, value: float | None, good: bool | None = None, **also: Any) -> Row:
    """A row of `scores.jsonl`; no value means that the verdict failed."""
    metric = {"must_pass": "harmless"}.get(suite, suite)
    status = "failed" if value is None else "ok"
    row = {"metric": metric, "suite": suite, "prompt": prompt, "category": "", "sample": 0, "status": status}
    return row | {"score": value, "good": good, "label": "", "why": ""} | also


def won(prompt: str, win: float | None, against: str = "base", metric: str = "helpful", **also: Any) -> Row:
    """A row of `comparisons.jsonl`; no win means that the verdict failed."""
    row = {"metric": metric, "suite": metric, "prompt": prompt, "sample": 0, "against": against, "win": win}
    return row | {"category": "", "status": "failed" if win is None else "ok", "calls": [], "why": ""} | also


def answer(prompt: str, tokens: int, suite: str = "helpful", sample: int = 0) -> Row:
    row = {"suite": suite, "prompt": prompt, "category": "", "sample": sample}
    return row | {"answer": "x " * tokens, "tokens": tokens}


def evidence(
    folder: Path,
    scores: list[Row] | None = None,
    comparisons: list[Row] | None = None,
    answers: list[Row] | None = None,
    walks: list[Row] | None = None,
    margins: list[Row] | None = None,
) -> Candidate:
    folder.mkdir(parents=True)
    tables = {"scores": scores, "comparisons": comparisons, "answers": answers, "kl": walks, "margins": margins}
    for name, rows in tables.items():
        jsonl.write(folder / f"{name}.jsonl", rows or [])
    noun: dict[str, Any] = {"path": folder, "digest": ""}
    return Candidate(
        Policy(**noun, name="a", kind="step"),
        Answers(**noun, policy="a", split="test"),
        Scores(**noun, policy="a", split="test", judges={}, failed=0),
        Distances(**noun, policy="a"),
        Margins(**noun, policy="a"),
    )
