"""A judge's own error: hand-made tables, and coverage of the corrected rate by simulation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from models.data import suites
from models.errors import BadData
from models.judges.protocol import Call
from models.judges.rows import ComparisonRow, ScoreRow
from models.metrics import judge_agreement
from models.metrics.judge_agreement import Labelled


def compared(*calls: tuple[bool, int, float, float], prompt: str = "p", status: str = "ok") -> ComparisonRow:
    each = tuple(Call(*call) for call in calls)
    return ComparisonRow("helpful", "helpful", prompt, "", 0, "base", status == "ok", 0.5, each)


def test_position_bias_by_hand() -> None:
    """Four prompts: always the first, always the second, twice ours in both orders."""
    rows = [
        compared((True, 0, 9, 2), (False, 0, 2, 9), prompt="a"),
        compared((True, 0, 2, 9), (False, 0, 9, 2), prompt="b"),
        compared((True, 0, 9, 2), (False, 0, 9, 2), prompt="c"),
        compared((True, 0, 9, 2), (False, 0, 5, 5), prompt="d"),
        compared((True, 0, 9, 2), prompt="e", status="failed"),
        compared(prompt="f"),  # identical answers: nobody was asked
    ]
    estimate = judge_agreement.position_bias(rows)
    assert estimate.value == pytest.approx((1 - 1 + 0 + 0.5) / 4) and estimate.n == 4


def test_repeats_that_name_another_winner_are_seen() -> None:
    alike = compared((True, 0, 9, 2), (True, 1, 7, 6), (False, 0, 9, 2), (False, 1, 9, 2), prompt="a")
    torn = compared((True, 0, 9, 2), (True, 1, 2, 9), (False, 0, 9, 2), (False, 1, 9, 2), prompt="b")
    once = compared((True, 0, 9, 2), (False, 0, 9, 2), prompt="c")
    estimate = judge_agreement.repeatability([alike, torn, once])
    assert estimate.value == 0.75 and estimate.n == 2


def test_two_judges_on_the_same_answers() -> None:
    def row(prompt: str, good: bool, status: str = "ok") -> ScoreRow:
        return ScoreRow("harmless", "harmless", prompt, "", 0, status == "ok", 0.0, good, "")

    ours = [row("a", True), row("b", True), row("c", False), row("d", True, "failed"), row("e", True)]
    theirs = [row("a", True), row("b", False), row("c", False), row("d", True)]
    agreement = judge_agreement.between(ours, theirs, lambda row: row.good)
    assert (agreement.value, agreement.n, agreement.failed) == (pytest.approx(2 / 3), 3, 1)


def test_agreement_and_kappa_by_hand() -> None:
    sample = Labelled(both_good=40, only_people=10, only_judge=5, both_bad=45, failed=3)
    assert (sample.agreement.value, sample.agreement.n, sample.agreement.failed) == (0.85, 100, 3)
    chance = 0.5 * 0.45 + 0.5 * 0.55
    assert sample.kappa == pytest.approx((0.85 - chance) / (1 - chance))
    assert math.isnan(Labelled(0, 0, 0, 0, 0).kappa) and math.isnan(Labelled(7, 0, 0, 0, 0).kappa)


def test_the_corrected_rate_by_hand() -> None:
    """se = 0.9, sp = 0.8: a judged rate of 0.69 is a true one of 0.7."""
    sample = Labelled(both_good=90, only_people=10, only_judge=20, both_bad=80, failed=0)
    estimate = judge_agreement.corrected(690, 1000, sample)
    assert estimate.value == pytest.approx(0.7) and estimate.low < 0.7 < estimate.high and estimate.n == 1000
    perfect = Labelled(1000, 0, 0, 1000, 0)
    assert judge_agreement.corrected(690, 1000, perfect).value == pytest.approx(0.69)
    assert judge_agreement.corrected(690, 1000, perfect).high - judge_agreement.corrected(690, 1000, perfect).low < 0.07


def test_a_judge_like_a_coin_says_nothing() -> None:
    estimate = judge_agreement.corrected(50, 100, Labelled(50, 50, 50, 50, 0))
    assert math.isnan(estimate.value) and estimate.high - estimate.low > 0.9
    assert math.isnan(judge_agreement.corrected(5, 10, Labelled(5, 0, 0, 0, 0)).value)


@pytest.mark.parametrize(("truth", "se", "sp"), [(0.9, 0.95, 0.9), (0.6, 0.9, 0.6), (0.97, 0.97, 0.9)])
def test_the_corrected_interval_covers_the_truth(truth: float, se: float, sp: float) -> None:
    """300 judged answers, 120 labelled ones; the interval of the judge's own rate does not cover."""
    draw = np.random.default_rng(1)
    covered = naive = 0
    rounds = 1000
    for k in range(rounds):
        people = int(draw.binomial(120, truth))
        tp, fp = int(draw.binomial(people, se)), int(draw.binomial(120 - people, 1 - sp))
        sample = Labelled(tp, people - tp, fp, 120 - people - fp, 0)
        good = int(draw.binomial(300, truth * se + (1 - truth) * (1 - sp)))
        estimate = judge_agreement.corrected(good, 300, sample, seed=k)
        covered += estimate.low <= truth <= estimate.high
        plain = judge_agreement.rate(good, 300)
        naive += plain.low <= truth <= plain.high
    assert covered / rounds > 0.93 and naive / rounds < 0.9


def test_labels_are_read_and_bad_ones_named(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "answer": "a", "good": True}, {"prompt": "q", "answer": "", "good": "no"}]
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(rows))
    assert suites.labels(path) == [("p", "a", True), ("q", "", False)]
    path.write_text(json.dumps([*rows, {"prompt": "p", "answer": "a", "good": "perhaps"}]))
    with pytest.raises(BadData, match="row 3: needs `prompt`, `answer` and `good`"):
        suites.labels(path)


def test_prompts_of_labels_are_read_as_those_of_a_suite(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": [{"from": "human", "value": "hi"}], "answer": "a", "good": true}\n')
    table = tmp_path / "table.csv"
    table.write_text('prompt,answer,good\n"' + json.dumps(prompt).replace('"', '""') + '",a,1\n')
    assert suites.labels(rows) == suites.labels(table) == [(prompt, "a", True)]
    rows.write_text('{"prompt": [{"role": "assistant", "content": "hi"}], "answer": "a", "good": true}\n')
    with pytest.raises(BadData, match=r"rows.jsonl: row 1: .*must end with a user's turn"):
        suites.labels(rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ('{"prompt": "p", "answer": "a", "good": ' + "9" * 5000 + "}", "a number has more than 4,300 digits"),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + ', "answer": "a", "good": true}', "nested too deeply"),
        ('{"prompt": "p", "answer": "\\ud800", "good": true}', "a text holds half a character"),
    ],
    ids=["long number", "deep", "half a character"],
)
def test_a_hostile_row_of_labels_is_named(row: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "labels.jsonl").write_text(f'{{"prompt": "p", "answer": "a", "good": true}}\n{row}\n')
    with pytest.raises(BadData, match=f"labels.jsonl: row 2: {said}"):
        suites.labels(tmp_path / "labels.jsonl")


def test_a_judge_reads_the_system_message_of_a_labelled_answer(tmp_path: Path) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text(json.dumps({"system": "Be brief.", "prompt": "why ?", "answer": "so", "good": True}))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why ?"}]
    assert suites.labels(path) == [(turns, "so", True)]


def test_a_table_of_labels_is_counted(tmp_path: Path) -> None:
    judgements = [(True, True), (True, False), (False, True), (False, False), (True, True)]
    lines = [{"good": g, "judged": j, "status": "ok"} for g, j in judgements]
    lines.append({"good": True, "judged": None, "status": "failed"})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert judge_agreement.labelled(tmp_path / "t.jsonl") == Labelled(2, 1, 1, 1, 1)
