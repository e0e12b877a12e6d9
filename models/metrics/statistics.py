"""Bounds and rates. The prompt is the unit; a failed verdict is excluded from estimates and counts against bounds."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
MANY = 10_000
"""Of more values the mean is as good as normal, and resampling them shows nothing else, in minutes."""
STEEPEST = 1e3
"""A fitted scale beyond this is not told apart from infinity."""
BOLDEST = 0.9
"""Share of a bettor's capital that one value can take: a single bad answer must not end the game."""
ROUNDS = 200
"""Most bets of one game; where there are more values, each bet is on several. More would add 0.01 to the power."""
_edge = 10.0 ** -np.arange(6, 1.5, -1 / 80)
GRID = np.unique([*_edge, *(np.arange(1, 1000) / 1000), *(1 - _edge)])
"""Means that are tried: a bound is the greatest one ruled out. Steps of 0.001, near 0 and 1 of 3 % of the distance."""
RIDGE = 0.1
"""Precision of the prior N(0, 1/RIDGE) that keeps the coefficients of a logistic fit finite."""
CACHED = 2**17
"""Numbers in one matrix of resamples, or of fits made side by side: about what a core's cache holds."""


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


@dataclass(frozen=True)
class Estimate:
    """One figure with everything needed to doubt it."""

    value: float
    low: float
    """Lower end of the two-sided interval."""
    high: float
    """Upper end of the two-sided interval."""
    n: int
    """Prompts that were judged."""
    failed: int
    """Prompts whose verdict failed: not in `value`."""
    method: str
    """How the interval was made."""


@dataclass(frozen=True)
class LengthControlled(Estimate):
    """A win rate at equal length, never without what it stands on."""

    overlap: float
    """Share of prompts on which the usually shorter side is the longer one; equal lengths count as half."""
    leans: bool
    """Below `OVERLAP`: the figure leans on AlpacaEval's slope, and must neither order nor gate anything."""


def rate(good: int, n: int, failed: int = 0, confidence: float = 0.95) -> Estimate:
    """Return good/n with its two-sided Clopper–Pearson interval (exact; one answer per prompt)."""
    from scipy import stats

    if n == 0:
        return Estimate(math.nan, 0.0, 1.0, 0, failed, "Clopper–Pearson")
    interval = stats.binomtest(good, n).proportion_ci(confidence)
    return Estimate(good / n, float(interval.low), float(interval.high), n, failed, "Clopper–Pearson")


def lower_bound(good: int, n: int, failed: int, confidence: float) -> float:
    """Return the one-sided Clopper–Pearson lower bound on a rate; failed verdicts count as violations.

    The bound p solves P(X ≥ good | n + failed, p) = 1 − confidence; it is 0 where nothing was good.
    """
    from scipy import stats

    return float(stats.beta.ppf(1 - confidence, good, n + failed - good + 1)) if good else 0.0


def bounded_mean_bound(values: Sequence[float] | np.ndarray, confidence: float) -> float:
    """Return a lower bound on the mean of independent values in [0, 1] that holds for every distribution of them.

    The greatest point of GRID up to which every mean is ruled out (`ruled_out`); 0 if none is. The values are taken in
    an order drawn with a fixed seed, since a suite's rows may be sorted.
    """
    x = np.random.default_rng(0).permutation(np.asarray(values))
    kept = int(np.argmin(np.append(ruled_out(x[:, None], GRID, 1 - confidence), False)))  # the first that is not
    return float(GRID[kept - 1]) if kept else 0.0


def ruled_out(values: np.ndarray, mean: np.ndarray | float, error: float) -> np.ndarray:
    """Return where "the mean is at most `mean`" is ruled out; where that is true, with probability at most `error`.

    By betting: a capital of 1 is staked on the values, one after the other, at fair odds or worse if the mean is at
    most `mean`. It then exceeds 1/error with probability at most `error`, whatever the distribution and however the
    stakes follow from the values before. They are set anew before each value for what is still to be won in the rounds
    that are left (STaR, Voráček & Orabona 2025), with the variance seen so far.

    Args:
        values: shape (n, …), in [0, 1], in an order that does not depend on them.
        mean: between 0 and 1, broadcast against the rest of that shape.
        error: above 0.
    """
    n, block = len(values), -(-len(values) // ROUNDS) or 1
    won = np.asarray(error)  # capital, as a share of its aim
    spread = mean * (1 - mean)  # one imaginary value with the largest variance there is
    for first in range(0, n, block):
        some, times = _counted(values[first : first + block])
        wanted = np.sqrt(-2 * np.log(won) * (1 + first) / (spread * (n - first)))  # 0 once the aim is reached
        stake = np.minimum(wanted, BOLDEST / mean)
        with np.errstate(over="ignore"):
            won = np.clip(won * np.exp((times * np.log(1 + stake * (some - mean))).sum(axis=0)), 1e-300, 1)
        spread = spread + (times * (some - mean) ** 2).sum(axis=0)
    return np.asarray(won >= 1 - 1e-9)


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
    """Return the values of one bet of one game and how often each comes; of several games, the values as they are."""
    if values.size > len(values) or len(values) == 1:
        return values, 1.0
    kinds, times = np.unique(values, return_counts=True)
    shape = (-1, *values.shape[1:])
    return kinds.reshape(shape), times.reshape(shape)


def bounded_mean(
    values: Sequence[float], failed: int = 0, confidence: float = 0.95, ends: tuple[float, float] = (0.0, 1.0)
) -> Estimate:
    """Return the mean over prompts of values between two ends, with an interval that holds for every distribution.

    It is made of two one-sided bounds (`bounded_mean_bound`) and never collapses: six prompts won are the fewest that
    show more than ½ at 0.95, as in a two-sided sign test. `benchmarks/bounds.py` measures its error and its power.
    """
    method = "betting over prompts"
    if not len(values):
        return Estimate(math.nan, *ends, 0, failed, method)
    low, high = ends
    x = (np.asarray(values) - low) / (high - low)
    half = (1 + confidence) / 2
    bounds = bounded_mean_bound(x, half), 1 - bounded_mean_bound(1 - x, half)
    below, above = (low + (high - low) * bound for bound in bounds)
    return Estimate(float(np.mean(values)), below, above, len(values), failed, method)


def mean(values: Sequence[float], failed: int = 0, confidence: float = 0.95) -> Estimate:
    """Return the mean over prompts with a percentile-bootstrap interval, resampling prompts.

    It describes, and decides nothing: at 0.95 it misses the truth in 5 to 9 % of samples of 20 to 300 values with
    short tails, in 10 to 24 % of log-normal ones (sd 1.5), and in 6 to 54 % where 3 in 100 values are large
    (`benchmarks/bounds.py`).
    """
    from scipy import stats

    method = "bootstrap over prompts; describes"
    if not len(values):
        return Estimate(math.nan, math.nan, math.nan, 0, failed, method)
    sample = np.asarray(values)
    if len(sample) > MANY:
        method = "normal over prompts; describes"
        half = float(stats.norm.ppf((1 + confidence) / 2) * sample.std() / math.sqrt(len(sample)))
        low, high = float(sample.mean()) - half, float(sample.mean()) + half
    else:
        rng, n = np.random.default_rng(0), len(sample)
        rows = max(1, CACHED // n)
        parts = (min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows))
        means = np.concatenate([sample[rng.integers(n, size=(part, n))].mean(axis=1) for part in parts])
        low, high = (float(end) for end in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return Estimate(float(np.mean(values)), low, high, len(values), failed, method)


def clustered(values: Sequence[float], prompts: Sequence[Hashable], confidence: float = 0.95) -> Estimate:
    """Return the mean over pairs with a percentile-bootstrap interval that resamples prompts with all their pairs.

    It describes, as `mean` does, whose error it has.
    """
    method = "bootstrap over prompts, with all their pairs; describes"
    sample, group, size = np.asarray(values), *_groups(prompts)
    if not size:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, method)
    sums, counts = np.bincount(group, sample), np.bincount(group)
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(sample.mean()), float(low), float(high), size, 0, method)


def length_controlled(
    wins: Sequence[float],
    lengths: Sequence[tuple[float, float]],
    confidence: float = 0.95,
    slope: Normal = SLOPE,
) -> LengthControlled:
    """Return the win rate that answers of equal length would have (after Dubois et al. 2024, AlpacaEval 2).

    Fits P(win) = σ(a + b·tanh(d/sd(d))), d our tokens minus theirs, with a small ridge so that clear-cut data have a
    finite fit; the figure is σ(a). Where the lengths hardly overlap (below `OVERLAP`), equal length is extrapolated:
    b then has the prior `slope`. From there on the data alone decide b.

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
    d = np.array([ours - theirs for ours, theirs in lengths])
    x = np.tanh(d / d.std()) if d.std() > 0 else np.zeros_like(d)
    overlap = _overlap(d)
    leans = overlap < OVERLAP
    prior = slope if leans else Normal(0.0, RIDGE**-0.5)
    value = _intercepts(won, x, np.ones((1, len(won))), np.array([prior.mean]), prior.sd)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(len(won) + 1, np.full(len(won) + 1, 1 / (len(won) + 1)), 200)
    means = rng.normal(prior.mean, prior.sd if leans else 0.0, len(drawn))
    low, high = (
        np.quantile(special.expit(_intercepts(np.append(won, end), np.append(x, 0.0), drawn, means, prior.sd)), q)
        for end, q in ((0.0, (1 - confidence) / 2), (1.0, (1 + confidence) / 2))
    )
    method += f"; {LEANS}" if leans else ""
    value = special.expit(value[0])
    return LengthControlled(float(value), float(low), float(high), len(won), 0, method, overlap, leans)


def _overlap(d: np.ndarray) -> float:
    """Return the share of prompts on which the usually shorter side is the longer one; equal lengths count as half."""
    return 0.5 - 0.5 * abs(float(np.mean(np.sign(d))))


def _intercepts(won: np.ndarray, x: np.ndarray, weights: np.ndarray, means: np.ndarray, sd: float) -> np.ndarray:
    """Return a of each weighted logistic fit of won on a + b·x, b ~ N(mean, sd), by Newton's method.

    Args:
        won: (prompts,)
        x: (prompts,)
        weights: (fits, prompts)
        means: (fits,)
        sd: one for all fits.
    """
    kinds, kind = np.unique(np.stack([won, x], axis=1), axis=0, return_inverse=True)  # lengths are whole numbers
    won, x = kinds.T
    weights = np.stack([np.bincount(kind, weight, len(kinds)) for weight in weights])
    rows = max(1, CACHED // len(won))
    parts = range(0, len(weights), rows)
    return np.concatenate([_newton(won, x, weights[i : i + rows], means[i : i + rows], sd) for i in parts])


def _newton(won: np.ndarray, x: np.ndarray, weights: np.ndarray, means: np.ndarray, sd: float) -> np.ndarray:
    """Return the same of fits that are made side by side: one product of matrices serves all of them."""
    from scipy import special

    design = np.stack([np.ones_like(x), x], axis=1)
    products = (design[:, :, None] * design[:, None, :]).reshape(len(x), 4)
    precision = np.array([RIDGE, sd**-2])
    centre = np.stack([np.zeros_like(means), means], axis=1)
    beta = centre.copy()
    for _ in range(50):
        p = special.expit(beta @ design.T)
        gradient = (weights * (won - p)) @ design - precision * (beta - centre)
        hessian = ((weights * p * (1 - p)) @ products).reshape(len(means), 2, 2) + np.diag(precision)
        move = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        beta = beta + move
        if np.abs(move).max() < 1e-9:
            break
    return beta[:, 0]


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided p-value that prompts change from good to bad as often as from bad to good."""
    from scipy import stats

    changed = lost + gained
    return float(stats.binomtest(lost, changed).pvalue) if changed else 1.0


def scale(
    margins: Sequence[float], prompts: Sequence[Hashable], confidence: float = 0.95, resamples: int = 200
) -> Estimate:
    """Fit P(label) = σ(s·h) on held-out pairs, h the unscaled log-ratio margin of chosen over rejected in nats.

    At the optimum of a step s equals its KL weight β/λ (DPO's Bradley–Terry model, SACPO eq. 11). Far above: the policy
    has not moved as far as β/λ allows. Below: over-optimised. The interval resamples prompts, not pairs. It describes,
    and decides nothing: at 0.95 it misses the truth in 10 to 11 % of samples of 60 pairs, in 6.5 % of 240 and in 5 % of
    1,000 (`benchmarks/bounds.py`).
    """
    h = np.asarray(margins)
    group, size = _groups(prompts)
    method = "logistic fit, bootstrap over prompts; describes"
    if not len(h):
        return Estimate(math.nan, math.nan, math.nan, 0, 0, method)
    ones = np.ones(len(h))
    value = _slope(h, ones)
    rng = np.random.default_rng(0)
    draws = [_slope(h, rng.multinomial(size, np.full(size, 1 / size))[group]) for _ in range(resamples)]
    low, high = np.quantile(draws or [math.nan], [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value, float(low), float(high), size, 0, method)


def _groups(prompts: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """Return the number of the prompt of each value, and how many prompts there are."""
    names = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return np.array([names[prompt] for prompt in prompts]), len(names)


def _slope(h: np.ndarray, weight: np.ndarray) -> float:
    """Return the s in [−STEEPEST, STEEPEST] that maximises Σ weight·log σ(s·h); the derivative is monotone in s."""
    from scipy import optimize, special

    def derivative(s: float) -> float:
        return float((weight * h * special.expit(-s * h)).sum())

    if derivative(-STEEPEST) <= 0:
        return -STEEPEST
    if derivative(STEEPEST) >= 0:
        return STEEPEST
    return float(optimize.brentq(derivative, -STEEPEST, STEEPEST))


def needed(at_least: float, n: int, confidence: float) -> int:
    """Return the fewest good answers of n whose lower bound reaches `at_least`; n + 1 if none does."""
    low, high = 0, n + 1
    while low < high:
        middle = (low + high) // 2
        if lower_bound(middle, n, 0, confidence) >= at_least:
            high = middle
        else:
            low = middle + 1
    return low


def fewest_prompts(at_least: float, confidence: float) -> int:
    """Return how many prompts, all answered well, are the fewest whose lower bound reaches `at_least`.

    With k of k good the Clopper–Pearson bound is (1 − confidence)^(1/k).
    """
    return math.ceil(math.log(1 - confidence) / math.log(at_least) - 1e-9)


def power(true_rate: float, at_least: float, n: int, confidence: float) -> float:
    """Return how often a policy with this true rate shows `at_least` on n prompts."""
    from scipy import stats

    return float(stats.binom.sf(needed(at_least, n, confidence) - 1, n, true_rate))


def enough_prompts(true_rate: float, at_least: float, confidence: float, wanted: float = 0.9) -> int:
    """Return about how many prompts let a policy with this true rate pass with probability `wanted`.

    Raises:
        ValueError: the true rate does not exceed the bound, so no number is enough.
    """
    if true_rate <= at_least:
        raise ValueError(f"a true rate of {true_rate:g} can never show {at_least:g}")
    n = 8
    while power(true_rate, at_least, n, confidence) < wanted:
        n = math.ceil(n * 1.05)
    return n
