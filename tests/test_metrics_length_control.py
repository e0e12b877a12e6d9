"""The win rate at equal length: simulations in which the truth is known, and how it is printed."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, special, stats

from models.metrics import reported
from models.metrics.length_control import LEANS, SLOPE, LengthControlled, Normal, length_controlled
from models.metrics.statistics import Estimate
from models.report import model_card, page, summary
from tasks.tracking import log

ROOT = Path(__file__).parent.parent
SHARED = (
    "length_control.py",
    "reported.py",
    "figures.py",
    "summary.py",
    "tree.py",
    "page.py",
    "model_card.py",
    "log.py",
)
Played = tuple[list[float], list[tuple[float, float]]]


def played(truth: float, n: int, slope: float, shift: float, seed: int) -> Played:
    """Wins that follow the model, our answers `shift` standard deviations longer than theirs."""
    draw = np.random.default_rng(seed)
    gap = 200 * draw.normal(shift, 1, n)
    logit = math.log(truth / (1 - truth)) + slope * np.tanh(gap / gap.std())
    won = (draw.random(n) < 1 / (1 + np.exp(-logit))).astype(float)
    return won.tolist(), [(1000 + g, 1000.0) for g in gap]


def test_where_lengths_hardly_overlap_equal_length_is_not_extrapolated_along_a_slope_without_a_prior() -> None:
    """Candidates whose answers are nearly always shorter, of known quality at equal length."""
    truths = np.linspace(0.1, 0.6, 24)
    found = [length_controlled(*played(t, 400, SLOPE.mean, -1.6, seed)) for seed, t in enumerate(truths)]
    raw = [np.mean(played(t, 400, SLOPE.mean, -1.6, seed)[0]) for seed, t in enumerate(truths)]
    values = np.array([figure.value for figure in found])
    assert all(figure.leans and 0.02 < figure.overlap < 0.1 for figure in found)
    assert np.abs(values - truths).mean() < 0.03 < np.abs(raw - truths).mean()
    assert stats.spearmanr(values, truths).statistic >= stats.spearmanr(raw, truths).statistic
    assert np.mean([figure.low <= t <= figure.high for figure, t in zip(found, truths, strict=True)]) >= 0.9


@pytest.mark.parametrize("slope", [-0.5, 2.5])
def test_where_lengths_overlap_the_data_decide_the_slope(slope: float) -> None:
    """Another judge, with a slope far from AlpacaEval's, is not pulled there."""
    found = [length_controlled(*played(0.5, 800, slope, -0.7, seed)) for seed in range(12)]
    assert all(0.15 < figure.overlap < 0.3 and not figure.leans for figure in found)
    assert np.mean([figure.value for figure in found]) == pytest.approx(0.5, abs=0.02)


def test_the_width_of_the_prior_is_part_of_the_interval() -> None:
    """With any number of prompts: where all differ alike in length, the slope is known from the prior alone."""
    n, x = 6000, math.tanh(-8)
    lengths = [(100.0, 180 + 20 * (i % 2)) for i in range(n)]
    won = [float(i % 10 == 0) for i in range(n)]
    figure = length_controlled(won, lengths)
    a = math.log(0.1 / 0.9) - SLOPE.mean * x
    ends = [1 / (1 + math.exp(-(a + z * SLOPE.sd))) for z in (-1.96, 0, 1.96)]
    assert figure.value == pytest.approx(ends[1], abs=1e-3)
    assert figure.high - figure.low == pytest.approx(ends[2] - ends[0], rel=0.2)


def test_the_fit_agrees_with_scipy_where_the_prior_holds() -> None:
    won, lengths = played(0.3, 90, 1.4, -1.8, 3)
    gap = np.array([a - b for a, b in lengths])
    x = np.tanh(gap / gap.std())

    def loss(b: np.ndarray) -> float:
        logit = b[0] + b[1] * x
        fit = np.sum(np.logaddexp(0, logit) - won * logit)
        return float(fit + 0.05 * b[0] ** 2 + (b[1] - 1.2) ** 2 / (2 * 0.3**2))

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12).x[0]
    figure = length_controlled(won, lengths, slope=Normal(1.2, 0.3))
    assert figure.leans and figure.value == pytest.approx(1 / (1 + np.exp(-best)), abs=1e-5)


@pytest.mark.parametrize(
    ("lengths", "overlap"),
    [
        ([(1, 2)] * 9 + [(2, 1)], 0.1),
        ([(2, 1)] * 9 + [(1, 2)], 0.1),
        ([(1, 2)] * 17 + [(2, 1)] * 3, 0.15),  # by hand: not below the limit
        ([(1, 2)] * 5 + [(7, 7)] * 5, 0.25),
        ([(7, 7)] * 4, 0.5),
        ([(1, 2)], 0.0),
    ],
)
def test_the_overlap_by_hand(lengths: list[tuple[float, float]], overlap: float) -> None:
    figure = length_controlled([1.0] * len(lengths), lengths)
    assert figure.overlap == pytest.approx(overlap) and figure.leans == (overlap < 0.149)
    assert (LEANS in figure.method) == figure.leans


def test_a_long_table_is_fitted_in_parts_as_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    won, lengths = played(0.3, 200, 1.0, -0.3, 0)
    whole = length_controlled(won, lengths)
    for cached in (1, 600):  # fits one by one, and in twos or threes
        monkeypatch.setattr("models.metrics.length_control.CACHED", cached)
        assert asdict(length_controlled(won, lengths)) == pytest.approx(asdict(whole))


def test_another_unit_of_length_gives_the_same_figure() -> None:
    won, lengths = played(0.3, 60, 1.0, -0.3, 0)
    thousands = [(ours / 1000, theirs / 1000) for ours, theirs in lengths]
    assert asdict(length_controlled(won, thousands)) == pytest.approx(asdict(length_controlled(won, lengths)))


def test_nothing_compared_is_no_figure() -> None:
    assert length_controlled([], []).n == 0


def candidate(leans: bool) -> dict[str, Any]:
    figure = LengthControlled(0.4321, 0.4, 0.5, 80, 0, "fit", 0.06 if leans else 0.3, leans)
    metrics = {reported.EQUAL_LENGTH: asdict(figure), "length": asdict(Estimate(12, 11, 13, 80, 0, "mean"))}
    return {"name": "helpful", "metrics": metrics}


@pytest.mark.parametrize(
    ("leans", "words"), [(True, "overlap 0.06, leans on AlpacaEval's slope"), (False, "overlap 0.30")]
)
def test_the_figure_is_never_printed_without_its_overlap(leans: bool, words: str) -> None:
    one = candidate(leans)
    tree = {"candidates": [one], "chosen": None}
    assert summary.equal_length(tree)[1:] == [["helpful", "0.432 [0.400, 0.500]", words]]
    (row,) = page._figures(tree, page.MAIN).rows
    assert words.replace("'", "&#39;") in row.cells[1] and "0.432" in row.cells[1]
    assert model_card._figure(one["metrics"][reported.EQUAL_LENGTH])[-1] == words
    assert model_card._figure(one["metrics"]["length"])[-1] == ""


@pytest.mark.parametrize("leans", [True, False])
def test_mlflow_which_orders_by_figures_gets_none_that_leans(leans: bool) -> None:
    headline = log.headline({"chosen": {"candidate": "helpful"}, "candidates": [candidate(leans) | {
        "lambda": 1, "beta_over_lambda": 0.1, "merge_weight": None}], "constraints": []})  # fmt: skip
    assert ("chosen/helpful/win_rate_equal_length" in headline) is not leans
    assert headline["chosen/helpful/win_rate_equal_length_overlap"] == (0.06 if leans else 0.3)
    assert headline["chosen/length"] == 12


def test_only_what_prints_knows_the_figure() -> None:
    """Nothing that chooses, orders or gates reads it."""
    for path in [path for storey in ("models", "tasks", "flows") for path in (ROOT / storey).rglob("*.py")]:
        text = path.read_text()
        assert path.name in SHARED or not any(
            word in text for word in ("equal_length", "EQUAL_LENGTH", "length_controlled")
        ), path


@pytest.mark.parametrize("missing", ["overlap", "leans"])
def test_the_schema_asks_for_the_overlap(missing: str) -> None:
    import jsonschema

    schema = json.loads((ROOT / "models" / "report" / "report.schema.json").read_text())
    metrics = schema["$defs"]["CandidateEntry"]["properties"]["metrics"] | {"$defs": schema["$defs"]}
    figures = candidate(True)["metrics"]
    jsonschema.validate(figures, metrics)
    del figures[reported.EQUAL_LENGTH][missing]
    with pytest.raises(jsonschema.ValidationError, match=missing):
        jsonschema.validate(figures, metrics)


@pytest.mark.parametrize("shift", [0.0, 40.0], ids=["the data decide", "the prior decides"])
def test_the_interval_agrees_with_scipy(shift: float) -> None:
    """Prompts are drawn with one of equal length, lost for the lower end, won for the upper; every fit is scipy's."""
    draw = np.random.default_rng(11)
    n, gap = 20, draw.normal(shift, 12, 20)
    won = draw.choice([0, 0.5, 1], n)
    x = np.append(np.tanh(gap / gap.std()), 0.0)
    figure = length_controlled(won.tolist(), [(100 + g, 100.0) for g in gap])
    assert figure.leans is (shift > 0)
    rng, prior = np.random.default_rng(0), SLOPE if figure.leans else Normal(0.0, 10**0.5)
    drawn = rng.multinomial(n + 1, [1 / (n + 1)] * (n + 1), 200)
    means = rng.normal(*SLOPE, 200) if figure.leans else np.zeros(200)

    def intercept(wins: np.ndarray, weights: np.ndarray, mean: float) -> float:
        def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
            logit, off = b[0] + b[1] * x, np.array([0.1 * b[0], (b[1] - mean) / prior.sd**2])
            value = weights @ (np.logaddexp(0, logit) - wins * logit) + 0.05 * b[0] ** 2 + off[1] * (b[1] - mean) / 2
            slack = weights * (special.expit(logit) - wins)
            return float(value), np.array([slack.sum(), slack @ x]) + off

        return float(optimize.minimize(loss, np.zeros(2), jac=True, tol=1e-9).x[0])

    for end, level, found in ((0.0, 0.025, figure.low), (1.0, 0.975, figure.high)):
        fits = [intercept(np.append(won, end), weights, mean) for weights, mean in zip(drawn, means, strict=True)]
        assert found == pytest.approx(np.quantile(special.expit(fits), level), abs=1e-6)
