"""The names of results, as they are: a store that somebody has stays valid until a version is raised on purpose."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Noun, Policy, Preferences, Reference, Sources, content_digest
from models.recipe import Recipe
from models.recipe.toml import read
from tasks import run as runs_of
from tasks import stages
from tasks.run import Run
from tasks.stages import Yardstick
from tasks.work import store, workers
from tasks.work.store import Stage, requested

LABELS = [
    {"prompt": "how do i open it ?", "answer": answer, "good": good} for answer, good in (("no .", 1), ("go .", 0))
]
FACTS: dict[str, dict[str, Any]] = {
    "Sources": {"files": {}},
    "Preferences": {
        "metric": "helpful",
        "counts": {"train": 900, "validation": 50, "test": 50, "quarantined": 0, "chosen": 450, "rejected": 450},
        "splits": {"train": "1" * 64, "validation": "2" * 64, "test": "3" * 64},
    },
    "Policy": {"name": "base", "kind": "base"},
    "Reference": {"policy": "4" * 64, "preferences": "5" * 64, "counts": {"train": 900, "dropped": 0}},
    "Prompts": {"split": "validation", "digests": {"prompts": "6" * 64, "kl": "7" * 64}},
    "Answers": {"policy": "4" * 64, "split": "validation"},
    "Distances": {"policy": "4" * 64},
    "Scores": {"policy": "4" * 64, "split": "validation", "judges": {}, "failed": 0},
    "Margins": {"policy": "4" * 64},
    "Benchmarks": {"policy": "4" * 64, "harness": "1"},
    "Calibration": {"metrics": ("harmless",)},
}
"""What a stage of each kind might have made."""
KEYS = {
    "sources.gather · data": "80ed11d5c531c7a5",
    "preferences.prepare · pairs · helpful": "806201fb6fca84d5",
    "policy.base · base · town": "599de99a6fc575d9",
    "alignment.sft · base · sft": "ccd4034000e34e41",
    "reference.score · held-out · helpful under base": "d3d014fe70f8a215",
    "reference.score · reference · helpful under base": "8974a03c66e55a44",
    "alignment.dpo · helpful · dpo · λ=0.5 (β/λ=0.2)": "aadde08590e5c875",
    "merge.interpolate · merge · q=0.25": "13cc12ca08c6e541",
    "prompts.ask · prompts · validation": "70f606628c0d9bd2",
    "answering.answer · answers · base · validation": "817da07f893490dc",
    "judging.judge · judge · base · validation": "d1c4f35134493532",
    "distance.measure · distance · base · validation": "5a1af263ba3a9266",
    "margins.weigh · margins · base": "3cca18482a65e949",
    "harness.measure · tasks · base": "246e986d8d78550e",
    "reference.score_unpaired · reference · helpful under base": "ef52c2df55848194",
    "alignment.kto · helpful · kto · λ=0.5 (β/λ=0.2)": "d41b03377c6005aa",
    "judging.calibrate · judges on labelled answers": "7a2c9e510dbc733f",
}
"""Stage and title → the first half of its key."""
RUN = "cdc7cffb697c7ba33986fc3422df72d261a001c710597307ee28f2e22808c493"
"""The digest of the quickstart."""


class Silent:
    """A tracker that records nothing."""

    def record(self, work: Stage[Any], noun: Noun) -> None:
        pass


@pytest.fixture
def asked(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Stage[Any]]:
    """Every stage that an alignment can ask for, on a machine whose libraries are all version 1."""
    made: list[Stage[Any]] = []

    def done(root: Path, work: Stage[Any], moved: object) -> Noun:
        made.append(work)
        work.folder(root).mkdir(parents=True, exist_ok=True)
        return work.makes(
            path=work.folder(root), digest=content_digest(work.makes.__name__), **FACTS[work.makes.__name__]
        )

    monkeypatch.setattr(workers, "run", done)
    monkeypatch.setattr(store, "installed", lambda name: "1")
    monkeypatch.setattr(stages, "version", lambda name: "1")
    monkeypatch.setattr(stages, "refuse_one_kind", lambda pairs: None)
    for method in ("dpo", "kto"):
        sources = follow(run_of(runs, recipe(f"steps.0.method={method}")))
    labels = tmp_path / "labels.jsonl"
    labels.write_text("".join(json.dumps(row) + "\n" for row in LABELS), "utf-8")
    stages.calibrate(run_of(runs, recipe(f"evaluation.judges.harmless.labels={labels}")), sources)
    return made


def run_of(runs: Path, recipe: Recipe) -> Run[Recipe]:
    return Run(runs, recipe, "0123456789abcdef", Silent())  # type: ignore[arg-type]


def recipe(*changes: str) -> Recipe:
    told = read("quickstart", ["compute.device=cpu", "compute.threads=1", *changes])
    assert isinstance(told, Recipe)
    return told


def follow(run: Run[Recipe]) -> Sources:
    """Ask for the stages in the order of the method, one of each kind."""
    step = run.recipe.steps[0]
    sources: Sources = stages.gather.fn(run)
    pairs: Preferences = stages.prepare.fn(run, sources, step)
    base: Policy = stages.finetune.fn(run, stages.base.fn(run), sources)
    heldout: Reference = stages.hold_out.fn(run, base, pairs)
    scored: Reference = stages.score.fn(run, base, pairs, step)
    policy: Policy = stages.align.fn(run, base, scored, step, 0.5)
    stages.interpolate.fn(run, policy, base, 0.25)
    prompts = stages.gather_prompts(run, sources, [pairs], "validation")
    stages.examine.fn(run, policy, base, Yardstick(base, sources, [pairs], {pairs.metric: heldout}, prompts))
    stages.measure.fn(run, base, sources)
    return sources


def test_the_key_of_every_stage_is_what_it_was(asked: list[Stage[Any]]) -> None:
    assert {f"{work.name} · {work.title}": work.key[:16] for work in asked} == KEYS


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_same_rows_from_another_file_retrain_nothing(
    method: str, asked: list[Stage[Any]], runs: Path, tmp_path: Path
) -> None:
    """A key sees the digest of the rows, never the file, the label, the names of columns or the limit behind them."""
    moved = tmp_path / "moved.jsonl"
    moved.write_text("{}\n")
    keys = []
    for changes in [
        [], [f"steps.0.data={moved}"], ["steps.0.label=mine"], ["steps.0.pairs=7"], ["steps.0.columns.chosen=better"],
        ["sft.data=town"], [f"sft.data={moved}"],
    ]:  # fmt: skip
        asked.clear()
        follow(run_of(runs, recipe(f"steps.0.method={method}", *changes)))
        keys.append({w.name: w.key for w in asked if w.name.startswith(("alignment.", "reference."))})
    assert len(keys[0]) == (4 if method == "kto" else 3) and all(others == keys[0] for others in keys)


def test_the_arguments_of_every_stage_pass_through_json(asked: list[Stage[Any]]) -> None:
    """A worker on another machine is told what to do in JSON."""
    for work in asked:
        again = requested(work.request())
        assert again.arguments == work.arguments, work.name
        assert again == work and again.key == work.key and again.makes is work.makes


def test_every_stage_has_a_name_of_its_own(asked: list[Stage[Any]]) -> None:
    assert len({work.name for work in asked}) == len({work.does for work in asked}) == 16


def test_the_digest_of_a_run_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "installed", lambda name: "1")
    assert runs_of.digest(recipe()) == RUN
    told = recipe()
    assert told.digest == Recipe.model_validate(dict(reversed(told.model_dump(by_alias=True).items()))).digest
