"""Bounds and rates. The prompt is the unit; a failed verdict is excluded from estimates and counts against bounds."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
MANY = 10_000
"""Above so many values the interval of a mean is the normal one: resampling gives the same, but takes minutes."""
STEEPEST = 1e3
"""Largest scale that is fitted: data that need a larger one could as well need an infinite one."""
BOLDEST = 0.9
"""Largest share of a bettor's capital that one value can take: a single bad answer must not end the game."""
ROUNDS = 200
"""Most bets of one game; where there are more values, each bet is on several. More bets would add 0.01 to the power."""
# Near 0 and 1 the steps are 1/80 of a decade: else the bound of many values that are all good would end at 0.999.
_edge = 10.0 ** -np.arange(6, 1.5, -1 / 80)
GRID = np.unique([*_edge, *(np.arange(1, 1000) / 1000), *(1 - _edge)])
"""Means that are tried: a bound is the greatest one that is ruled out. The steps are 0.001, and 3 % of the distance to
0 or 1 near these ends."""
CACHED = 2**17
"""Numbers in one matrix of resamples, or of fits made side by side: about what a core's cache holds."""


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
    # The appended False stands for "not ruled out", so that argmin finds a place even if all of GRID is ruled out.
    first_possible = int(np.argmin(np.append(ruled_out(x[:, None], GRID, 1 - confidence), False)))
    return float(GRID[first_possible - 1]) if first_possible else 0.0


def ruled_out(values: np.ndarray, mean: np.ndarray | float, error: float) -> np.ndarray:
    """Return where "the mean is at most `mean`" is ruled out; where that is true, with probability at most `error`.

    By betting: a capital of 1 is staked on the values, one after the other, at fair odds or worse if the mean is at
    most `mean`. It then exceeds 1/error with probability at most `error`, whatever the distribution and however the
    stakes follow from the earlier values. Before each value the stake is set anew, for the gain that is still needed in
    the remaining rounds (STaR, Voráček & Orabona 2025), with the variance seen so far.

    Args:
        values: shape (n, …), in [0, 1], in an order that does not depend on them.
        mean: between 0 and 1, broadcast against the rest of that shape.
        error: above 0.
    """
    n, block = len(values), -(-len(values) // ROUNDS) or 1
    capital = np.asarray(error)  # as a share of the aim 1/error: the game starts at `error` and is won at 1
    spread = mean * (1 - mean)  # one imaginary value with the largest variance: nothing is seen yet
    for first in range(0, n, block):
        bet, times = _counted(values[first : first + block])
        ideal = np.sqrt(-2 * np.log(capital) * (1 + first) / (spread * (n - first)))  # 0 once the aim is reached
        stake = np.minimum(ideal, BOLDEST / mean)
        with np.errstate(over="ignore"):  # a gain beyond all floats is infinite, and cut to 1 like every other
            gain = np.exp((times * np.log(1 + stake * (bet - mean))).sum(axis=0))
            capital = np.clip(capital * gain, 1e-300, 1)  # above 0, since the next round takes its logarithm
        spread = spread + (times * (bet - mean) ** 2).sum(axis=0)
    return np.asarray(capital >= 1 - 1e-9)


def _counted(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
    """Return the different values of one bet, and how often each comes.

    A bound on 200,000 prompts takes 0.02 s this way, and 2.5 s with a logarithm for every value. Several games with
    values of their own side by side are left as they are.
    """
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
    one_sided = (1 + confidence) / 2
    bounds = bounded_mean_bound(x, one_sided), 1 - bounded_mean_bound(1 - x, one_sided)
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
        # In parts, since the matrix of all resamples of 10,000 values has 160 MB and leaves the cache.
        rng, n = np.random.default_rng(0), len(sample)
        rows = max(1, CACHED // n)
        parts = (min(rows, RESAMPLES - first) for first in range(0, RESAMPLES, rows))
        means = np.concatenate([sample[rng.integers(n, size=(part, n))].mean(axis=1) for part in parts])
        low, high = (float(end) for end in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]))
    return Estimate(float(np.mean(values)), low, high, len(values), failed, method)


def clustered(values: Sequence[float], prompts: Sequence[Hashable], confidence: float = 0.95) -> Estimate:
    """Return the mean over pairs with a percentile-bootstrap interval that resamples prompts with all their pairs.

    It describes, and decides nothing: its error is that of `mean`.
    """
    method = "bootstrap over prompts, with all their pairs; describes"
    sample, group, size = np.asarray(values), *_groups(prompts)
    if not size:
        return Estimate(math.nan, math.nan, math.nan, 0, 0, method)
    sums, counts = np.bincount(group, sample), np.bincount(group)
    # How often each prompt is drawn says all about a resample: its mean is a quotient of two sums over prompts.
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES)
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(float(sample.mean()), float(low), float(high), size, 0, method)


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

    # Where all margins have one sign, the maximum lies at infinity and brentq finds no root.
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
    # A quotient that is a whole number can be computed slightly too large, and ceil would then add a prompt.
    return math.ceil(math.log(1 - confidence) / math.log(at_least) - 1e-9)


def power(true_rate: float, at_least: float, n: int, confidence: float) -> float:
    """Return how often a policy with this true rate shows `at_least` on n prompts."""
    from scipy import stats

    return float(stats.binom.sf(needed(at_least, n, confidence) - 1, n, true_rate))


def enough_prompts(true_rate: float, at_least: float, confidence: float, probability: float = 0.9) -> int:
    """Return about how many prompts let a policy with this true rate pass with this probability.

    Raises:
        ValueError: the true rate does not exceed the bound, so no number is enough.
    """
    if true_rate <= at_least:
        raise ValueError(f"a true rate of {true_rate:g} can never show {at_least:g}")
    # Steps of 5 % are fine enough for an "about", and find 10^6 in some 230 steps.
    n = 8
    while power(true_rate, at_least, n, confidence) < probability:
        n = math.ceil(n * 1.05)
    return n
