"""Can the judge be trusted? Its position bias, whether it repeats itself, and what it says of answers that people read.

A labelled sample gives the judge's own error, and with it the rate that people would have found (Rogan & Gladen 1978).
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from models.files import jsonl
from models.judges.protocol import win
from models.judges.rows import ComparisonRow, ScoreRow
from models.metrics.figures import per_prompt, same_answers
from models.metrics.statistics import Estimate, bounded_mean, rate

R = TypeVar("R", ScoreRow, ComparisonRow)
DRAWS = 4000
"""Of each posterior: the ends of an interval then move by less than 0.005 from seed to seed."""


class Labelled(NamedTuple):
    """A judge and people on the same answers, one count per combination."""

    both_good: int
    only_people: int
    """People say good, the judge says bad."""
    only_judge: int
    both_bad: int
    failed: int

    @property
    def agreement(self) -> Estimate:
        """Share of answers on which judge and people agree."""
        return rate(self.both_good + self.both_bad, self.n, self.failed)

    @property
    def n(self) -> int:
        """Answers with both verdicts."""
        return self.both_good + self.only_people + self.only_judge + self.both_bad

    @property
    def kappa(self) -> float:
        """Cohen's κ: agreement beyond what the two rates alone would give."""
        if not self.n:
            return math.nan
        people, judge = (self.both_good + self.only_people) / self.n, (self.both_good + self.only_judge) / self.n
        by_chance = people * judge + (1 - people) * (1 - judge)
        observed = (self.both_good + self.both_bad) / self.n
        return (observed - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def position_bias(compared: Sequence[ComparisonRow]) -> Estimate:
    """Return how much more an answer wins when it is shown first, from −1 to 1; 0 is a judge without that bias."""
    # equal answers are a tie without a call, and tell nothing about the judge
    rows = [row for row in compared if row.ok and row.calls]
    return bounded_mean(*per_prompt(rows, lambda row: _won(row, first=True) - _won(row, first=False)), ends=(-1, 1))


def repeatability(compared: Sequence[ComparisonRow]) -> Estimate:
    """Return the share of orders, asked several times, in which all repeats name the same winner; mean over prompts."""
    rows = [row for row in compared if row.ok and any(call.repeat for call in row.calls)]

    def alike(row: ComparisonRow) -> float:
        winners = [{win(c.ours, c.theirs) for c in row.calls if c.first is first} for first in (True, False)]
        return sum(len(wins) == 1 for wins in winners) / len(winners)

    return bounded_mean(*per_prompt(rows, alike))


def between(ours: Sequence[R], theirs: Sequence[R], value: Callable[[R], object]) -> Estimate:
    """Return the share of prompts on which two judges, or two rounds of one, say the same of the same answers."""
    both = [pair for pairs in same_answers(ours, theirs).values() for pair in pairs]
    judged = [(a, b) for a, b in both if a.ok and b.ok]
    return rate(sum(value(a) == value(b) for a, b in judged), len(judged), len(both) - len(judged))


def labelled(path: Path) -> Labelled:
    """Count a table of `good` (people), `judged` (the judge) and `status`."""
    counts = {(True, True): 0, (True, False): 0, (False, True): 0, (False, False): 0}
    failed = 0
    for row in jsonl.read(path):
        if row["status"] == "ok":
            counts[row["good"], row["judged"]] += 1
        else:
            failed += 1
    return Labelled(counts[True, True], counts[True, False], counts[False, True], counts[False, False], failed)


def corrected(good: int, n: int, sample: Labelled, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """Return the rate that people would have found, with an interval that includes the judge's own error.

    With se = P(judge good | people good) and sp = P(judge bad | people bad), a judged rate q means a true rate of
    (q + sp − 1)/(se + sp − 1) (Rogan & Gladen 1978). The interval draws q, se and sp from their Jeffreys posteriors.
    A judge that is no better than a coin (se + sp ≤ 1) says nothing: the interval then reaches from 0 to 1.
    """
    method = "Rogan–Gladen, Jeffreys draws"
    if not n or not sample.n:
        return Estimate(math.nan, 0.0, 1.0, n, 0, method)
    draw = np.random.default_rng(seed)

    def beta(yes: int, no: int) -> np.ndarray:
        return draw.beta(yes + 0.5, no + 0.5, DRAWS)

    q, se = beta(good, n - good), beta(sample.both_good, sample.only_people)
    sp = beta(sample.both_bad, sample.only_judge)
    # a draw in which the judge is no better than a coin says nothing about the truth: every rate is equally likely
    informed = se + sp > 1
    drawn = np.where(informed, np.clip((q + sp - 1) / np.where(informed, se + sp - 1, 1), 0, 1), draw.random(DRAWS))
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(_corrected(good / n, sample), float(low), float(high), n, 0, method)


def _corrected(q: float, sample: Labelled) -> float:
    people, none = sample.both_good + sample.only_people, sample.both_bad + sample.only_judge
    # without an answer that people call good, or one that they call bad, one kind of error is not known
    if not people or not none:
        return math.nan
    se, sp = sample.both_good / people, sample.both_bad / none
    return float(np.clip((q + sp - 1) / (se + sp - 1), 0, 1)) if se + sp > 1 else math.nan


def _won(row: ComparisonRow, first: bool) -> float:
    """Return how often our answer won when it was shown first, or second."""
    wins = [win(call.ours, call.theirs) for call in row.calls if call.first is first]
    return sum(wins) / len(wins)
