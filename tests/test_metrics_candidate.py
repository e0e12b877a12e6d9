"""Candidates are shown once, under names that tell them apart, and read their tables once."""

from dataclasses import replace
from pathlib import Path

from models.artifacts import Policy
from models.files import jsonl
from models.metrics.candidate import Candidate, unique_candidates, uniquely_named
from tests.measured import evidence, score, won


def policy(digest: str, name: str, kind: str = "step", parents: tuple[str, ...] = ()) -> Policy:
    return Policy(path=Path(), digest=digest, name=name, kind=kind, parents=parents)


def candidates(*policies: Policy) -> list[Candidate]:
    return [Candidate(policy, *[None] * 4) for policy in policies]  # type: ignore[arg-type]


def names(shown: list[Candidate]) -> list[str]:
    return [candidate.policy.name for candidate in shown]


def test_a_policy_that_comes_twice_is_shown_once_under_its_first_name() -> None:
    """A step with λ = 0 hands its reference on, under the same name; one that moved nothing has another name."""
    base = policy("a", "base", "base")
    shown, sentences = unique_candidates(candidates(base, base, policy("a", "harmless λ=1"), policy("b", "helpful")))
    assert names(shown) == ["base", "helpful"]
    assert sentences == ["harmless λ=1 has the weights of base: it is shown once, under that name"]


def test_policies_with_one_name_say_which_parent_they_come_from() -> None:
    """A step says against whom it was trained, a merge into which reward policy it was mixed."""
    shown, sentences = unique_candidates(
        candidates(
            policy("a", "base", "base"), policy("b", "helpful λ=1", parents=("a",)),
            policy("c", "helpful λ=2", parents=("a",)), policy("d", "harmless λ=1", parents=("b",)),
            policy("e", "harmless λ=1", parents=("c",)), policy("f", "merge q=0.5", "merge", ("d", "b")),
            policy("g", "merge q=0.5", "merge", ("e", "0123456789abcdef")),
        )
    )  # fmt: skip
    assert names(shown) == [
        "base", "helpful λ=1", "helpful λ=2", "harmless λ=1 from helpful λ=1", "harmless λ=1 from helpful λ=2",
        "merge q=0.5 from helpful λ=1", "merge q=0.5 from 0123456789ab",
    ]  # fmt: skip
    assert sentences == []


def test_policies_whose_parents_share_a_name_too_are_told_apart_by_their_weights() -> None:
    """Three steps with λ = 0 in the first: two third policies have equal names, and so have their parents."""
    shown, _ = unique_candidates(
        candidates(
            policy("a", "base", "base"), policy("b", "harmless λ=2", parents=("a",)),
            policy("c", "harmless λ=2", parents=("x",)), policy("0123456789", "honest λ=1", parents=("b",)),
            policy("abcdefghij", "honest λ=1", parents=("c",)),
        )
    )  # fmt: skip
    assert names(shown)[3:] == ["honest λ=1 from harmless λ=2 01234567", "honest λ=1 from harmless λ=2 abcdefgh"]
    assert len({*names(shown)}) == 5


def test_policies_of_one_name_from_two_places_are_named_by_their_places() -> None:
    places = ["runs/a", "runs/b", "hub/x", "hub/x"]
    named, sentences = uniquely_named(
        places, [policy("a", "mine"), policy("b", "mine"), policy("c", "x"), policy("c", "x")]
    )
    assert [one.name for one in named] == ["runs/a", "runs/b", "x"]
    assert sentences == ["hub/x is the same policy as hub/x: judged once"]


def test_where_the_place_tells_nothing_either_the_digest_does() -> None:
    """The file of a place may change between two looks at it."""
    named, _ = uniquely_named(["runs/a", "runs/a"], [policy("0123456789", "mine"), policy("abcdefghij", "mine")])
    assert [one.name for one in named] == ["mine 01234567", "mine abcdefgh"]


def test_each_table_is_read_once(tmp_path: Path) -> None:
    candidate = evidence(tmp_path / "a", [score("harmless", "x", 1.0, True)], [won("x", 0.5)])
    before = candidate.score_rows, candidate.comparison_rows, candidate.distance_rows, candidate.margin_rows
    for name in ("scores", "comparisons", "kl", "margins"):
        (tmp_path / "a" / f"{name}.jsonl").unlink()
    assert candidate.scored("harmless", "harmless") == [*before[0]] and candidate.scored("harmless", "must_pass") == []
    assert candidate.compared("helpful", "base") == [*before[1]] and candidate.compared("helpful", "champion") == []
    assert (candidate.distance_rows, candidate.margin_rows) == before[2:]


def test_a_prompt_is_what_it_was_before_it_became_a_key(tmp_path: Path) -> None:
    dialogue = [{"role": "user", "content": "how ?"}]
    candidate = evidence(
        tmp_path / "a", [score("harmless", "plain", 1.0), score("harmless", "", 1.0) | {"prompt": dialogue}]
    )
    assert [row.prompt for row in candidate.score_rows] == ["plain", dialogue]


def test_under_another_name_a_candidate_keeps_its_rows(tmp_path: Path) -> None:
    candidate = evidence(tmp_path / "a", [score("harmless", "x", 1.0, True)])
    other = replace(candidate, policy=replace(candidate.policy, name="another"))
    assert other.score_rows == candidate.score_rows and other.policy.name == "another"
    assert [row["metric"] for row in jsonl.read(candidate.scores.path / "scores.jsonl")] == ["harmless"]
