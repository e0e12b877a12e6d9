"""What MLflow is told while a stage runs, when it has ended, and when it was stopped."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Sources
from models.recipe_file import read
from tasks import store, tracking
from tasks.store import Stage


def stage() -> Stage:
    given = {"files": {"sft": "town"}, "sha256": {}, "seed": 0}
    return Stage("gather", "data", 1, "models.sources:gather", Sources, given)


def line(done: int) -> str:
    return json.dumps({"done": done, "of": 4, "loss": 1 / done, "margin": done, "time": time.time()}) + "\n"


def known(runs: Path) -> dict[str, Any]:
    """Return the runs of the experiment by name, and the loss curve of the stage."""
    client = tracking.client(runs)
    experiment = client.get_experiment_by_name("quickstart")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    return found | {"curve": client.get_metric_history(found["data"].info.run_id, "loss") if "data" in found else []}


def tracker(runs: Path) -> tracking.Tracker:
    return tracking.Tracker(runs, read("quickstart"), "digest", {})


def settled(told: tracking.Tracker) -> None:
    told._queue.submit(lambda: None).result()


def test_a_curve_grows_while_the_stage_runs_and_is_whole_when_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "EVERY", 0.0)
    told = tracker(tmp_path)
    progress = stage().partial(tmp_path) / "progress.jsonl"
    progress.parent.mkdir(parents=True)
    told.follow(stage())  # nothing is written yet
    settled(told)
    assert "data" not in known(tmp_path)
    progress.write_text(line(1) + line(2) + '{"done": 3, "lo')  # as a reader may find it
    told.follow(stage())
    settled(told)
    assert [point.step for point in known(tmp_path)["curve"]] == [1, 2]
    assert known(tmp_path)["data"].info.status == "RUNNING"
    progress.write_text("".join(map(line, (1, 2, 3))))
    told.follow(stage())
    settled(told)
    assert [point.step for point in known(tmp_path)["curve"]] == [1, 2, 3]
    made = store.make(tmp_path, stage())
    told.record(stage(), made)
    told.record(stage(), made)
    told.fail("KILLED")
    found = known(tmp_path)
    assert found["data"].info.status == "FINISHED" and found["data"].data.tags["sacpo.digest"] == made.digest
    assert found["quickstart"].info.status == "KILLED"


def test_a_stopped_run_leaves_no_stage_running_and_the_next_takes_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "EVERY", 0.0)
    progress = stage().partial(tmp_path) / "progress.jsonl"
    progress.parent.mkdir(parents=True)
    progress.write_text(line(1))
    first = tracker(tmp_path)
    first.follow(stage())
    first.fail("FAILED")
    before = known(tmp_path)
    assert {before[name].info.status for name in ("data", "quickstart")} == {"FAILED"}
    second = tracker(tmp_path)
    second.follow(stage())
    settled(second)
    after = known(tmp_path)
    for name in ("data", "quickstart"):
        assert after[name].info.status == "RUNNING" and after[name].info.run_id == before[name].info.run_id
    second.fail("KILLED")
