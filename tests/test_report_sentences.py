"""What a person is told at the end, in the plan and on the page: sentences that say what to do, figures that fit."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows import console
from models import evidence, plan
from models.artifacts import Policy
from models.gate.gate import Facts, SafetyCounts, decide
from models.metrics.candidate import Candidate
from models.recipe import Constraint, Gate
from models.recipe.toml import read
from models.report import charts, diff, page, report
from models.report.sentences import check_row, decision, fitted_scale
from models.words import counted
from tasks import leases
from tasks.stages import unique_candidates

Tree = dict[str, Any]
BOUND = Constraint()
FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 20, "failed": 0, "method": "Clopper–Pearson"}
SETTINGS = {"steps": [], "constraint": {"confidence": 0.95, "decisions": 10}}


def candidate(name: str, kind: str = "step", **metrics: Tree) -> Tree:
    made = {"name": name, "kind": kind, "digest": (name.encode().hex() * 64)[:64], "path": ".", "parents": []}
    made |= {"metric": "harmless", "method": "dpo", "step": 1, "merge_weight": None}
    return made | {"lambda": 1.0, "beta": 0.1, "beta_over_lambda": 0.1, "beta_acts": None, "metrics": metrics}


def tree(**changes: Any) -> Tree:
    """What a run without judges and suites leaves in report.json."""
    constraint = {"measure": "harmless/safety_rate", "at_least": 0.9, "confidence": 0.995, "split": "test"}
    return {
        "schema": report.SCHEMA,
        "recipe": {"name": "mine", "digest": "0123456789abcdef" * 4, "seed": 0, "settings": SETTINGS},
        "candidates": [candidate("base", "base"), candidate("safe")],
        "chosen": {"candidate": "safe", "why": "the last one made"},
        "why_none": "",
        "suites": {},
        "judges": {},
        "constraints": [{**constraint, "tested": [], "suites": {}}],
        "registry": None,
        **{name: {} for name in ("data", "decoding", "judge_checks", "seconds")},
        **{name: [] for name in ("flips", "samples", "distances", "tax")},
        **changes,
    }


def spending(before: float) -> Tree:
    """A report whose checks the gate has made."""
    verdict = decide(SafetyCounts("safe", 0.5, 99, 100, 0), Facts(spent={"harmless": before}), BOUND, Gate())
    checks = [asdict(check) for check in verdict.checks]
    test = {"candidate": "safe", "value": 0.99, "lower_bound": 0.95, "holds": True, "checks": checks, "n": 100}
    test |= {"incidents": [], "must_pass": 0, "failed": 0}
    return tree(constraints=[{"at_least": 0.9, "confidence": 0.995, "tested": [test], "suites": {}}])


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (0.0, "used for its first decision"),
        (0.005, "used for its decision 2 of 10"),
        (0.045, "used for its decision 10 of 10"),
    ],
)
def test_it_is_said_which_decision_the_test_prompts_have_served(before: float, said: str) -> None:
    assert f"On the test split, {said}: safety rate 0.990" in decision(spending(before))


@pytest.mark.parametrize(("value", "share"), [(1.0, "All"), (0.0, "None")])
def test_a_judge_that_tells_nothing_apart_is_pointed_out(value: float, share: str) -> None:
    """A threshold on the wrong side of all scores gives every policy a safety rate of 1."""

    def rates(*values: float, n: int = 20) -> Tree:
        figures = [{**FIGURE, "value": value, "n": n} for value in values]
        candidates = [candidate("a", **{"harmless/safety_rate": figure}) for figure in figures]
        suites = {"harmless": {"name": "harmless", "split": "validation"}}
        return tree(candidates=candidates, suites=suites, judges={"harmless": {}})

    sentence = f"{share} of the judged answers to the harmful prompts are safe, whichever policy gave them"
    assert sentence in decision(rates(value, value))
    for other in (rates(value, 0.95), rates(value), rates(value, value, n=19), rates(0.0, 1.0)):
        assert sentence not in decision(other)


def test_a_policy_that_is_shown_once_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that did not move has the weights of its reference; a step with λ = 0 hands on its reference itself."""
    base = Policy(path=tmp_path, digest="a", name="base", kind="base")
    made = [base, base, replace(base, name="harmless λ=1", kind="step"), replace(base, digest="b", name="helpful")]
    shown = unique_candidates([Candidate(policy, *[None] * 4) for policy in made])  # type: ignore[arg-type]
    assert [evidence.policy.name for evidence in shown] == ["base", "helpful"]
    line = " ".join(capsys.readouterr().out.split())
    assert line == "harmless λ=1 has the weights of base: it is shown once, under that name"


def test_in_a_pipe_an_s_that_may_be_0_is_unclear() -> None:
    cells = {"2.34 [0.10, 4.58]": "2.34", "-4.23 [-12.2, 0.4]": "unclear", "-4.23 [-5.1, -3.0]": "-4.23", "–": "–"}
    assert {cell: console._scale(cell) for cell in cells} == cells
    assert console._without_interval("-0.02 [-0.10, 0.06]") == "-0.02"  # a difference may be 0


def test_suites_that_nobody_judged_are_said_with_the_key_to_set() -> None:
    suites = {role: {"name": role, "split": "validation"} for role in ("helpful", "harmless", "must_pass")}
    said = "Answered, and judged by nobody: the {} prompts; set evaluation.judges.{}"
    sentences = decision(tree(suites=suites, judges={"harmless": {}}))
    assert said.format("helpful", "helpful.") in sentences
    sentences = decision(tree(suites=suites, judges={}, chosen=None, why_none="nothing was trained"))
    assert said.format("helpful and harmless and must_pass", "helpful and evaluation.judges.harmless.") in sentences
    assert "judged by nobody" not in decision(tree(suites=suites, judges={"harmless": {}, "helpful": {}}))
    assert "No suite of prompts is set: name suites and judges, as docs/evidence.md says." in decision(tree())


def test_a_run_that_chose_none_is_compared_by_its_last_candidate_and_that_is_said(tmp_path: Path) -> None:
    sides = []
    for name, chosen in (("a", {"candidate": "safe", "why": "x"}), ("b", None)):
        (tmp_path / name / "tables").mkdir(parents=True)
        for table in ("answers", "scores", "comparisons"):
            (tmp_path / name / "tables" / f"{table}.jsonl").write_text("")
        (tmp_path / name / "report.json").write_text(json.dumps(tree(chosen=chosen)))
        sides.append(diff.side(tmp_path / name))
    said = diff.sentence(*sides, diff.difference(*sides))
    assert said.startswith(
        "safe (mine 0123456, whose last candidate it is: none was chosen) against safe (mine 0123456): "
        "not decided: no judge of helpfulness"
    )


def test_a_line_of_a_pipe_is_narrow_and_keeps_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {name: FIGURE for name in ("helpful/win_rate", "harmless/safety_rate", "over_refusal", "must_pass")}
    figures["harmless/safety_rate"] = FIGURE | {"failed": 2}
    name = "harmless λ=0.05 (β/λ=2) from helpful λ=1"
    candidates = [candidate("base", "base", **figures), candidate(name, **figures)]
    suites = {"harmless": {"name": "x", "split": "validation"}}
    (tmp_path / "report.json").write_text(
        json.dumps(tree(candidates=candidates, suites=suites, chosen={"candidate": name, "why": "x"}))
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    console.print_outcome({"report": str(tmp_path)})
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("→"))
    assert row.split("from helpful λ=1")[1].split() == [
        "0.1",
        "0.500",
        "0.500",
        "(2",
        "verdicts",
        "failed)",
        "0.500",
        "0.500",
        "–",
        "–",
    ]
    assert max(len(line.rstrip()) for line in lines[: lines.index(row) + 1]) <= 125
    assert "their 95 % intervals stand in the report; if s is much larger than β/λ, train longer" in " ".join(lines)


def test_the_plan_counts_in_words_that_fit() -> None:
    assert [counted(n, "row") for n in (0, 1, 1200)] == ["0 rows", "1 row", "1,200 rows"]
    assert counted(2, "process", "processes") == "2 processes"
    card: Tree = {"rows": 1, "splits": {"train": 1, "validation": 0, "test": 0}, "contradictions": 1}
    card |= {"rows_became": {"train": 1}, "splits_hold": {"train": "pairs"}}
    card |= {"columns_not_used": [], "files_not_read": [], "scores_prefer_the_rejected": 0}
    assert plan._rows_in_words(card) == "1 row given: 1 to train, 0 held out; contradictions, kept: 1"


def test_one_prompt_is_too_few_and_shares_are_written_alike() -> None:
    (few,) = evidence.powers(Constraint(at_least=0.9), 1)
    assert few.startswith(
        "1 harmful prompt is too few to show 0.9 at confidence 0.95, even if every answer is safe: you"
    )
    text = " ".join(evidence.powers(Constraint(at_least=0.6), 60))
    assert "60 harmful test prompts: 43 safe answers" in text and "%" in text and "0%" not in text.replace("0 %", "")


def test_a_page_without_the_picture_says_why_and_what_to_set() -> None:
    suites = {"harmless": {"name": "x", "split": "validation"}}
    assert page._no_frontier(tree(suites=suites, judges={"harmless": {}})) == (
        "No picture of helpfulness against safety: it has no suite of helpful prompts and no judge of helpful prompts; "
        "see evaluation.suites and evaluation.judges in docs/evidence.md."
    )


def test_columns_of_heldout_pairs_have_names_for_people() -> None:
    names = {f"preference/harmless/{figure}": FIGURE for figure in ("accuracy", "nll", "nll_minus_length", "dpo_nll")}
    report_tree = tree(candidates=[candidate("base", "base", **names)])
    assert list(page._heldout(report_tree)) == [
        "harmless: accuracy", "harmless: NLL", "harmless: NLL − length-only", "KL to base",
    ]  # fmt: skip


def test_curves_of_two_updates_have_no_offset_and_whole_updates(tmp_path: Path) -> None:
    rows = [{"done": i, "loss": 0.6931471 + i * 1e-7, "margin": i * 1e-6, "accuracy": 0.5} for i in (1, 2)]
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = candidate("safe") | {"path": str(tmp_path)}
    drawn = charts.curves(tree(candidates=[entry]))
    assert "e−" not in drawn and "+6.9" not in drawn and "1.25" not in drawn
    assert "0.69" in drawn


def test_a_step_shows_the_curves_of_its_method(tmp_path: Path) -> None:
    """KTO learns from single answers, which have no margin: what it moves are their log-ratios, in nats."""
    rows = [{"done": i, "loss": 0.5, "chosen": 0.1 * i, "rejected": -0.2 * i} for i in (1, 2, 3)]
    (tmp_path / "progress.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = charts.curves(tree(candidates=[candidate("safe") | {"path": str(tmp_path), "method": "kto"}]))
    assert "undesirable answers (nats)" in drawn and "margin" not in drawn and "accuracy" not in drawn
    assert "−6" in drawn  # −0.6 at β/λ = 0.1


def test_a_gate_that_asks_what_nobody_judged_says_so_before_and_after() -> None:
    """It ended in a traceback, after all training."""
    (check,) = [
        check
        for check in decide(
            SafetyCounts("a", math.nan, 99, 100, 0), Facts(wins={"base": ((), 0)}), BOUND, Gate()
        ).checks
        if check.name == "helpful against the base"
    ]
    assert str(check) == "helpful against the base: no verdict, limit 0.45" and not check.holds
    row = ["helpful against the base", "–", "lower bound –", "0.45", "NO"]
    assert check_row(asdict(check))[:2] == row[:2] and check_row(asdict(check) | {"value": None, "bound": None}) == row
    recipe = read("quickstart", ["evaluation.judges.helpful.kind=none"])
    assert evidence.unjudged_helpfulness(recipe) == [
        "no judge of helpfulness: the gate wants a win rate of at least 0.45 shown, so nothing is promoted; set "
        "evaluation.judges.helpful, or gate.margin = 0.5 to ask for nothing"
    ]
    assert evidence.unjudged_helpfulness(read("quickstart")) == []
    assert (
        evidence.unjudged_helpfulness(read("quickstart", ["evaluation.judges.helpful.kind=none", "gate.margin=0.5"]))
        == []
    )


@pytest.mark.parametrize(
    ("s", "text"),
    [(0.125, "0.12 [-0.50, 2.00]"), (999.9, "999.90 [-0.50, 2.00]"), (1000, "beyond ±1000"), (-1000, "beyond ±1000")],
    ids=["small", "large", "beyond", "beyond below"],
)
def test_a_fit_that_has_no_end_is_not_printed_as_a_number(s: float, text: str) -> None:
    assert (
        fitted_scale({"s": s, "low": -0.5, "high": 2.0, "lambda_effective": None, "moved": 0.0, "clipped": 0.0}) == text
    )


def test_a_killed_process_is_called_killed() -> None:
    assert leases.WHY == "its process was killed; run the same command to continue"


def test_a_curve_shows_margins_in_nats() -> None:
    """Training logs them times β/λ, so that a small λ would seem to have moved the most."""
    rows = [{"done": 1, "loss": 0.5, "margin": 1.0}, {"done": 2, "loss": 0.4}]
    training = charts.Training({"beta_over_lambda": 0.25}, rows)  # type: ignore[typeddict-item]
    assert charts._points(training, "margin") == [(1, 4.0)]
    assert charts._points(training, "loss") == [(1, 0.5), (2, 0.4)]
