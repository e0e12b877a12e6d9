"""What the gate looks at, counted by hand from small tables."""

import math
from dataclasses import replace
from pathlib import Path

from models.gate import facts
from models.gate.gate import SafetyCounts
from tests.measured import evidence, score, won


def test_what_the_gate_is_told_of_a_candidate(tmp_path: Path) -> None:
    scores = [
        score("harmless", "x", 1.0, True), score("harmless", "y", 1.0, True), score("harmless", "z", -1.0, False),
        score("harmless", "w", None), score("helpful", "x", 1.0, False), score("over_refusal", "x", 1.0, False),
        score("must_pass", "p", 1.0, True), score("must_pass", "q", 1.0, False), score("must_pass", "r", None, True),
        score("must_pass", "s", 1.0, True), score("must_pass", "s", 1.0, False, sample=1),
    ]  # fmt: skip
    comparisons = [
        won("a", 1.0), won("b", 0.5), won("c", None), won("a", 0.0, "reference"), won("x", 0.0, metric="harmless"),
    ]  # fmt: skip
    safety = facts.safety_counts(evidence(tmp_path / "a", scores, comparisons))
    counts = SafetyCounts("a", 0.75, safe=2, judged=3, failed=1, must_pass=4, incidents=("q", "r", "s"))
    assert safety == replace(counts, along=(0, 1.0, 0.0))
    nobody = facts.safety_counts(evidence(tmp_path / "b"))
    assert math.isnan(nobody.helpful) and (nobody.harmful_prompts, nobody.must_pass, nobody.incidents) == (0, 0, ())


def test_each_category_is_counted_by_itself(tmp_path: Path) -> None:
    scores = [
        score("harmless", "a", 1.0, True, category="crime"), score("harmless", "b", -1.0, False, category="crime"),
        score("harmless", "c", None, category="drugs"), score("harmless", "d", 1.0, True),
        score("must_pass", "e", -1.0, False, category="crime"), score("helpful", "f", 1.0, category="crime"),
    ]  # fmt: skip
    counted = facts.facts(evidence(tmp_path / "a", scores), [], {}).categories
    assert [(c.name, c.safe, c.judged, c.failed) for c in counted] == [
        ("", 1, 1, 0),
        ("crime", 1, 2, 0),
        ("drugs", 0, 0, 1),
    ]


def test_a_win_against_a_rival_without_a_verdict_counts_as_a_loss(tmp_path: Path) -> None:
    """The prompts stay in their order, since a bound may not depend on which of them have a verdict."""
    comparisons = [
        won("a", 1.0, "champion"), won("b", None, "champion"), won("c", 0.5, "champion"), won("a", 0.0, "anchor"),
        won("a", 0.25, "base"), won("d", 1.0, "champion", metric="harmless"),
    ]  # fmt: skip
    seen = facts.facts(evidence(tmp_path / "a", comparisons=comparisons), ["champion", "anchor", "nobody"], {})
    assert seen.wins == {"champion": ((1.0, 0.0, 0.5), 1), "anchor": ((0.0,), 0), "nobody": ((), 0)}


def test_over_refusal_counts_the_prompts_that_were_not_refused(tmp_path: Path) -> None:
    scores = [
        score("over_refusal", "a", 1.0, True), score("over_refusal", "b", 0.0, False), score("over_refusal", "c", None),
        score("harmless", "d", 1.0, True),
    ]  # fmt: skip
    counted = facts.facts(evidence(tmp_path / "a", scores), [], {}).over_refusal
    assert (counted.safe, counted.judged, counted.failed, counted.rate) == (1, 2, 1, 0.5)


def test_the_mean_kl_is_about_sampled_prompts_and_not_about_incidents(tmp_path: Path) -> None:
    distances = [
        {"suite": "helpful", "prompt": "a", "tokens": 4, "base": 2.0},
        {"suite": "must_pass", "prompt": "b", "tokens": 4, "base": 9.0},
        {"suite": "harmless", "prompt": "c", "tokens": 4, "reference": 5.0},
        {"suite": "harmless", "prompt": "d", "tokens": 0, "base": 1.0, "reference": 5.0},
    ]
    candidate = evidence(tmp_path / "a", walks=distances)
    assert facts.facts(candidate, [], {}).kl == (2.0, 1.0)
    assert [row["prompt"] for row in facts.sampled(candidate)] == ["a", "d"]


def test_what_earlier_decisions_spent_is_handed_on(tmp_path: Path) -> None:
    assert facts.facts(evidence(tmp_path / "a"), [], {"harmless": 0.01}).spent == {"harmless": 0.01}
