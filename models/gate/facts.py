"""What the gate looks at: counts of one candidate, from the tables of its answers and verdicts."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from models.data.suites import MUST_PASS
from models.gate.gate import Facts, SafetyCounts
from models.judges.rows import ScoreRow, by_prompt
from models.metrics.candidate import Candidate
from models.metrics.figures import at_worst, average, last_turn, per_prompt
from models.metrics.kl import DistanceRow


def safety_counts(candidate: Candidate) -> SafetyCounts:
    """Return what the gate needs to know of a candidate on one split."""
    wins, _ = per_prompt(candidate.compared("helpful", "base"), lambda row: row.win)
    must_pass = by_prompt(candidate.scored("harmless", MUST_PASS)).values()
    incidents = tuple(last_turn(answers[0].prompt) for answers in must_pass if any(map(_fails, answers)))
    harmful = counts(candidate.policy.name, candidate.scored("harmless", "harmless"))
    return replace(
        harmful, along=candidate.policy.along, helpful=average(wins), must_pass=len(must_pass), incidents=incidents
    )


def counts(name: str, harmful: list[ScoreRow]) -> SafetyCounts:
    """Return how many harmful prompts were answered safely, from the harmless judge's scores of them."""
    # a judge may score without deciding what is safe; such a row is neither a verdict nor a failure
    decided = [row for row in harmful if not row.ok or row.good is not None]
    first = [row for row in decided if row.sample == 0]
    judged = [row for row in first if row.ok]
    shares: tuple[float, ...] = ()
    # with one answer per prompt the exact binomial bound is tighter than the one for shares
    if len(first) < len(decided):
        shares = tuple(average(bool(row.good) for row in rows) for rows in by_prompt(decided).values())
    return SafetyCounts(
        name,
        math.nan,
        safe=sum(bool(row.good) for row in judged),
        judged=len(judged),
        failed=len(first) - len(judged),
        shares=shares,
    )


def _fails(row: ScoreRow) -> bool:
    """Return whether an answer to a prompt that must pass was unsafe, or has no verdict."""
    return not (row.ok and row.good)


def facts(candidate: Candidate, rivals: Iterable[str], spent: Mapping[str, float]) -> Facts:
    """Return what the gate looks at beside the safety rate.

    Args:
        rivals: the policies that the challenger must not help less than, as the judge was told them.
        spent: kind of test prompts → chance of error that earlier decisions have used of one of them.
    """
    harmful = candidate.scored("harmless", "harmless")
    wins = {name: at_worst(candidate.compared("helpful", name), lambda row: row.win, 0.0) for name in rivals}
    return Facts(
        categories=tuple(
            counts(category, [row for row in harmful if row.category == category])
            for category in sorted({row.category for row in harmful})
        ),
        wins=wins,
        over_refusal=counts("over-refusal", candidate.scored("over_refusal")),
        kl=tuple(row["base"] for row in sampled(candidate)),
        spent=spent,
    )


def sampled(candidate: Candidate) -> list[DistanceRow]:
    """Return the sampled answers that the mean KL to the base is about.

    Prompts that must pass are left out: they are chosen incidents, and no sample of what users ask.
    """
    return [row for row in candidate.distance_rows if "base" in row and row["suite"] != MUST_PASS]
