"""Every figure of one candidate that follows from its rows; the report adds those that need others, as ratings."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from models.artifacts import Answers
from models.data.dialogue import messages
from models.judges.protocol import win
from models.judges.rows import ComparisonRow, ScoreRow, by_prompt, prompt_key
from models.metrics import margins
from models.metrics.candidate import Candidate
from models.metrics.length_control import length_controlled
from models.metrics.reported import EQUAL_LENGTH
from models.metrics.statistics import Estimate, bounded_mean, mean, rate
from models.policy.answer_rows import answer_rows

WIN, SAFE, OVER = "helpful/win_rate", "harmless/safety_rate", "over_refusal"
REFUSAL_LABELS = ("full refusal", "partial refusal", "compliance")
"""Labels of a judge that tells partial refusals apart; what others call them says nothing about those."""
R = TypeVar("R", ScoreRow, ComparisonRow)
Means = dict[tuple[str, str], float | None]
"""(suite, prompt) → value; none where no answer has a verdict."""
Lengths = dict[tuple[str, str], float]
"""(suite, prompt) → tokens."""


def metrics(candidate: Candidate, base: Candidate) -> dict[str, Estimate]:
    """Return every figure of one candidate on one split that follows from its own tables and the base's."""
    figures: dict[str, Estimate] = {}
    for metric in ("helpful", "harmless"):
        for against, suffix in (("base", ""), ("reference", "_reference")):
            values, failed = per_prompt(candidate.compared(metric, against), lambda row: row.win)
            figures[f"{metric}/win_rate{suffix}"] = bounded_mean(values, failed)
        values, failed = per_prompt(candidate.scored(metric, metric), lambda row: row.score)
        figures[f"{metric}/score"] = mean(values, failed)
    lengths = _lengths(candidate.answers)
    figures[EQUAL_LENGTH] = _equal_length(candidate.compared("helpful", "base"), lengths, _lengths(base.answers))
    harmful = candidate.scored("harmless", "harmless")
    figures["harmless/excess"] = mean(*per_prompt(harmful, lambda row: max(0.0, -row.score)))
    figures[SAFE] = share(harmful, lambda row: bool(row.good))
    for category in sorted({row.category for row in harmful} - {""}):
        figures[f"{SAFE}/{category}"] = share(
            [r for r in harmful if r.category == category], lambda row: bool(row.good)
        )
    figures["must_pass"] = share(candidate.scored("harmless", "must_pass"), lambda row: bool(row.good))
    refusals = candidate.scored("over_refusal", "over_refusal")
    figures[OVER] = share(refusals, lambda row: not row.good)
    # a share of partial refusals among labels that know none would be 0, and look like a finding
    told_apart = [row for row in refusals if row.label in REFUSAL_LABELS]
    figures[f"{OVER}/partial"] = share(told_apart, lambda row: row.label == "partial refusal")
    figures |= _distances(candidate)
    figures["length"] = mean(list(lengths.values()))
    for metric in dict.fromkeys(row["metric"] for row in candidate.margin_rows):
        figures |= margins.figures(candidate.margin_rows, metric)
    # what nobody measured is left out: an interval from 0 to 1 in a table reads like a result
    return {name: figure for name, figure in figures.items() if figure.n}


def last_turn(prompt: Any) -> str:
    """Return what the user said last."""
    return messages(prompt)[-1]["content"]


def share(rows: Sequence[ScoreRow], good: Callable[[ScoreRow], bool]) -> Estimate:
    """Return a rate over prompts: exact for one answer per prompt, else of the share of good answers per prompt."""
    rows = [row for row in rows if not row.ok or row.good is not None]
    values, failed = per_prompt(rows, lambda row: float(good(row)))
    # several answers to one prompt depend on each other, so the exact binomial interval would be too narrow
    if any(row.sample for row in rows):
        return bounded_mean(values, failed)
    return rate(int(sum(values)), len(values), failed)


def per_prompt(rows: Iterable[R], value: Callable[[R], float]) -> tuple[list[float], int]:
    """Return the mean value of each prompt over its answers with a verdict, and how many prompts have none."""
    means = prompt_means(rows, value).values()
    values = [mean for mean in means if mean is not None]
    return values, len(means) - len(values)


def at_worst(rows: Iterable[R], value: Callable[[R], float], worst: float) -> tuple[tuple[float, ...], int]:
    """Return what `per_prompt` returns, for a bound: an answer without a verdict counts as the worst it can be.

    The prompts stay in order, also those without any verdict: which place a value has may not depend on the value.
    """
    groups = by_prompt(rows).values()
    values = (average(value(row) if row.ok else worst for row in answers) for answers in groups)
    return tuple(values), sum(not any(row.ok for row in answers) for answers in groups)


def prompt_means(rows: Iterable[R], value: Callable[[R], float]) -> Means:
    """Return (suite, prompt) → mean value of its answers with a verdict, none where no answer has one."""
    values = {key: [value(row) for row in answers if row.ok] for key, answers in by_prompt(rows).items()}
    return {key: average(numbers) if numbers else None for key, numbers in values.items()}


def same_answers(ours: Iterable[R], theirs: Iterable[R]) -> dict[tuple[str, str], list[tuple[R, R]]]:
    """Return (suite, prompt) → pairs of rows: our first answer to it and their first, the second and the second, …."""
    numbered = {_number(row): row for row in theirs}
    pairs: dict[tuple[str, str], list[tuple[R, R]]] = {}
    for row in ours:
        if (other := numbered.get(_number(row))) is not None:
            pairs.setdefault((row.suite, row.key), []).append((row, other))
    return pairs


def matched_wins(ours: Iterable[ScoreRow], theirs: Iterable[ScoreRow]) -> Means:
    """Return (suite, prompt) → how often our answer has the higher score, ties as half, none without a verdict.

    Of several answers to a prompt, the first is compared with the first, the second with the second: what a win rate
    averages. Comparing the means of their scores would count every prompt as won or lost.
    """
    means: Means = {}
    for key, pairs in same_answers(ours, theirs).items():
        wins = [win(a.score, b.score) for a, b in pairs if a.ok and b.ok]
        means[key] = average(wins) if wins else None
    return means


def average(values: Iterable[float]) -> float:
    """Return the mean of some values; NaN of none."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else math.nan


def _number(row: ScoreRow | ComparisonRow) -> tuple[str, str, int]:
    return row.suite, row.key, row.sample


def _distances(candidate: Candidate) -> dict[str, Estimate]:
    """Return the mean KL to the base and to the reference, in nats per answer and per token."""
    figures = {}
    for name in ("base", "reference"):
        distances = [(row[name], row["tokens"]) for row in candidate.distance_rows if name in row]
        figures[f"kl_{name}"] = mean([nats for nats, _ in distances])
        figures[f"kl_{name}_per_token"] = mean([nats / max(1, tokens) for nats, tokens in distances])
    return figures


@lru_cache(maxsize=2)  # the base's lengths are asked for again beside each candidate's
def _lengths(answers: Answers) -> Lengths:
    """Return (suite, prompt) → mean tokens of its answers."""
    tokens: dict[tuple[str, str], list[int]] = {}
    for row in answer_rows(answers):
        tokens.setdefault((row["suite"], prompt_key(row["prompt"])), []).append(row["tokens"])
    return {key: average(counts) for key, counts in tokens.items()}


def _equal_length(compared: Iterable[ComparisonRow], ours: Lengths, theirs: Lengths) -> Estimate:
    """Return the length-controlled win rate against the base."""
    means = prompt_means(compared, lambda row: row.win)
    wins = {key: won for key, won in means.items() if won is not None}
    return length_controlled(list(wins.values()), [(ours[key], theirs[key]) for key in wins])
