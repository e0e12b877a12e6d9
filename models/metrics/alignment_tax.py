"""The alignment tax: what policies could do on tasks before they were aligned, and what they can do after."""

import math
from typing import Any

from models.artifacts import Benchmarks
from models.files import jsonl
from models.metrics.figures import Candidate
from models.metrics.statistics import Estimate

Tree = dict[str, Any]
SAME = "Before and after are measured on the same items: a difference is mostly surer than the two errors alone say."
ARROWS = {"high": " ↑", "low": " ↓", "": ""}


def figures(measured: Benchmarks | None) -> dict[str, Estimate]:
    """Return `task/NAME/METRIC` → the figure; nothing for a policy that was not measured."""
    if measured is None:
        return {}
    method = f"lm-evaluation-harness {measured.harness}, normal"
    found = {}
    for row in jsonl.read(measured.path / "tasks.jsonl"):
        value = math.nan if row["value"] is None else row["value"]
        reach = math.nan if row["stderr"] is None else 1.96 * row["stderr"]
        estimate = Estimate(value, value - reach, value + reach, row["n"], 0, method)
        found[f"task/{row['task']}/{row['metric']}"] = estimate
    return found


def compared(candidates: list[Candidate], measured: dict[str, Benchmarks]) -> list[Tree]:
    """Return one row per measured candidate, task and metric: the base's figure, the candidate's, their difference.

    Args:
        candidates: the base first.
        measured: digest of a policy → its figures.
    """
    known = {digest: list(jsonl.read(told.path / "tasks.jsonl")) for digest, told in measured.items()}
    before = {(row["task"], row["metric"]): row for row in known.get(candidates[0].policy.digest, [])}
    return [
        {
            "candidate": told.policy.name,
            **{key: row[key] for key in ("task", "version", "metric", "better", "n")},
            "before": _figure(before[row["task"], row["metric"]]),
            "after": _figure(row),
            "difference": _less(row["value"], before[row["task"], row["metric"]]["value"]),
        }
        for told in candidates[1:]
        for row in known.get(told.policy.digest, [])
    ]


def table(rows: list[Tree]) -> list[list[str]]:
    """Return the rows of `compared` as text, header first."""
    header = ["candidate", "task", "metric", "n", "before", "after", "difference"]
    return [header, *(_cells(row) for row in rows)]


def _cells(row: Tree) -> list[str]:
    difference = "–" if row["difference"] is None else f"{row['difference']:+.3f}"
    metric = row["metric"] + ARROWS[row["better"]]
    return [
        row["candidate"],
        row["task"],
        metric,
        str(row["n"]),
        *(_said(row[k]) for k in ("before", "after")),
        difference,
    ]


def _said(figure: Tree) -> str:
    if figure["value"] is None:
        return "–"
    return f"{figure['value']:.3f}" + (f" ± {figure['stderr']:.3f}" if figure["stderr"] is not None else "")


def _figure(row: Tree) -> Tree:
    return {"value": row["value"], "stderr": row["stderr"]}


def _less(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before
