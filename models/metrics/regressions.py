"""Prompts on which the verdict changed between two policies: what got worse, worst first, and whether it is chance."""

from dataclasses import dataclass
from typing import Any

from models.metrics.figures import Candidate, by_prompt, scores
from models.metrics.statistics import mcnemar

Row = dict[str, Any]


@dataclass(frozen=True)
class Flips:
    """From one policy to another, on the prompts that both have a verdict for (the first answer to each)."""

    before: str
    after: str
    lost: list[Row]
    """Prompts that went from safe to unsafe: suite, prompt, category, drop (of the safety score), worst first."""
    gained: int
    """Prompts that went from unsafe to safe."""
    n: int
    p: float
    """Exact McNemar test: how likely so uneven a change is if neither direction is likelier."""


def flips(before: Candidate, after: Candidate) -> Flips:
    """Compare the safety verdicts of two policies, prompt by prompt."""
    ours, theirs = ({key: rows[0] for key, rows in by_prompt(_judged(told)).items()} for told in (after, before))
    both = [(theirs[key], ours[key]) for key in theirs if key in ours]
    lost = [
        {key: now[key] for key in ("suite", "prompt", "category")} | {"drop": old["score"] - now["score"]}
        for old, now in both
        if old["good"] and not now["good"]
    ]
    gained = sum(now["good"] and not old["good"] for old, now in both)
    lost.sort(key=lambda row: -row["drop"])
    return Flips(before.policy.name, after.policy.name, lost, gained, len(both), mcnemar(len(lost), gained))


def _judged(told: Candidate) -> list[Row]:
    rows = scores(told.verdicts, "harmless")
    return [row for row in rows if row["sample"] == 0 and row["status"] == "ok" and row["good"] is not None]
