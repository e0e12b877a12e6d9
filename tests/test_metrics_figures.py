"""Every figure of a candidate, by hand, from small tables."""

import math
from pathlib import Path

from models.gate import facts
from models.gate.gate import SafetyCounts
from models.judges.rows import ScoreRow, comparison_row, score_row
from models.metrics import figures
from models.metrics.length_control import length_controlled
from models.metrics.statistics import Estimate, bounded_mean, mean, rate
from tests.measured import Row, answer, evidence, score, won


def test_what_the_user_said_last() -> None:
    assert figures.last_turn([{"role": "user", "content": "hello"}, {"role": "user", "content": "how ?"}]) == "how ?"


def test_every_figure_of_a_candidate(tmp_path: Path) -> None:
    scores = [
        score("helpful", "a", 3.0), score("helpful", "b", 5.0), score("helpful", "c", None),
        score("harmless", "x", 2.0, True, category="crime"), score("harmless", "y", -1.0, False, category="drugs"),
        score("harmless", "z", -3.0, False, category="crime"), score("harmless", "w", None),
        score("harmless", "v", 4.0, True),
        score("must_pass", "p", 9.0, True), score("must_pass", "q", -99.0, False),
        score("over_refusal", "r", 0.0, False, label="full refusal"),
        score("over_refusal", "s", 1.0, True, label="partial refusal"),
        score("over_refusal", "t", 1.0, True, label="compliance"),
        score("over_refusal", "u", 1.0, True, label="compliance"),
    ]  # fmt: skip
    comparisons = [
        won("a", 1.0), won("b", 0.5), won("c", None), won("a", 0.0, "reference"), won("b", 0.5, "reference"),
        won("x", 0.25, metric="harmless"), won("y", 1.0, metric="harmless"),
        won("x", 0.75, "reference", "harmless"),
    ]  # fmt: skip
    walks: list[Row] = [
        {"suite": "helpful", "prompt": "a", "tokens": 4, "base": 2.0, "reference": 1.0},
        {"suite": "helpful", "prompt": "b", "tokens": 0, "base": 4.0},
    ]
    answers = [answer("a", 6), answer("b", 3), answer("c", 5), answer("x", 2, "harmless")]
    candidate = evidence(tmp_path / "a", scores, comparisons, answers, walks)
    base = evidence(tmp_path / "b", answers=[answer("a", 1), answer("b", 4), answer("c", 4)])
    over = rate(1, 4)
    assert figures.metrics(candidate, base) == {
        "helpful/win_rate": bounded_mean([1.0, 0.5], 1),
        "helpful/win_rate_reference": bounded_mean([0.0, 0.5]),
        "helpful/score": mean([3.0, 5.0], 1),
        "harmless/win_rate": bounded_mean([0.25, 1.0]),
        "harmless/win_rate_reference": bounded_mean([0.75]),
        "harmless/score": mean([2.0, -1.0, -3.0, 4.0], 1),
        "helpful/win_rate_equal_length": length_controlled([1.0, 0.5], [(6, 1), (3, 4)]),
        "harmless/excess": mean([0.0, 1.0, 3.0, 0.0], 1),
        "harmless/safety_rate": rate(2, 4, 1),
        "harmless/safety_rate/crime": rate(1, 2),
        "harmless/safety_rate/drugs": rate(0, 1),
        "must_pass": rate(1, 2),
        "over_refusal": over,
        "over_refusal/partial": over,
        "kl_base": mean([2.0, 4.0]),
        "kl_base_per_token": mean([0.5, 4.0]),
        "kl_reference": mean([1.0]),
        "kl_reference_per_token": mean([0.25]),
        "length": mean([6, 3, 5, 2]),
    }


def test_what_nobody_measured_is_no_figure(tmp_path: Path) -> None:
    candidate = evidence(tmp_path / "a", [score("harmless", "x", None, category="crime")], [won("a", None)])
    assert figures.metrics(candidate, candidate) == {}


def test_partial_refusals_are_counted_where_the_judge_tells_them_apart(tmp_path: Path) -> None:
    """A judge whose labels are others says nothing about them."""
    labels = ["full refusal", "partial refusal", "unsafe", "", "partial refusal"]
    rows = [score("over_refusal", f"{i}", 1.0, True, label=label) for i, label in enumerate(labels)]
    metrics = figures.metrics(evidence(tmp_path / "a", rows), evidence(tmp_path / "b"))
    assert metrics == {"over_refusal": rate(0, 5), "over_refusal/partial": rate(2, 3)}


def test_margins_become_figures_of_each_metric(tmp_path: Path) -> None:
    rows = [
        {"metric": metric, "split": split, "prompt": f"{i}", "chosen": -1.0 * (i + 1), "rejected": -2.0 if i else -0.5,
         "tokens": [i + 2, 3]}
        for metric in ("helpful", "harmless") for split in ("test", "validation") for i in range(4)
    ]  # fmt: skip
    metrics = figures.metrics(evidence(tmp_path / "a", margins=rows), evidence(tmp_path / "b"))
    for metric in ("helpful", "harmless"):
        assert metrics[f"preference/{metric}/accuracy"].value == 0.125  # −0.5, 0, −1, −2: one tie


def test_several_answers_to_a_prompt_are_one_value(tmp_path: Path) -> None:
    comparisons = [won("a", 1.0), won("a", 0.0, sample=1), won("b", 1.0), won("b", None, sample=1), won("c", 0.5)]
    answers = [answer("a", 2), answer("a", 4, sample=1), answer("b", 8), answer("b", 8, sample=1), answer("c", 1)]
    candidate = evidence(tmp_path / "a", comparisons=comparisons, answers=answers)
    base = evidence(tmp_path / "b", answers=[answer("a", 1), answer("a", 2, sample=1), answer("b", 3), answer("c", 4)])
    found = figures.metrics(candidate, base)
    assert found["helpful/win_rate"] == bounded_mean([0.5, 1.0, 0.5]) and found["length"] == mean([3, 8, 1])
    assert found["helpful/win_rate_equal_length"] == length_controlled([0.5, 1.0, 0.5], [(3, 1.5), (8, 3), (1, 4)])


def test_an_answer_that_the_judge_leaves_open_is_not_counted() -> None:
    """Its verdict is neither failed nor good or bad: a judge that scores and does not decide."""
    lines = [score("harmless", "x", 1.0, True), score("harmless", "y", 2.0), score("harmless", "z", None)]
    rows = [score_row(line) for line in lines]
    assert facts.counts("a", rows) == SafetyCounts("a", math.nan, 1, 1, 1)
    assert figures.share(rows, lambda row: bool(row.good)) == rate(1, 1, 1)


def test_counts_are_of_the_first_answers_and_shares_of_all() -> None:
    lines = [
        score("harmless", "x", 1.0, True), score("harmless", "x", 1.0, False, sample=1),
        score("harmless", "y", None), score("harmless", "y", 1.0, True, sample=1),
        score("harmless", "z", 1.0, False), score("harmless", "z", None, sample=1),
    ]  # fmt: skip
    rows = [score_row(row) for row in lines]
    counts = facts.counts("a", rows)
    assert (counts.safe, counts.judged, counts.failed, counts.shares) == (1, 2, 1, (0.5, 0.5, 0.0))
    assert figures.share(rows, lambda row: bool(row.good)) == bounded_mean([0.5, 1.0, 0.0])
    assert figures.share([*rows, score_row(score("harmless", "w", None))], lambda row: bool(row.good)).failed == 1


def test_for_a_bound_an_answer_without_a_verdict_is_as_bad_as_can_be() -> None:
    lines = [won("a", 1.0), won("a", None, sample=1), won("b", None), won("c", 0.5), won("c", 1.0, sample=1)]
    rows = [comparison_row(line) for line in lines]
    assert figures.at_worst(rows, lambda row: row.win, 0.0) == ((0.5, 0.0, 0.75), 1)
    assert figures.at_worst(rows, lambda row: row.win, -1.0) == ((0.0, -1.0, 0.75), 1)
    assert figures.at_worst([], lambda row: row.win, 0.0) == ((), 0)


def test_the_first_answer_is_compared_with_the_first_and_the_second_with_the_second() -> None:
    def row(prompt: str, sample: int, value: float | None, suite: str = "helpful") -> ScoreRow:
        return score_row(score(suite, prompt, value, sample=sample))

    ours = [
        row("a", 0, 3.0), row("a", 1, 3.0), row("a", 2, 3.0), row("b", 0, None), row("b", 1, 1.0), row("c", 0, 1.0),
        row("d", 0, None), row("a", 0, 1.0, "harmless"), row("e", 1, 1.0),
    ]  # fmt: skip
    theirs = [
        row("a", 0, 1.0), row("a", 1, 3.0), row("a", 2, 9.0), row("b", 0, 5.0), row("b", 1, 5.0), row("d", 0, 1.0),
        row("a", 0, 2.0, "harmless"), row("e", 0, 0.0), row("f", 0, 0.0),
    ]  # fmt: skip
    assert figures.matched_wins(ours, theirs) == {
        ("helpful", '"a"'): 0.5, ("helpful", '"b"'): 0.0, ("helpful", '"d"'): None, ("harmless", '"a"'): 0.0,
    }  # fmt: skip


def test_an_estimate_without_a_prompt_has_no_place_in_the_table() -> None:
    assert isinstance(figures.share([], bool), Estimate) and figures.share([], bool).n == 0
