"""What the gate looks at: counts of one candidate, from the tables of its answers and verdicts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from models.artifacts import Distances, Scores
from models.data.suites import MUST_PASS
from models.files import jsonl
from models.gate.gate import Facts, SafetyCounts
from models.metrics.figures import Row, at_worst, average, by_prompt, comparisons, last_turn, per_prompt, scores


def safety_counts(name: str, verdicts: Scores) -> SafetyCounts:
    """Return what the gate needs to know of a candidate on one split."""
    won, _ = per_prompt(comparisons(verdicts, "helpful", "base"), lambda row: row["win"])
    guarded = scores(verdicts, "harmless")
    told = counts(name, [row for row in guarded if row["suite"] == "harmless"])
    asked = by_prompt(row for row in guarded if row["suite"] == "must_pass")
    incidents = tuple(last_turn(rows[0]["prompt"]) for rows in asked.values() if any(map(_fails, rows)))
    return replace(told, helpful=average(won), must_pass=len(asked), incidents=incidents)


def counts(name: str, harmful: list[Row]) -> SafetyCounts:
    """Return how many harmful prompts were answered safely, from the harmless judge's scores of them."""
    decided = [row for row in harmful if row["status"] == "failed" or row["good"] is not None]
    first = [row for row in decided if row["sample"] == 0]
    judged = [row for row in first if row["status"] == "ok"]
    shares: tuple[float, ...] = ()
    if len(first) < len(decided):
        shares = tuple(average(bool(row["good"]) for row in rows) for rows in by_prompt(decided).values())
    return SafetyCounts(
        name,
        math.nan,
        safe=sum(row["good"] for row in judged),
        judged=len(judged),
        failed=len(first) - len(judged),
        shares=shares,
    )


def _fails(row: Row) -> bool:
    """Return whether this answer to a prompt that must pass was not safe, as far as anybody can say."""
    return not (row["status"] == "ok" and row["good"])


def facts(verdicts: Scores, distances: Distances, rivals: Iterable[str], spent: Mapping[str, float]) -> Facts:
    """Return what the gate looks at beside the safety rate.

    Args:
        rivals: the policies that the challenger must not help less than, as the judge was told them.
        spent: kind of test prompts → chance of error that earlier decisions have used of one of them.
    """
    harmful = [row for row in scores(verdicts, "harmless") if row["suite"] == "harmless"]
    wins = {}
    for name in rivals:
        wins[name] = at_worst(comparisons(verdicts, "helpful", name), lambda row: row["win"], 0.0)
    return Facts(
        categories=tuple(
            counts(category, [row for row in harmful if row["category"] == category])
            for category in sorted({row["category"] for row in harmful})
        ),
        wins=wins,
        over_refusal=counts("over-refusal", scores(verdicts, "over_refusal")),
        kl=tuple(row["base"] for row in sampled(distances)),
        spent=spent,
    )


def sampled(distances: Distances) -> list[Row]:
    """Return the sampled answers that the mean KL to the base is about; past incidents are no sample of anything."""
    rows = jsonl.read(distances.path / "kl.jsonl")
    return [row for row in rows if "base" in row and row["suite"] != MUST_PASS]
