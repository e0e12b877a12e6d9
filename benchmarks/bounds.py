"""How often the bounds that decide err, and how often they let pass what should; and what others do.

    python benchmarks/bounds.py [DRAWS]

Every case is a distribution of one value per prompt, a number of prompts, and a limit that is to be shown. `error` is
how often a bound exceeds the true mean, which may happen with the nominal probability; `power` is how often it reaches
the limit, which the true mean exceeds. Upper bounds are lower ones of 1 − value. Student's t and resampling stand
beside ours for comparison. The last table is about intervals that only describe.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import integrate, stats

from models.gate.gate import CLIP
from models.metrics import ratings, statistics

Draw = Callable[[np.random.Generator, int, int], np.ndarray]
"""(generator, prompts, draws) → values in [0, 1], one column per draw."""
RESAMPLES = 2000
LEVELS = (0.05, 0.005)
"""A test at 0.95, and one of the ten decisions that the gate takes at 0.95 together."""


@dataclass(frozen=True)
class Case:
    """A distribution, and what is to be shown about its mean."""

    name: str
    draw: Draw
    truth: float
    n: int
    limit: float
    """Below the truth; what the power is about."""

    def drawn(self, draws: int) -> np.ndarray:
        """Return values, shape (n, draws), the same for every method."""
        return self.draw(np.random.default_rng(len(self.name) + self.n), self.n, draws)


def chances(values: tuple[float, ...], p: tuple[float, ...]) -> Draw:
    """Each value with its probability."""
    return lambda rng, n, draws: rng.choice(values, (n, draws), p=p)


def shares(answers: int, a: float, b: float) -> Draw:
    """Shares of good answers to prompts whose own rates follow a beta distribution."""
    return lambda rng, n, draws: rng.binomial(answers, rng.beta(a, b, (n, draws))) / answers


def near(distance: Any) -> Draw:
    """1 − KL / CLIP, at least 0, of a KL in units of the limit: what the gate's bound is about."""
    return lambda rng, n, draws: 1 - np.minimum(distance.rvs((n, draws), random_state=rng) / CLIP, 1)


def rare(usual: float, seldom: float, chance: float) -> Draw:
    """One value, and with a small chance another one."""
    return chances((usual, seldom), (1 - chance, chance))


TIES, COINS, QUARTERS = (0.0, 0.5, 1.0), (0.0, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Seldom:
    """Two distances, the larger one with a small chance; as much of scipy's interface as is used."""

    usual: float
    large: float
    chance: float

    def rvs(self, size: tuple[int, int], random_state: np.random.Generator) -> np.ndarray:
        """Return distances."""
        return np.where(random_state.random(size) < self.chance, self.large, self.usual)

    def sf(self, x: float) -> float:
        """Return the chance of more than x."""
        return 1.0 if x < self.usual else self.chance if x < self.large else 0.0


def wins() -> Iterator[Case]:
    """Wins against another policy; the gate asks for 0.5 − margin."""
    for n in (200, 400, 800):
        yield Case("half ties, sd 0.35", chances(TIES, (0.245, 0.51, 0.245)), 0.5, n, 0.45)
    yield Case("coins", chances(COINS, (0.5, 0.5)), 0.5, 400, 0.45)
    yield Case("both orders judged", chances(QUARTERS, (0.15, 0.2, 0.3, 0.2, 0.15)), 0.5, 400, 0.45)
    yield Case("mostly ties, few lost", chances(TIES, (0.02, 0.94, 0.04)), 0.51, 400, 0.45)
    yield Case("ties, 5 % lost", chances((0.0, 0.5), (0.05, 0.95)), 0.475, 60, 0.4)
    yield Case("ties, 5 % lost", chances((0.0, 0.5), (0.05, 0.95)), 0.475, 20, 0.4)
    yield Case("ties, 20 % lost", chances((0.0, 0.5), (0.2, 0.8)), 0.4, 20, 0.2)
    yield Case("8 of 10 won", chances(COINS, (0.2, 0.8)), 0.8, 20, 0.5)
    yield Case("9 of 10 won", chances(COINS, (0.1, 0.9)), 0.9, 20, 0.6)
    yield Case("9 of 10 won", chances(COINS, (0.1, 0.9)), 0.9, 60, 0.7)
    yield Case("few prompts", chances(TIES, (0.1, 0.3, 0.6)), 0.75, 5, 0.5)
    yield Case("few prompts", chances(TIES, (0.1, 0.3, 0.6)), 0.75, 20, 0.5)
    yield Case("half ties, sd 0.35", chances(TIES, (0.245, 0.51, 0.245)), 0.5, 3000, 0.475)


def several() -> Iterator[Case]:
    """Shares of safe answers of each prompt (`evaluation.answers` above 1), or of answers that were no refusals."""
    yield Case("4 answers, rates Beta(9, 1)", shares(4, 9, 1), 0.9, 83, 0.8)
    yield Case("4 answers, rates Beta(19, 1)", shares(4, 19, 1), 0.95, 200, 0.9)
    yield Case("8 answers, rates Beta(0.9, 0.1)", shares(8, 0.9, 0.1), 0.9, 150, 0.8)
    yield Case("1 of 200 prompts always unsafe", rare(1.0, 0.0, 0.005), 0.995, 300, 0.97)
    yield Case("2 of 100 prompts always unsafe", rare(1.0, 0.0, 0.02), 0.98, 83, 0.9)
    yield Case("2 of 100 prompts always unsafe", rare(1.0, 0.0, 0.02), 0.98, 10, 0.6)
    yield Case("one answer of 4 unsafe, 3 %", rare(1.0, 0.75, 0.03), 0.9925, 100, 0.95)


def kl() -> Iterator[Case]:
    """KL in units of the limit, turned around: 0 is CLIP times the limit, or more, and 1 is none."""
    distances = {
        "exponential": stats.expon(scale=0.5),
        "log-normal sd 1": stats.lognorm(1, scale=0.5 * math.exp(-0.5)),
        "log-normal sd 2": stats.lognorm(2, scale=0.5 * math.exp(-2)),
        "Pareto 1.5": stats.lomax(1.5, scale=0.25),
        "0.3, seldom (3 %) 12": Seldom(0.3, 12, 0.03),
        "0.9, seldom (2 %) 4": Seldom(0.9, 4, 0.02),
    }
    for name, distance in distances.items():
        mean = integrate.quad(distance.sf, 0, CLIP, limit=200)[0]  # of the distance, clipped
        for n in (64, 256):
            yield Case(name, near(distance), 1 - mean / CLIP, n, 1 - 1 / CLIP)


def betting(values: np.ndarray, mean: float, error: float) -> np.ndarray:
    """Ours: what `statistics.bounded_mean_bound` rules out."""
    return statistics.ruled_out(values, mean, error)


def fixed(values: np.ndarray, mean: float, error: float) -> np.ndarray:
    """The bound of several answers per prompt until 0.1: one stake for all values (Waudby-Smith & Ramdas 2024)."""
    stake = min(0.98, math.sqrt(-2 * math.log(error) * mean / (len(values) * (1 - mean))))
    return np.log1p(stake * (values / mean - 1)).sum(axis=0) >= -math.log(error)


def imaginary(values: np.ndarray, mean: float, error: float) -> np.ndarray:
    """The bound on wins until 0.1: resampling, with one imaginary prompt that is lost."""
    return resampled(np.concatenate([values, np.zeros((1, values.shape[1]))]), mean, error)


def resampled(values: np.ndarray, mean: float, error: float) -> np.ndarray:
    """Percentile bootstrap over prompts: the bound on the KL until 0.1."""
    n = len(values)
    drawn = np.random.default_rng(0).integers(0, n, (RESAMPLES, n))
    weights = np.stack([np.bincount(row, minlength=n) for row in drawn]) / n
    return np.quantile(weights @ values, error, axis=0) > mean + 1e-12


def student(values: np.ndarray, mean: float, error: float) -> np.ndarray:
    """Student's t."""
    n = len(values)
    width = stats.t.ppf(1 - error, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return values.mean(axis=0) - width > mean + 1e-12


METHODS = {
    "betting (decides)": betting,
    "one stake": fixed,
    "resampling, one imaginary prompt": imaginary,
    "resampling": resampled,
    "Student's t": student,
}


def table(cases: Iterator[Case], draws: int) -> None:
    """Print error and power of every method on every case."""
    print(f"| case | n | mean | shown | nominal | {' | '.join(METHODS)} |")
    print("|---" * (5 + len(METHODS)) + "|")
    worst = dict.fromkeys(METHODS, 0.0)
    for case in cases:
        values = case.drawn(draws)
        for level in LEVELS:
            cells = []
            for name, method in METHODS.items():
                error, power = (float(method(values, m, level).mean()) for m in (case.truth, case.limit))
                sure = level + 3 * math.sqrt(level * (1 - level) / draws)
                worst[name] = max(worst[name], error / level)
                cells.append(f"{'**' if error > sure else ''}{error:.4f}{'**' if error > sure else ''} / {power:.2f}")
            print(f"| {case.name} | {case.n} | {case.truth:.4g} | {case.limit:g} | {level:g} | {' | '.join(cells)} |")
    print(
        f"| largest error / nominal | | | | | {' | '.join(f'{ratio:.2f}' for ratio in worst.values())} |\n", flush=True
    )


def exact() -> None:
    """Print the error of the Clopper–Pearson bound, summed over all counts that there can be."""
    print("| good answers | n | nominal | error | shown | power |\n|---|---|---|---|---|---|")
    for rate, n, limit in ((0.5, 7, 0.2), (0.9, 20, 0.6), (0.9, 83, 0.8), (0.98, 83, 0.9), (0.995, 300, 0.97)):
        counts = np.arange(n + 1)
        for level in LEVELS:
            bounds = np.array([statistics.lower_bound(int(k), n, 0, 1 - level) for k in counts])
            chance = stats.binom.pmf(counts, n, rate)
            error, power = chance[bounds > rate].sum(), chance[bounds >= limit].sum()
            print(f"| {rate:g} | {n} | {level:g} | {error:.4f} | {limit:g} | {power:.2f} |")
    print(flush=True)


def misses(draws: int) -> Iterator[tuple[str, str, float]]:
    """Yield figure, case, and how often a two-sided interval at 0.95 of those that only describe misses the truth."""
    rng = np.random.default_rng(3)
    scores: dict[str, tuple[Draw, float]] = {
        "normal": (lambda rng, n, draws: rng.normal(1, 2, (n, draws)), 1.0),
        "exponential": (lambda rng, n, draws: rng.exponential(1, (n, draws)), 1.0),
        "log-normal sd 1.5": (lambda rng, n, draws: rng.lognormal(-1.125, 1.5, (n, draws)), 1.0),
        "0, seldom (3 %) 5": (rare(0.0, 5.0, 0.03), 0.15),
    }
    for name, (draw, truth) in scores.items():
        for n in (20, 64, 300):
            estimates = [statistics.mean(column.tolist()) for column in draw(rng, n, draws).T]
            yield "mean of scores, excess, KL, length", f"{name}, n = {n}", _missed(estimates, truth)
    for pairs, prompts in ((60, 60), (60, 15), (240, 60), (1000, 250)):
        estimates = [_scale(rng, pairs, prompts) for _ in range(draws // 4)]
        yield "s", f"{pairs} pairs of {prompts} prompts, s = 0.1", _missed(estimates, 0.1)
    for n in (20, 60, 200):
        estimates = [_rating(rng, n) for _ in range(draws // 10)]
        yield "rating", f"{n} prompts, 3 candidates, 100 points apart", _missed(estimates, ratings.BASE + 100)


def _missed(estimates: list[statistics.Estimate], truth: float) -> float:
    return float(np.mean([not one.low <= truth <= one.high for one in estimates]))


def _scale(rng: np.random.Generator, pairs: int, prompts: int) -> statistics.Estimate:
    h = rng.normal(0, 15, pairs)
    margins = np.where(rng.random(pairs) < 1 / (1 + np.exp(-0.1 * h)), h, -h)
    return statistics.scale(margins.tolist(), (np.arange(pairs) % prompts).tolist())


def _rating(rng: np.random.Generator, n: int) -> statistics.Estimate:
    """Every pair of three candidates meets on every prompt."""
    points = {"base": 0, "a": 100, "b": 200}
    pairs = ("base", "a"), ("base", "b"), ("a", "b")
    chances = [1 / (1 + 10 ** ((points[y] - points[x]) / 400)) for x, y in pairs]
    played = dict(zip(pairs, 1.0 * (rng.random((n, len(pairs))) < chances).T, strict=True))
    return ratings.ratings(played, "base")["a"]


def main(draws: int = 4000) -> None:
    """Print all tables."""
    started = time.perf_counter()
    for title, cases in (("Wins", wins()), ("Shares", several()), ("KL, clipped", kl())):
        print(f"### {title}: error / power, {draws} draws a case\n")
        table(cases, draws)
    print("### Clopper–Pearson: summed over all counts\n")
    exact()
    print("### Intervals at 0.95 that only describe\n\n| figure | case | misses the truth |\n|---|---|---|")
    for figure, case, missed in misses(draws):
        print(f"| {figure} | {case} | {missed:.3f} |", flush=True)
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
