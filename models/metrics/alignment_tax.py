"""The alignment tax: what policies could do on tasks before they were aligned, and what they can do after."""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from models.artifacts import Benchmarks
from models.files import jsonl
from models.metrics.benchmarks import TaskRow
from models.metrics.candidate import Candidate
from models.metrics.statistics import Estimate

SAME = "Before and after are measured on the same items: a difference is mostly surer than the two errors alone say."
ARROWS = {"high": " ↑", "low": " ↓", "": ""}
CLOSED = ConfigDict(extra="forbid")


@with_config(CLOSED)
class TaskFigure(TypedDict):
    """What a policy can do on a task, with its standard error; null where the task has none."""

    value: float | None
    stderr: float | None


@with_config(CLOSED)
class TaxRow(TypedDict):
    """What a candidate can do on one task by one metric, beside the base."""

    candidate: str
    task: str
    version: str
    metric: str
    better: Literal["high", "low", ""]
    """Which values are better; empty where the task does not say."""
    n: Annotated[int, Field(ge=0)]
    before: TaskFigure
    after: TaskFigure
    difference: float | None


def figures(measured: Benchmarks | None) -> dict[str, Estimate]:
    """Return `task/NAME/METRIC` → the figure; nothing for a policy that was not measured."""
    if measured is None:
        return {}
    method = f"lm-evaluation-harness {measured.harness}, normal"
    estimates = {}
    for row in _rows(measured):
        value = math.nan if row.value is None else row.value
        # the harness gives a standard error and no interval; ±1.96 of it is the usual one
        reach = math.nan if row.stderr is None else 1.96 * row.stderr
        estimate = Estimate(value, value - reach, value + reach, row.n, 0, method)
        estimates[f"task/{row.task}/{row.metric}"] = estimate
    return estimates


def compared(candidates: list[Candidate], measured: dict[str, Benchmarks]) -> list[TaxRow]:
    """Return one row per measured candidate, task and metric: the base's figure, the candidate's, their difference.

    Args:
        candidates: the base first.
        measured: digest of a policy → its figures.
    """
    rows = {digest: _rows(benchmarks) for digest, benchmarks in measured.items()}
    before = {(row.task, row.metric): row for row in rows.get(candidates[0].policy.digest, [])}
    return [
        {
            "candidate": candidate.policy.name,
            "task": row.task,
            "version": row.version,
            "metric": row.metric,
            "better": row.better,
            "n": row.n,
            "before": _figure(before[row.task, row.metric]),
            "after": _figure(row),
            "difference": _less(row.value, before[row.task, row.metric].value),
        }
        for candidate in candidates[1:]
        for row in rows.get(candidate.policy.digest, [])
    ]


def table(rows: Sequence[TaxRow]) -> list[list[str]]:
    """Return the rows of `compared` as text, header first."""
    header = ["candidate", "task", "metric", "n", "before", "after", "difference"]
    return [header, *(_cells(row) for row in rows)]


def _cells(row: TaxRow) -> list[str]:
    difference = "–" if row["difference"] is None else f"{row['difference']:+.3f}"
    metric = row["metric"] + ARROWS[row["better"]]
    return [
        row["candidate"],
        row["task"],
        metric,
        str(row["n"]),
        *map(_with_error, (row["before"], row["after"])),
        difference,
    ]


def _with_error(figure: TaskFigure) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f}" + (f" ± {figure['stderr']:.3f}" if figure["stderr"] is not None else "")


def _rows(measured: Benchmarks) -> list[TaskRow]:
    return [TaskRow(**row) for row in jsonl.read(measured.path / "tasks.jsonl")]


def _figure(row: TaskRow) -> TaskFigure:
    return {"value": row.value, "stderr": row.stderr}


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
