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
    "Answers": {"policy": "4" * 64, "split": "validation"},
    "Distances": {"policy": "4" * 64},
    "Scores": {"policy": "4" * 64, "split": "validation", "judges": {}, "failed": 0},
    "Margins": {"policy": "4" * 64},
    "Benchmarks": {"policy": "4" * 64, "harness": "1"},
    "Calibration": {"metrics": ("harmless",)},
}
"""What a stage of each kind might have made."""
KEYS = {
    "gather · data": "84212f01216897ed",
    "prepare · pairs · helpful": "3309e7e50f5a4965",
    "base · base · town": "92ebfa848d9d66c5",
    "sft · base · sft": "53cbad0a158cec10",
    "score · held-out · helpful under base": "a0dbab46f9b30ff1",
    "score · reference · helpful under base": "43cfbbb1495d3785",
    "dpo · helpful · dpo · λ=0.5 (β/λ=0.2)": "b1d12aed8a887c2e",
    "interpolate · merge · q=0.25": "798400e58534b91f",
    "answer · answers · base · validation": "e71b757df98ba247",
    "judge · judge · base · validation": "b65561d229e58384",
    "measure · distance · base · validation": "c5122ce83d3eb3e6",
    "weigh · margins · base": "cb5d6e9b71a149c7",
    "measure · tasks · base": "33be1aa25652cd4f",
    "score_unpaired · reference · helpful under base": "6b5cc1de1a06a252",
    "kto · helpful · kto · λ=0.5 (β/λ=0.2)": "b49be2f50e6df8e9",
    "calibrate · judges on labelled answers": "ccf5872ac503433c",
}
"""Stage and title → the first half of its key."""
RUN = "879f22dcb8270f8a2f8cd27aa8fa03c725912ed9f49c3703435d546f2255356c"
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
    stages.examine.fn(run, policy, base, Yardstick(base, sources, [pairs], {pairs.metric: heldout}))
    stages.measure.fn(run, base)
    return sources


def test_the_key_of_every_stage_is_what_it_was(asked: list[Stage[Any]]) -> None:
    assert {f"{work.name} · {work.title}": work.key[:16] for work in asked} == KEYS


def test_the_arguments_of_every_stage_pass_through_json(asked: list[Stage[Any]]) -> None:
    """A worker on another machine is told what to do in JSON."""
    for work in asked:
        again = requested(work.request())
        assert again.arguments == work.arguments, work.name
        assert again == work and again.key == work.key and again.makes is work.makes


@pytest.mark.xfail(strict=True, reason="D4 of the review: distance.measure and harness.measure are both `measure-…`")
def test_every_stage_has_a_name_of_its_own(asked: list[Stage[Any]]) -> None:
    assert len({work.name for work in asked}) == len({work.does for work in asked}) == 15


def test_the_digest_of_a_run_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "installed", lambda name: "1")
    assert runs_of.digest(recipe()) == RUN
