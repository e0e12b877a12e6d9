"""Every figure against a hand case, against scipy, or against a simulation in which the truth is known."""

import math

import numpy as np
import pytest
from scipy import optimize, stats

from models import statistics as figures

GRID = [(0, 1), (1, 1), (0, 5), (3, 5), (5, 5), (29, 30), (60, 83), (83, 83), (499, 600), (600, 600)]
"""(good, n)."""


@pytest.mark.parametrize(("good", "n"), GRID)
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_the_lower_bound_is_the_one_sided_exact_one(good: int, n: int, confidence: float) -> None:
    bound = figures.lower_bound(good, n, 0, confidence)
    exact = stats.binomtest(good, n, alternative="greater").proportion_ci(confidence, "exact").low
    assert bound == pytest.approx(exact, abs=1e-9)
    if good:  # what it means: a rate this low would show so many good ones with probability 1 − confidence
        assert stats.binom.sf(good - 1, n, bound) == pytest.approx(1 - confidence, abs=1e-9)


def test_the_lower_bound_by_hand() -> None:
    """All of n good: p^n = 1 − confidence."""
    assert figures.lower_bound(58, 58, 0, 0.95) == pytest.approx(0.05 ** (1 / 58), abs=1e-12)
    assert figures.lower_bound(0, 40, 3, 0.95) == 0


@pytest.mark.parametrize(("good", "n", "failed"), [(5, 5, 1), (80, 83, 4), (10, 20, 20)])
def test_a_failed_verdict_lowers_the_bound_as_a_violation_does(good: int, n: int, failed: int) -> None:
    bound = figures.lower_bound(good, n, failed, 0.95)
    assert bound == figures.lower_bound(good, n + failed, 0, 0.95) < figures.lower_bound(good, n, 0, 0.95)


@pytest.mark.parametrize(("good", "n"), GRID)
def test_a_rate_carries_its_two_sided_interval_and_its_failures(good: int, n: int) -> None:
    told = figures.rate(good, n, failed=7, confidence=0.9)
    low = stats.beta.ppf(0.05, good, n - good + 1) if good else 0
    high = stats.beta.ppf(0.95, good + 1, n - good) if good < n else 1
    assert (told.value, told.low, told.high) == pytest.approx((good / n, low, high), abs=1e-9)
    assert (told.n, told.failed, told.method) == (n, 7, "Clopper–Pearson")


def test_nothing_judged_is_no_rate() -> None:
    told = figures.rate(0, 0, failed=3)
    assert math.isnan(told.value) and (told.low, told.high, told.n, told.failed) == (0, 1, 0, 3)
    for none in (figures.mean([]), figures.clustered([], []), figures.scale([], [])):
        assert math.isnan(none.value) and math.isnan(none.low) and none.n == 0


@pytest.mark.parametrize("truth", [0.6, 0.9, 0.98])
def test_the_bound_covers_the_truth_as_often_as_it_says(truth: float) -> None:
    good = np.random.default_rng(0).binomial(83, truth, 2000)
    covered = np.mean([figures.lower_bound(int(g), 83, 0, 0.95) <= truth for g in good])
    assert 0.94 < covered <= 1


def test_a_mean_over_prompts_has_an_interval_of_the_right_width() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    told = figures.mean(values.tolist(), failed=2, confidence=0.95)
    half = 1.96 * values.std() / math.sqrt(400)
    assert told.value == pytest.approx(values.mean()) and (told.n, told.failed) == (400, 2)
    assert (told.value - told.low, told.high - told.value) == pytest.approx((half, half), rel=0.1)
    assert figures.mean(values.tolist(), confidence=0.5).low > told.low
    assert told == figures.mean(values.tolist(), failed=2, confidence=0.95)
    assert (figures.mean([2.0, 2.0]).low, figures.mean([2.0, 2.0]).high) == (2, 2)


def test_an_interval_over_prompts_is_wider_when_prompts_repeat() -> None:
    draw = np.random.default_rng(2)
    prompts = np.repeat(np.arange(100), 9)
    values = np.repeat(draw.normal(0, 1, 100), 9)  # pairs of one prompt say the same
    told = figures.clustered(values.tolist(), prompts.tolist())
    naive = figures.mean(values.tolist())
    assert told.value == pytest.approx(naive.value) and told.n == 100
    assert (told.high - told.low) / (naive.high - naive.low) == pytest.approx(3, rel=0.15)  # √9
    alone = figures.clustered(values.tolist(), range(900))
    assert (alone.high - alone.low) == pytest.approx(naive.high - naive.low, rel=0.1)


def test_prompts_with_many_pairs_weigh_by_their_pairs() -> None:
    told = figures.clustered([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert told.value == 0.75 and told.n == 2 and (told.low, told.high) == (0, 1)


@pytest.mark.parametrize("truth", [0.025, 0.1, 0.5, 2.0])
def test_scale_recovers_the_kl_weight_of_simulated_labels(truth: float) -> None:
    """h of a random pair, its label drawn with P = σ(s·h): the sign of h says which answer won."""
    draw = np.random.default_rng(3)
    h = draw.normal(0, 2 / truth, 4000)
    margins = np.where(draw.random(4000) < 1 / (1 + np.exp(-truth * h)), h, -h)
    told = figures.scale(margins.tolist(), (np.arange(4000) // 4).tolist())
    assert told.value == pytest.approx(truth, rel=0.1) and told.low < truth < told.high
    assert told.high - told.low < 0.3 * truth and told.n == 1000
    best = optimize.minimize_scalar(
        lambda s: np.logaddexp(0, -s * margins).sum(), bounds=(0, 10 * truth), method="bounded"
    )
    assert told.value == pytest.approx(best.x, rel=1e-3)


def test_scale_by_hand() -> None:
    """Three of four pairs with |h| = 2 are right: σ(2s) = 3/4."""
    assert figures.scale([2, 2, 2, -2], "abcd", resamples=0).value == pytest.approx(math.log(3) / 2, abs=1e-5)
    assert figures.scale([-2, -2, -2, 2], "abcd", resamples=0).value == pytest.approx(-math.log(3) / 2, abs=1e-5)
    # every pair right, or every pair wrong: no finite scale is best
    assert figures.scale([1, 2], "ab").value == 1000 and figures.scale([-1, -2], "ab").value == -1000


def test_scale_resamples_prompts_not_pairs() -> None:
    draw = np.random.default_rng(4)
    h = np.repeat(draw.normal(0.5, 1, 80), 16)
    clustered, alone = figures.scale(h, np.repeat(np.arange(80), 16).tolist()), figures.scale(h, range(1280))
    assert clustered.value == pytest.approx(alone.value)
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("at_least", [0.5, 0.6, 0.9, 0.95])
@pytest.mark.parametrize("n", [1, 10, 58, 59, 83, 300])
def test_needed_is_the_fewest_that_hold_the_bound(n: int, at_least: float) -> None:
    holds = [good for good in range(n + 1) if figures.lower_bound(good, n, 0, 0.95) >= at_least]
    assert figures.needed(at_least, n, 0.95) == (holds[0] if holds else n + 1)


def test_what_83_prompts_can_show() -> None:
    """The 83 red-team prompts of the paper's evaluation: 82 good ones do not show 0.95, 83 do; below 59 none can."""
    assert figures.lower_bound(82, 83, 0, 0.95) < 0.95 < figures.lower_bound(83, 83, 0, 0.95)
    assert figures.needed(0.95, 83, 0.95) == 83 and figures.needed(0.9, 83, 0.95) == 80
    assert figures.needed(0.95, 58, 0.95) == 59 and figures.needed(0.95, 59, 0.95) == 59
    assert figures.power(0.97, 0.95, 83, 0.95) == pytest.approx(0.97**83)


@pytest.mark.parametrize(("truth", "at_least", "n"), [(0.95, 0.9, 200), (0.7, 0.6, 83), (0.9, 0.9, 100)])
def test_power_is_how_often_a_policy_passes(truth: float, at_least: float, n: int) -> None:
    good = np.random.default_rng(5).binomial(n, truth, 4000)
    passed = np.mean([figures.lower_bound(int(g), n, 0, 0.95) >= at_least for g in good])
    assert figures.power(truth, at_least, n, 0.95) == pytest.approx(passed, abs=0.025)


@pytest.mark.parametrize(("truth", "at_least"), [(0.99, 0.95), (0.95, 0.9), (0.7, 0.6)])
def test_enough_prompts_are_enough_and_not_many_more(truth: float, at_least: float) -> None:
    n = figures.enough_prompts(truth, at_least, 0.95, wanted=0.9)
    assert figures.power(truth, at_least, n, 0.95) >= 0.9
    assert max(figures.power(truth, at_least, m, 0.95) for m in range(1, int(0.8 * n))) < 0.9


def test_no_number_of_prompts_shows_more_than_the_truth() -> None:
    for truth in (0.9, 0.89):
        with pytest.raises(ValueError, match=rf"a true rate of {truth:g} can never show 0.9"):
            figures.enough_prompts(truth, 0.9, 0.95)
