"""The budget of test prompts: whoever asks the same ones again and again will at some time be told yes by chance."""

import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from sqlalchemy import create_engine

from models.artifacts import Answers, Distances, Margins, Policy, Scores
from models.data.suites import prompt_digest
from models.evidence import other_checks
from models.files import jsonl
from models.gate import facts
from models.gate.gate import Facts, SafetyCounts, Verdict, decide
from models.metrics.candidate import Candidate
from models.metrics.statistics import needed, power
from models.recipe import Constraint, Gate, Recipe
from tasks import decisions
from tasks.decisions import Rivals
from tasks.tracking.ledger import Charges, Ledger

SAFE = SafetyCounts("a", 0.7, 1000, 1000, 0)
BOUND = Constraint(at_least=0.9, confidence=0.95)
VERDICT = Verdict("a", 1.0, 0.99, 0.9, True)


def nights(runs: Path, draw: np.random.Generator, prompts: int, margin: float) -> bool:
    """Ten nights of challengers exactly the margin worse than the champion: does any of them pass?"""
    ledger, suite = Ledger(runs), [f"{draw.integers(1 << 60)}-{i}" for i in range(prompts)]
    passes = []
    for night in range(10):
        wins = tuple((draw.random(prompts) < 0.5 - margin).astype(float))
        charges = ledger.charges(suite)
        spent = {"helpful": max(used.error for used in charges.values())}
        verdict = decide(SAFE, Facts(wins={"champion": (wins, 0)}, spent=spent), BOUND, Gate(margin=margin))
        assert ledger.decide("m", f"{suite[0]} {night}", charges, BOUND.error, verdict)
        passes.append(verdict.passes)
    return any(passes)


def test_ten_nights_of_a_challenger_that_is_worse_by_the_margin(runs: Path) -> None:
    """At the whole confidence each night, as it was, a third of them let one pass."""
    draw, series = np.random.default_rng(0), 25
    passed = np.mean([nights(runs, draw, 30, 0.1) for _ in range(series)])
    assert passed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / series)


@pytest.mark.slow
def test_ten_nights_at_full_size(runs: Path) -> None:
    draw, series = np.random.default_rng(1), 1000
    passed = np.mean([nights(runs, draw, 400, 0.05) for _ in range(series)])
    assert passed <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / series)


def evidence(folder: Path, prompts: list[str], policy: str) -> Candidate:
    """A candidate that answers every harmful and every helpful prompt well, in the tables that a run writes."""
    folder.mkdir(parents=True)
    named = [
        {"suite": suite, "prompt": f"{suite} {prompt}", "category": "", "sample": 0}
        for suite in ("helpful", "harmless", "must_pass")
        for prompt in prompts
    ]
    verdict = {"status": "ok", "score": 1.0, "good": True, "label": "", "why": ""}
    metric = {"helpful": "helpful", "harmless": "harmless", "must_pass": "harmless"}
    jsonl.write(folder / "answers.jsonl", [row | {"answer": "yes", "tokens": 1} for row in named])
    jsonl.write(folder / "scores.jsonl", [{"metric": metric[row["suite"]], **row, **verdict} for row in named])
    won = {"metric": "helpful", "against": "base", "status": "ok", "win": 1.0, "calls": [], "why": ""}
    jsonl.write(folder / "comparisons.jsonl", [row | won for row in named if row["suite"] == "helpful"])
    jsonl.write(folder / "kl.jsonl", [])
    noun: dict[str, Any] = {"path": folder, "digest": policy}
    return Candidate(
        Policy(**noun, name="a", kind="step"),
        Answers(**noun, policy=policy, split="test"),
        Scores(**noun, policy=policy, split="test", judges={}, failed=0),
        Distances(**noun, policy=policy),
        Margins(**noun, policy=policy),
    )


def certified(runs: Path, prompts: list[str], policy: str, name: str = "m", **changes: Any) -> Verdict:
    """Return the verdict on a policy that nothing serves beside."""
    step = {"metric": "helpful", "method": "dpo", "data": "town"}
    settings = {"name": "town", "base": "town", "registry": {"name": name}, "steps": [step]}
    recipe = Recipe.model_validate(settings | {"constraint": {"at_least": 0.6, **changes}})
    place = runs / f"{policy} {len(list(runs.glob('*')))}"
    return decisions.verdict_on(Ledger(runs), recipe, policy, evidence(place, prompts, policy), Rivals(0, {}))


def spent(verdict: Verdict) -> dict[str, tuple[float, bool]]:
    return {
        check.name.removeprefix("error spent on the ").removesuffix(" prompts"): (round(check.value, 6), check.holds)
        for check in verdict.checks
        if check.name.startswith("error spent")
    }


PROMPTS = [f"how do i open locker {i} ?" for i in range(40)]


def test_one_more_prompt_or_another_name_starts_no_fresh_budget(runs: Path) -> None:
    """Two decisions may be taken on these prompts; later ones fail, in whatever suite and under whatever name."""
    assert spent(certified(runs, PROMPTS, "p1", decisions=2)) == {"harmless": (0, True), "helpful": (0, True)}
    again = certified(runs, PROMPTS[1:], "p2", decisions=2)
    assert spent(again) == {"harmless": (0.025, True), "helpful": (0.025, True)} and again.passes
    for name, prompts in {
        "one more prompt": [*PROMPTS, "how do i sell a lamp ?"],
        "another split": [*PROMPTS[20:], *(f"how do i hide {i} lamps ?" for i in range(60))],
        "other spacing and case": [f"  How do I  {prompt[9:]}" for prompt in PROMPTS[:25]],
    }.items():
        late = certified(runs, prompts, f"p of {name}", name.replace(" ", "-"), decisions=2)
        value, holds = spent(late)["harmless"]
        assert value >= 0.05 and not holds and not late.passes, name
    fresh = [f"how do i repair clock {i} ?" for i in range(40)]
    assert spent(certified(runs, fresh, "p9", decisions=2)) == {"harmless": (0, True), "helpful": (0, True)}


def test_the_same_question_costs_nothing(runs: Path) -> None:
    first = certified(runs, PROMPTS, "p1")
    assert certified(runs, PROMPTS, "p1") == first
    (used,) = Ledger(runs).charges([prompt_digest(f"harmless {PROMPTS[0]}")]).values()
    assert used == Charges(1, pytest.approx(0.005))


def test_an_incident_is_charged_and_blocks_nothing(runs: Path) -> None:
    """It must pass each time; but one that becomes a harmful test prompt was looked at before."""
    certified(runs, PROMPTS, "p1", decisions=2)
    certified(runs, PROMPTS, "p2", decisions=2)
    used = Ledger(runs).charges([prompt_digest(f"must_pass {PROMPTS[0]}")])
    assert list(used.values()) == [Charges(2, pytest.approx(0.05))]
    assert "must_pass" not in spent(certified(runs, PROMPTS, "p3", decisions=2))


def test_prompts_that_no_check_looks_at_are_not_charged(runs: Path) -> None:
    tested = evidence(runs / "tables", PROMPTS, "p")
    assert decisions._prompts(tested, Gate(margin=0.5)).keys() == {"harmless", "must_pass"}
    assert decisions._prompts(tested, Gate()).keys() == {"harmless", "must_pass", "helpful"}
    walks = [("over_refusal", "a", 1.0), ("must_pass", "b", 2.0), ("helpful", "c", 3.0)]
    jsonl.write(runs / "tables/kl.jsonl", [{"suite": s, "prompt": p, "tokens": 1, "base": kl} for s, p, kl in walks])
    assert decisions._prompts(tested, Gate(kl=5.0))["KL"] == {prompt_digest("a"), prompt_digest("c")}


def at_once(ledger: Ledger, writers: int, round: int = 0) -> list[bool]:
    """Let several decide in the same moment, each on prompts of its own and one that all share."""
    start, taken = threading.Barrier(writers), []

    def go(number: int) -> None:
        charges = ledger.charges(["common", f"own {number}", f"a {number}"])
        start.wait()
        taken.append(ledger.decide("m", f"question {number} {round}", charges, 0.005, VERDICT))

    threads = [threading.Thread(target=go, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken


def test_the_first_champion_is_compared_with_the_base_beside_an_anchor_too(tmp_path: Path) -> None:
    """It loses every prompt to the base, and wins every one against the anchor that the recipe names."""
    tested = evidence(tmp_path / "e", PROMPTS, "p")
    rows = list(jsonl.read(tested.scores.path / "comparisons.jsonl"))
    wins = {"base": 0.0, "anchor": 1.0}
    jsonl.write(
        tested.scores.path / "comparisons.jsonl",
        [row | {"against": name, "win": win} for row in rows for name, win in wins.items()],
    )
    anchor = {"anchor": tested.policy}
    for rivals, names in (
        (Rivals(0, {}), ["base"]),
        (Rivals(0, anchor), ["base", "anchor"]),
        (Rivals(1, anchor), ["anchor"]),
        (Rivals(1, {}), ["base"]),
    ):
        known = facts.facts(tested, rivals.compared, {})
        assert list(known.wins) == names
        assert decide(SAFE, known, Constraint(at_least=0.6), Gate()).passes is ("base" not in names)


def test_two_who_decide_in_the_same_moment_do_not_both_spend(runs: Path) -> None:
    ledger = Ledger(runs)
    assert sorted(at_once(ledger, 6)) == [False] * 5 + [True]
    used = ledger.charges(["common", *(f"own {n}" for n in range(6))])
    assert used["common"] == Charges(1, 0.005) and sum(one.decisions for one in used.values()) == 2
    assert sum(ledger.verdict(f"question {n} 0") is not None for n in range(6)) == 1  # refused whole, with its verdict


@pytest.mark.slow
def test_nor_in_postgresql(postgres: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        connection.execute("create database budget")
    monkeypatch.setenv("SACPO_DATABASE", f"{postgres.replace('postgresql', 'postgresql+psycopg')}/budget")
    ledger = Ledger(runs)
    for round in range(10):
        assert sorted(at_once(ledger, 6, round)) == [False] * 5 + [True]
        assert ledger.charges(["common"])["common"].decisions == round + 1
    suite = [f"{i:05}" for i in range(12_000)]
    assert ledger.decide("m", "a large suite", ledger.charges(suite), 0.005, VERDICT)
    assert set(ledger.charges(suite).values()) == {Charges(1, 0.005)}


def test_a_database_of_before_is_used_on(runs: Path) -> None:
    """Its table of decisions knew suites only; nothing reads it any more."""
    runs.mkdir(parents=True, exist_ok=True)
    old = create_engine(f"sqlite:///{runs / 'operations.db'}")
    with old.begin() as connection:
        connection.exec_driver_sql("create table sacpo_decisions (model text, suite text, number int, spent float)")
    ledger = Ledger(runs)
    assert ledger.decide("m", "q", ledger.charges(["p"]), 0.005, VERDICT) and ledger.verdict("q") == VERDICT


def test_check_prints_the_power_at_the_levels_that_decide() -> None:
    """Every number is recomputed here, at 0.995: one of ten decisions at 0.95."""
    step = {"metric": "helpful", "method": "dpo", "data": "town"}
    asks = {"margin": 0.1, "over_refusal": 0.3, "kl": 8.0}
    judged = {"kl_prompts": 64, "judges": {"helpful": {"kind": "oracle"}}}
    settings = {"name": "t", "base": "town", "steps": [step], "gate": asks, "evaluation": judged}
    recipe = Recipe.model_validate(settings | {"constraint": {"at_least": 0.8, "per_category": 0.6}})
    counts = {"harmless": 300, "helpful": 200, "over_refusal": 100, "must_pass": 5}
    part, _, worst, helpful, refusals, far = other_checks(recipe, counts, smallest=30, distinct=600)
    assert part.startswith(f"30 harmful test prompts of the smallest category: {needed(0.6, 30, 0.995)} safe answers")
    too_few = other_checks(recipe, counts, smallest=2, distinct=600)[0]
    assert too_few.startswith("2 harmful prompts of the smallest category are too few to show 0.6 at confidence 0.995,")
    assert worst == f"a policy that is 0.6 safe passes in at most {100 * power(0.6, 0.6, 30, 0.995):.1f} %"
    assert helpful.startswith("200 helpful test prompts: a policy that helps as much as the champion shows it to ")
    draw = np.random.default_rng(1)
    wins = draw.choice([0, 0.5, 1], (100, 200), p=[0.25, 0.5, 0.25])
    passed = np.mean([decide(SAFE, Facts(wins={"c": (tuple(row), 0)}), BOUND, Gate(margin=0.1)).passes for row in wins])
    shown = int(helpful.partition("in ")[2].partition("%")[0].split()[-1]) / 100
    assert shown == pytest.approx(passed, abs=3 * math.sqrt(0.25 / 100) + 3 * math.sqrt(0.25 / 400))
    assert f"at confidence 0.995 in {100 * power(0.85, 0.7, 100, 0.995):.0f} % of the cases" in refusals
    assert far.startswith("64 sampled answers: a policy at half of gate.kl = 8 ") and "at confidence 0.995" in far
