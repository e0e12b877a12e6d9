"""Every figure against a hand case, against scipy, or against a simulation in which the truth is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import optimize, stats

from models.metrics import statistics as figures
from models.metrics.length_control import LengthControlled, length_controlled

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
    estimate = figures.rate(good, n, failed=7, confidence=0.9)
    low = stats.beta.ppf(0.05, good, n - good + 1) if good else 0
    high = stats.beta.ppf(0.95, good + 1, n - good) if good < n else 1
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((good / n, low, high), abs=1e-9)
    assert (estimate.n, estimate.failed, estimate.method) == (n, 7, "Clopper–Pearson")


NAN = math.nan
LENGTH = "logistic fit on the difference in length, bootstrap over prompts, one imaginary prompt at the end"


@pytest.mark.parametrize(
    ("made", "low", "high", "failed", "method"),
    [
        (lambda: figures.rate(0, 0, failed=3), 0, 1, 3, "Clopper–Pearson"),
        (lambda: figures.bounded_mean([], 3), 0, 1, 3, "betting over prompts"),
        (lambda: figures.bounded_mean([], ends=(-1, 1)), -1, 1, 0, "betting over prompts"),
        (lambda: figures.mean([], 3), NAN, NAN, 3, "bootstrap over prompts; describes"),
        (lambda: figures.clustered([], []), NAN, NAN, 0, "bootstrap over prompts, with all their pairs; describes"),
        (lambda: figures.scale([], []), NAN, NAN, 0, "logistic fit, bootstrap over prompts; describes"),
        (lambda: length_controlled([], []), NAN, NAN, 0, LENGTH),
    ],
    ids=["rate", "bounded_mean", "between other ends", "mean", "clustered", "scale", "length_controlled"],
)
def test_nothing_judged_is_no_estimate(
    made: Callable[[], figures.Estimate], low: float, high: float, failed: int, method: str
) -> None:
    none = made()
    assert (none.value, none.low, none.high) == pytest.approx((NAN, low, high), nan_ok=True)
    assert (none.n, none.failed, none.method) == (0, failed, method)
    if isinstance(none, LengthControlled):
        assert math.isnan(none.overlap) and none.leans is False


SHARES, LENGTHS = np.random.default_rng(9).random(40), [(9.0, 7.0), (4.0, 6.0)] * 20


@pytest.mark.parametrize(
    ("made", "method"),
    [
        (lambda **also: figures.rate(28, 40, **also), "Clopper–Pearson"),
        (lambda **also: figures.bounded_mean(SHARES, **also), "betting over prompts"),
        (lambda **also: figures.mean(SHARES, **also), "bootstrap over prompts; describes"),
        (
            lambda **also: figures.clustered(SHARES, range(40), **also),
            "bootstrap over prompts, with all their pairs; describes",
        ),
        (lambda **also: length_controlled(SHARES, LENGTHS, **also), LENGTH),
        (
            lambda **also: figures.scale(SHARES - 0.4, range(40), **also),
            "logistic fit, bootstrap over prompts; describes",
        ),
    ],
    ids=["rate", "bounded_mean", "mean", "clustered", "length_controlled", "scale"],
)
def test_an_estimate_says_how_it_was_made_and_is_the_same_each_time(
    made: Callable[..., figures.Estimate], method: str
) -> None:
    estimate = made()
    assert estimate == made() == made(confidence=0.95) != made(confidence=0.9)
    assert (estimate.n, estimate.failed, estimate.method) == (40, 0, method)


@pytest.mark.parametrize("good", [80, 200, 370])
@pytest.mark.parametrize(
    "made",
    [figures.mean, lambda values, **also: figures.clustered(values, range(400), **also)],
    ids=["mean", "clustered"],
)
def test_resampled_coins_follow_the_binomial_distribution(made: Callable[..., figures.Estimate], good: int) -> None:
    """Both ends of the interval, to one coin of 400; at 0.95 and elsewhere."""
    coins = [1.0] * good + [0.0] * (400 - good)
    for confidence in (0.95, 0.5):
        estimate = made(coins, confidence=confidence)
        ends = stats.binom.ppf([(1 - confidence) / 2, (1 + confidence) / 2], 400, good / 400)
        assert [400 * estimate.low, 400 * estimate.high] == pytest.approx(ends, abs=1)


def test_every_value_may_be_drawn_again() -> None:
    """Also the first one, and the last."""
    for values in ([1.0] + [0.0] * 9, [0.0] * 9 + [1.0]):
        assert figures.mean(values).high == figures.clustered(values, range(10)).high == pytest.approx(0.3)


def test_the_interval_of_a_scale_by_hand() -> None:
    """Where all |h| are 2, s is log(k / (n − k)) / 2 of the k pairs that are right: a binomial count."""
    for confidence in (0.95, 0.5):
        estimate = figures.scale([2] * 300 + [-2] * 100, range(400), confidence, resamples=2000)
        k = stats.binom.ppf([(1 - confidence) / 2, (1 + confidence) / 2], 400, 0.75)
        ends = [estimate.low, estimate.high]
        assert ends == pytest.approx(np.log(k / (400 - k)) / 2, abs=0.008)  # one pair more is 0.0067
        assert estimate.value == pytest.approx(math.log(3) / 2)


@pytest.mark.parametrize("truth", [0.6, 0.9, 0.98])
def test_the_bound_covers_the_truth_as_often_as_it_says(truth: float) -> None:
    good = np.random.default_rng(0).binomial(83, truth, 2000)
    covered = np.mean([figures.lower_bound(int(g), 83, 0, 0.95) <= truth for g in good])
    assert 0.94 < covered <= 1


def test_a_mean_over_prompts_has_an_interval_of_the_right_width() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    estimate = figures.mean(values.tolist(), failed=2, confidence=0.95)
    half = 1.96 * values.std() / math.sqrt(400)
    assert estimate.value == pytest.approx(values.mean()) and (estimate.n, estimate.failed) == (400, 2)
    assert (estimate.value - estimate.low, estimate.high - estimate.value) == pytest.approx((half, half), rel=0.1)
    assert figures.mean(values.tolist(), confidence=0.5).low > estimate.low
    assert estimate == figures.mean(values.tolist(), failed=2, confidence=0.95)
    assert (figures.mean([2.0, 2.0]).low, figures.mean([2.0, 2.0]).high) == (2, 2)


def test_an_interval_over_prompts_is_wider_when_prompts_repeat() -> None:
    draw = np.random.default_rng(2)
    prompts = np.repeat(np.arange(100), 9)
    values = np.repeat(draw.normal(0, 1, 100), 9)  # pairs of one prompt say the same
    estimate = figures.clustered(values.tolist(), prompts.tolist())
    naive = figures.mean(values.tolist())
    assert estimate.value == pytest.approx(naive.value) and estimate.n == 100
    assert (estimate.high - estimate.low) / (naive.high - naive.low) == pytest.approx(3, rel=0.15)  # √9
    alone = figures.clustered(values.tolist(), range(900))
    assert (alone.high - alone.low) == pytest.approx(naive.high - naive.low, rel=0.1)


def test_prompts_with_many_pairs_weigh_by_their_pairs() -> None:
    estimate = figures.clustered([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert estimate.value == 0.75 and estimate.n == 2 and (estimate.low, estimate.high) == (0, 1)


@pytest.mark.parametrize("truth", [0.025, 0.1, 0.5, 2.0])
def test_scale_recovers_the_kl_weight_of_simulated_labels(truth: float) -> None:
    """h of a random pair, its label drawn with P = σ(s·h): the sign of h says which answer won."""
    draw = np.random.default_rng(3)
    h = draw.normal(0, 2 / truth, 4000)
    margins = np.where(draw.random(4000) < 1 / (1 + np.exp(-truth * h)), h, -h)
    estimate = figures.scale(margins.tolist(), (np.arange(4000) // 4).tolist())
    assert estimate.value == pytest.approx(truth, rel=0.1) and estimate.low < truth < estimate.high
    assert estimate.high - estimate.low < 0.3 * truth and estimate.n == 1000
    best = optimize.minimize_scalar(
        lambda s: np.logaddexp(0, -s * margins).sum(), bounds=(0, 10 * truth), method="bounded"
    )
    assert estimate.value == pytest.approx(best.x, rel=1e-3)


def test_scale_by_hand() -> None:
    """Three of four pairs with |h| = 2 are right: σ(2s) = 3/4."""
    assert figures.scale([2, 2, 2, -2], "abcd", resamples=0).value == pytest.approx(math.log(3) / 2, abs=1e-5)
    assert figures.scale([-2, -2, -2, 2], "abcd", resamples=0).value == pytest.approx(-math.log(3) / 2, abs=1e-5)
    assert figures.scale([0.002] * 3 + [-0.002], "abcd", resamples=0).value == pytest.approx(math.log(3) / 0.002)
    # every pair right, or every pair wrong: no finite scale is best
    assert figures.scale([1, 2], "ab").value == 1000 and figures.scale([-1, -2], "ab").value == -1000


def test_scale_resamples_prompts_not_pairs() -> None:
    draw = np.random.default_rng(4)
    h = np.repeat(draw.normal(0.5, 1, 80), 16)
    clustered, alone = figures.scale(h, np.repeat(np.arange(80), 16).tolist()), figures.scale(h, range(1280))
    assert clustered.value == pytest.approx(alone.value)
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("at_least", [0.0, 0.5, 0.6, 0.9, 0.95])
@pytest.mark.parametrize("n", [1, 10, 58, 59, 83, 300])
def test_needed_is_the_fewest_that_hold_the_bound(n: int, at_least: float) -> None:
    holds = [good for good in range(n + 1) if figures.lower_bound(good, n, 0, 0.95) >= at_least]
    assert figures.needed(at_least, n, 0.95) == (holds[0] if holds else n + 1)


def test_a_bound_that_is_reached_to_the_digit_needs_no_answer_more() -> None:
    for good in (1, 7, 10):
        assert figures.needed(figures.lower_bound(good, 10, 0, 0.95), 10, 0.95) == good


def test_what_83_prompts_can_show() -> None:
    """The 83 red-team prompts of the paper's evaluation: 82 good ones do not show 0.95, 83 do; below 59 none can."""
    assert figures.lower_bound(82, 83, 0, 0.95) < 0.95 < figures.lower_bound(83, 83, 0, 0.95)
    assert figures.needed(0.95, 83, 0.95) == 83 and figures.needed(0.9, 83, 0.95) == 80
    assert figures.needed(0.95, 58, 0.95) == 59 and figures.needed(0.95, 59, 0.95) == 59
    assert figures.power(0.97, 0.95, 83, 0.95) == pytest.approx(0.97**83)


@pytest.mark.parametrize("confidence", [0.5, 0.75, 0.95, 0.995])
@pytest.mark.parametrize("at_least", [0.01, 0.5, 0.6, 0.9, 0.95])
def test_the_fewest_prompts_are_the_fewest_of_which_all_must_be_good(at_least: float, confidence: float) -> None:
    """At 0.75 two prompts show exactly 0.5."""
    n = figures.fewest_prompts(at_least, confidence)
    assert figures.lower_bound(n, n, 0, confidence) >= at_least - 1e-12
    assert n == 1 or figures.lower_bound(n - 1, n - 1, 0, confidence) < at_least - 1e-9


@pytest.mark.parametrize(("truth", "at_least", "n"), [(0.95, 0.9, 200), (0.7, 0.6, 83), (0.9, 0.9, 100)])
def test_power_is_how_often_a_policy_passes(truth: float, at_least: float, n: int) -> None:
    good = np.random.default_rng(5).binomial(n, truth, 4000)
    passed = np.mean([figures.lower_bound(int(g), n, 0, 0.95) >= at_least for g in good])
    assert figures.power(truth, at_least, n, 0.95) == pytest.approx(passed, abs=0.025)


@pytest.mark.parametrize(("truth", "at_least"), [(0.99, 0.95), (0.95, 0.9), (0.7, 0.6)])
def test_enough_prompts_are_enough_and_not_many_more(truth: float, at_least: float) -> None:
    n = figures.enough_prompts(truth, at_least, 0.95, probability=0.9)
    assert figures.power(truth, at_least, n, 0.95) >= 0.9
    assert max(figures.power(truth, at_least, m, 0.95) for m in range(1, int(0.8 * n))) < 0.9


def test_no_number_of_prompts_shows_more_than_the_truth() -> None:
    for truth in (0.9, 0.89):
        with pytest.raises(ValueError, match=rf"a true rate of {truth:g} can never show 0.9"):
            figures.enough_prompts(truth, 0.9, 0.95)


@pytest.mark.parametrize("cached", [7 * 50, 1])
def test_resamples_in_blocks_are_the_same_resamples(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).exponential(size=50)
    whole = figures.mean(values)
    drawn = values[np.random.default_rng(0).integers(50, size=(figures.RESAMPLES, 50))].mean(axis=1)
    assert (whole.low, whole.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]))
    monkeypatch.setattr(figures, "CACHED", cached)
    assert figures.mean(values) == whole
