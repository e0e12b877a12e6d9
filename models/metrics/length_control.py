"""The win rate that answers of equal length would have, after AlpacaEval 2 (Dubois et al. 2024)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from models.metrics.statistics import CACHED, Estimate

RIDGE = 0.1
"""Precision of the prior N(0, 1/RIDGE) that keeps the coefficients of a logistic fit finite."""


class Normal(NamedTuple):
    """A normal distribution."""

    mean: float
    sd: float


SLOPE = Normal(0.9, 0.1)
"""Prior of the slope b of `length_controlled` where lengths hardly overlap: what gives AlpacaEval 2's published figures
back. Leaving out one of 28 models of its leaderboard (weighted GPT-4-turbo against gpt4_turbo), the others choose these
two numbers each time, from means .8 to 1.3 and standard deviations .05 to .3 (`benchmarks/length_control.py`).

It is a convention, not a truth about another judge. AlpacaEval's own slopes are steeper (mostly 1 to 2): they stand
beside a term for the difficulty of each prompt, and are tied to a verbose and a concise version of the baseline.
"""
OVERLAP = 0.15
"""Below this share a length-controlled figure leans on `SLOPE`; it then neither orders nor gates anything."""
LEANS = "leans on AlpacaEval's slope"
"""What a reader is told of a figure below `OVERLAP`."""


@dataclass(frozen=True)
class LengthControlled(Estimate):
    """A win rate at equal length, never without what it stands on."""

    overlap: float
    """Share of prompts on which the usually shorter side is the longer one; equal lengths count as half."""
    leans: bool
    """Below `OVERLAP`: the figure leans on AlpacaEval's slope, and must neither order nor gate anything."""


def length_controlled(
    wins: Sequence[float],
    lengths: Sequence[tuple[float, float]],
    confidence: float = 0.95,
    slope: Normal = SLOPE,
) -> LengthControlled:
    """Return the win rate that answers of equal length would have (after Dubois et al. 2024, AlpacaEval 2).

    Fits P(win) = σ(a + b·tanh(d/sd(d))), d our tokens minus theirs, with a small ridge so that clear-cut data have a
    finite fit; the figure is σ(a). Where the lengths hardly overlap (below `OVERLAP`), equal length is extrapolated:
    b then has the prior `slope`. From `OVERLAP` on the data alone decide b.

    The interval resamples prompts, with one imaginary prompt of equal length that was lost for its lower end, and one
    that was won for its upper end. With the prior, each resample draws the prior's mean from the prior, so that its
    width is part of the interval.

    Args:
        wins: from 0 to 1, one per prompt.
        lengths: (our tokens, their tokens), in the same order; another unit gives the same figure.
        slope: prior of b, for lengths that hardly overlap.
    """
    from scipy import special

    method = "logistic fit on the difference in length, bootstrap over prompts, one imaginary prompt at the end"
    won = np.asarray(wins)
    if not len(won):
        return LengthControlled(math.nan, math.nan, math.nan, 0, 0, method, math.nan, False)
    gaps = np.array([our_tokens - their_tokens for our_tokens, their_tokens in lengths])
    x = np.tanh(gaps / gaps.std()) if gaps.std() > 0 else np.zeros_like(gaps)
    overlap = _overlap(gaps)
    leans = overlap < OVERLAP
    prior = slope if leans else Normal(0.0, RIDGE**-0.5)
    intercept = _intercepts(won, x, np.ones((1, len(won))), np.array([prior.mean]), prior.sd)
    rng = np.random.default_rng(0)
    size = len(won) + 1  # with the imaginary prompt, which stands last
    drawn = rng.multinomial(size, np.full(size, 1 / size), 200)
    # The ridge is no belief about the slope, so its mean stays at 0; AlpacaEval's prior is one, so its mean is drawn.
    means = rng.normal(prior.mean, prior.sd if leans else 0.0, len(drawn))
    low, high = (
        np.quantile(special.expit(_intercepts(np.append(won, end), np.append(x, 0.0), drawn, means, prior.sd)), q)
        for end, q in ((0.0, (1 - confidence) / 2), (1.0, (1 + confidence) / 2))
    )
    method += f"; {LEANS}" if leans else ""
    value = special.expit(intercept[0])
    return LengthControlled(float(value), float(low), float(high), len(won), 0, method, overlap, leans)


def _overlap(gaps: np.ndarray) -> float:
    """Return the share of prompts on which the usually shorter side is the longer one; equal lengths count as half."""
    return 0.5 - 0.5 * abs(float(np.mean(np.sign(gaps))))


def _intercepts(won: np.ndarray, x: np.ndarray, weights: np.ndarray, means: np.ndarray, sd: float) -> np.ndarray:
    """Return a of each weighted logistic fit of won on a + b·x, b ~ N(mean, sd), by Newton's method.

    Args:
        won: (prompts,)
        x: (prompts,)
        weights: (fits, prompts)
        means: (fits,)
        sd: one for all fits.
    """
    # Lengths are whole numbers: many prompts have the same x and the same outcome, and each such kind is one row.
    kinds, kind = np.unique(np.stack([won, x], axis=1), axis=0, return_inverse=True)
    won, x = kinds.T
    weights = np.stack([np.bincount(kind, weight, len(kinds)) for weight in weights])
    rows = max(1, CACHED // len(won))
    parts = range(0, len(weights), rows)
    return np.concatenate([_newton(won, x, weights[i : i + rows], means[i : i + rows], sd) for i in parts])


def _newton(won: np.ndarray, x: np.ndarray, weights: np.ndarray, means: np.ndarray, sd: float) -> np.ndarray:
    """Return `_intercepts` of fits that are made side by side: one product of matrices serves all of them."""
    from scipy import special

    design = np.stack([np.ones_like(x), x], axis=1)
    products = (design[:, :, None] * design[:, None, :]).reshape(len(x), 4)
    precision = np.array([RIDGE, sd**-2])
    centre = np.stack([np.zeros_like(means), means], axis=1)
    beta = centre.copy()
    for _ in range(50):  # the loss is convex, and some ten rounds are enough
        p = special.expit(beta @ design.T)
        gradient = (weights * (won - p)) @ design - precision * (beta - centre)
        hessian = ((weights * p * (1 - p)) @ products).reshape(len(means), 2, 2) + np.diag(precision)
        move = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        beta = beta + move
        if np.abs(move).max() < 1e-9:
            break
    return beta[:, 0]
