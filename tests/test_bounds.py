"""Bounds for several answers per prompt, length control, McNemar: hand-made cases, and coverage by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from models import statistics

DRAWS = 10_000


def test_all_good_by_hand() -> None:
    """The capital at m is (1 − c + c/m)^n."""
    m = statistics.bounded_mean_bound([1.0] * 83, 0.95)
    c = min(0.98, math.sqrt(2 * math.log(20) * m / (83 * (1 - m))))
    assert (1 - c + c / m) ** 83 == pytest.approx(20, rel=1e-6)
    assert m == pytest.approx(statistics.lower_bound(83, 83, 0, 0.95), abs=0.002)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [0.0] * 50])
def test_nothing_good_shows_nothing(values: list[float]) -> None:
    assert statistics.bounded_mean_bound(values, 0.95) == 0


def test_order_changes_nothing_and_more_of_the_same_is_worth_more() -> None:
    values = [1.0, 0.5, 1.0, 0.0, 0.75] * 8
    one = statistics.bounded_mean_bound(values, 0.95)
    assert one == pytest.approx(statistics.bounded_mean_bound(sorted(values), 0.95), abs=1e-8)
    assert one < statistics.bounded_mean_bound(values * 3, 0.95) < np.mean(values)
    assert one > statistics.bounded_mean_bound(values, 0.99)


def test_shares_that_vary_less_than_coins_are_known_better() -> None:
    """The same mean on the same prompts: shares near it say more than all-or-nothing answers."""
    coins, shares = [1.0] * 60 + [0.0] * 40, [0.6] * 100
    exact = statistics.lower_bound(60, 100, 0, 0.95)
    assert statistics.bounded_mean_bound(shares, 0.95) > exact
    assert exact > statistics.bounded_mean_bound(coins, 0.95) > exact - 0.04


@pytest.mark.parametrize(
    ("n", "samples", "rate", "spread"),
    [(83, 4, 0.9, 0.0), (83, 4, 0.9, 1.0), (83, 8, 0.98, 0.7), (40, 2, 0.5, 0.5), (200, 4, 0.995, 0.9)],
    ids=["independent", "all answers alike", "near 1", "half", "nearly always"],
)
def test_the_bound_holds_as_often_as_it_says(n: int, samples: int, rate: float, spread: float) -> None:
    """Prompts differ: with probability `spread` all answers to one share a fate, else each has its own."""
    draw = np.random.default_rng(5)
    alike = draw.random((DRAWS, n)) < spread
    fate = (draw.random((DRAWS, n)) < rate).astype(float)
    own = draw.binomial(samples, rate, (DRAWS, n)) / samples
    shares = np.where(alike, fate, own)
    # the bound exceeds the true rate iff the capital there reaches 1/(1 − confidence)
    c = statistics.stake(rate, n, 0.95)
    exceeds = np.log1p(c * (shares / rate - 1)).sum(axis=1) >= math.log(20)
    assert exceeds.mean() <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / DRAWS)
    for i in range(20):  # and that is what the function says
        assert (statistics.bounded_mean_bound(shares[i], 0.95) >= rate - 1e-9) == exceeds[i]


@pytest.mark.parametrize(("rate", "n"), [(0.5, 40), (0.9, 83), (0.98, 83), (0.995, 300)])
def test_clopper_pearson_covers(rate: float, n: int) -> None:
    counts = np.random.default_rng(6).binomial(n, rate, DRAWS)
    bounds = {good: statistics.lower_bound(int(good), n, 0, 0.95) for good in set(counts.tolist())}
    assert np.mean([bounds[good] > rate for good in counts.tolist()]) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / DRAWS)


def test_the_two_sided_interval_is_made_of_two_bounds() -> None:
    told = statistics.bounded_mean([1.0, 0.5, 0.25, 1.0] * 10, failed=2)
    mirrored = statistics.bounded_mean([0.0, 0.5, 0.75, 0.0] * 10)
    assert told.value == pytest.approx(0.6875) and (told.n, told.failed) == (40, 2)
    assert told.low == pytest.approx(1 - mirrored.high) and told.high == pytest.approx(1 - mirrored.low)
    assert told.low == statistics.bounded_mean_bound([1.0, 0.5, 0.25, 1.0] * 10, 0.975)


def test_length_control_takes_away_what_length_alone_won() -> None:
    """Our answers are longer by chance of the prompt, and win only where they are."""
    draw = np.random.default_rng(7)
    gap = draw.normal(60, 60, 3000)
    won = (draw.random(3000) < 1 / (1 + np.exp(-2 * np.tanh(gap / gap.std())))).astype(float)
    told = statistics.length_controlled(won.tolist(), [(100 + g, 100) for g in gap])
    assert np.mean(won) > 0.68 and told.low < 0.5 < told.high and told.value == pytest.approx(0.5, abs=0.04)


def test_length_control_without_a_difference_in_length_is_the_win_rate() -> None:
    won = [1.0] * 70 + [0.5] * 10 + [0.0] * 20
    told = statistics.length_controlled(won, [(50, 50)] * 100)
    assert told.value == pytest.approx(0.75, abs=2e-3) and told.low < 0.75 < told.high and told.n == 100


def test_length_control_agrees_with_scipy() -> None:
    from scipy.optimize import minimize

    draw = np.random.default_rng(8)
    lengths = draw.integers(5, 90, (80, 2)).astype(float)
    won = draw.choice([0, 0.5, 1], 80)
    x = lengths[:, 0] - lengths[:, 1]
    x = np.tanh(x / x.std())

    def loss(b: np.ndarray) -> float:
        logit = b[0] + b[1] * x
        return float(np.sum(np.logaddexp(0, logit) - won * logit) + 0.05 * np.sum(b**2))

    best = minimize(loss, np.zeros(2), tol=1e-12).x[0]
    told = statistics.length_controlled(won.tolist(), [tuple(row) for row in lengths])
    assert told.value == pytest.approx(1 / (1 + np.exp(-best)), abs=1e-5)


@pytest.mark.parametrize(("won", "value"), [([1.0] * 30, 0.9), ([0.0] * 30, 0.1)])
def test_length_control_of_clear_cut_data_is_finite(won: list[float], value: float) -> None:
    told = statistics.length_controlled(won, [(i, 20) for i in range(30)])
    assert abs(told.value - round(value)) < 0.1 and told.low <= told.value <= told.high


@pytest.mark.parametrize(("lost", "gained", "p"), [(0, 0, 1.0), (5, 5, 1.0), (6, 0, 0.03125), (10, 2, 0.03857421875)])
def test_mcnemar(lost: int, gained: int, p: float) -> None:
    """By hand: 2·P(X ≤ smaller | n, ½), at most 1."""
    assert statistics.mcnemar(lost, gained) == pytest.approx(p)
    assert statistics.mcnemar(gained, lost) == statistics.mcnemar(lost, gained)
    if lost + gained:
        assert p == pytest.approx(min(1, 2 * stats.binom.cdf(min(lost, gained), lost + gained, 0.5)))


def test_the_spread_over_prompts_is_the_papers() -> None:
    """83 prompts, half of them won: one standard error is 0.055 (science 8.35); copies add no certainty."""
    won = [1.0] * 41 + [0.0] * 42
    told = statistics.mean(won)
    assert (told.high - told.low) / (2 * 1.96) == pytest.approx(0.055, abs=0.003)
    twice = statistics.clustered(won * 2, [*range(83)] * 2)
    assert twice.high - twice.low == pytest.approx(told.high - told.low, rel=0.1)


@pytest.mark.parametrize("n", [100, 1000, 10_000, 100_000])
def test_all_good_answers_show_nearly_what_the_exact_bound_shows(n: int) -> None:
    """The bound is not cut off at the last point of its grid."""
    exact = statistics.lower_bound(n, n, 0, 0.95)
    assert 1 <= (1 - statistics.bounded_mean_bound([1.0] * n, 0.95)) / (1 - exact) < 1.1


def test_a_mean_of_wins_never_collapses() -> None:
    """By hand, two won: 1 of 27 resamples of (1, 1, 0) is all 0, 6 more have one 1."""
    assert statistics.mean([1.0, 1.0]).low == 1  # what resampling alone says
    assert statistics.mean_within([1.0, 1.0], confidence=0.9).low == pytest.approx(1 / 3)
    assert [statistics.mean_within([1.0] * n).low > 0.5 for n in (2, 5, 6, 20)] == [False, False, True, True]
    told = statistics.mean_within([0.5] * 50)
    assert 0.45 < told.low < 0.5 == told.value < told.high < 0.55 and told.low == pytest.approx(1 - told.high)
    apart = statistics.mean_within([0.0] * 50, ends=(-1, 1))
    assert apart.low == pytest.approx(-apart.high) and -0.1 < apart.low < 0
    for n in (2, 30):
        sure = statistics.length_controlled([1.0] * n, [(20, 20)] * n)
        assert sure.low < sure.value - 0.01 <= sure.high


@pytest.mark.parametrize(
    ("values", "chances"),
    [((0, 1), (0.5, 0.5)), ((0, 1), (0.1, 0.9)), ((0, 0.5), (0.05, 0.95)), ((0, 0.5, 1), (0.1, 0.8, 0.1))],
)
def test_a_bound_on_wins_exceeds_the_truth_seldom(values: tuple[float, ...], chances: tuple[float, ...]) -> None:
    draw, truth = np.random.default_rng(9), np.dot(values, chances)
    for n in (2, 5, 10, 20, 60):
        counts = [
            tuple(np.bincount(row, minlength=len(values))) for row in draw.choice(len(values), (600, n), p=chances)
        ]
        bound = {c: statistics.mean_within(np.repeat(values, c).tolist(), confidence=0.9).low for c in set(counts)}
        assert np.mean([bound[c] > truth + 1e-9 for c in counts]) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600), n


def test_enough_prompts_show_that_an_equal_helps_no_less() -> None:
    """The gate's margin of 0.05 on 400 prompts, wins with standard deviation 0.35; betting shows it in 62 %."""
    wins = np.random.default_rng(10).choice([0, 0.5, 1], (200, 400), p=[0.245, 0.51, 0.245])
    assert np.mean([statistics.mean_within(row.tolist(), confidence=0.9).low >= 0.45 for row in wins]) > 0.82
