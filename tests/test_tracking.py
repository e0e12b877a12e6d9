"""What MLflow is told while a stage runs, when it has ended, and when it was stopped."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Policy, Sources
from models.errors import BadInput, BadPlace
from models.promotion import Registered
from models.recipe_file import read
from tasks import records, store, tracking
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
    told._out.submit(lambda: None).result()


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
    settled(told)  # what still waits when a run is killed, the next one sends
    told.fail("KILLED")
    found = known(tmp_path)
    assert found["data"].info.status == "FINISHED" and found["data"].data.tags["sacpo.digest"] == made.digest
    assert found["quickstart · seed 0 · digest"].info.status == "KILLED"


def test_a_version_that_is_found_again_carries_the_newest_verdict(tmp_path: Path, policy: Policy) -> None:
    """Passed beside one champion, failed beside the next: who promotes by hand must read the second."""
    first = {"gate": "pass", "gate.helpful against the champion": "0.6"}
    version = tracker(tmp_path).register(policy, first)
    again = {"gate": "fail", "gate.why_not": "helpful against the anchor"}
    assert tracker(tmp_path).register(policy, again) == version == "1"
    tags = tracking.client(tmp_path).get_model_version("quickstart", version).tags
    assert {key: value for key, value in tags.items() if key.startswith("gate")} == again


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Often the first thing to change after memory ran out."""
    for processes in (2, 1):
        told = tracking.Tracker(tmp_path, read("quickstart", [f"compute.processes={processes}"]), "digest", {})
        settled(told)
        assert not told._out.missed
        told.fail("KILLED")
    assert len([name for name in known(tmp_path) if name == "quickstart · seed 0 · digest"]) == 1


def test_updates_that_a_resumed_training_repeats_are_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "EVERY", 0.0)
    told = tracker(tmp_path)
    progress = stage().partial(tmp_path) / "progress.jsonl"
    progress.parent.mkdir(parents=True)
    for steps in ((1, 2, 3), (1, 2, 3, 4)):
        progress.write_text("".join(map(line, steps)))  # with new times
        told.follow(stage())
        settled(told)
    assert [point.step for point in known(tmp_path)["curve"]] == [1, 2, 3, 4]
    told.fail("KILLED")


def test_a_damaged_database_is_said_and_is_not_taken_for_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    told = tracker(tmp_path)
    settled(told)
    told.record(stage(), store.make(tmp_path, stage()))
    assert told.finish(tmp_path, {}) is False
    assert "MLflow did not take the run" in capsys.readouterr().out
    with pytest.raises(BadPlace, match="did not register the policy"):
        tracker(tmp_path).register(Policy(path=tmp_path, digest="x", name="p", kind="step"), {})


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
    assert {before[name].info.status for name in ("data", "quickstart · seed 0 · digest")} == {"FAILED"}
    second = tracker(tmp_path)
    second.follow(stage())
    settled(second)
    after = known(tmp_path)
    for name in ("data", "quickstart · seed 0 · digest"):
        assert after[name].info.status == "RUNNING" and after[name].info.run_id == before[name].info.run_id
    second.fail("KILLED")


def test_the_address_of_a_page_holds_no_password_and_no_name_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tracker(tmp_path)
    mlflow = told._client()
    monkeypatch.setattr(told, "_client", lambda: mlflow)
    monkeypatch.setattr(tracking, "SERVER", "http://ada:pw@127.0.0.1:5000/")
    run, version = told.pages(Registered("a) [b](c #?", "1", ""))
    assert version[0] == "http://127.0.0.1:5000/#/models/a%29%20%5Bb%5D%28c%20%23%3F/versions/1"
    assert run[0].startswith("http://127.0.0.1:5000/#/experiments/")


def test_a_name_with_quotes_finds_itself_and_nothing_else(tmp_path: Path) -> None:
    """As of versions that others have registered: a recipe refuses quotes."""
    names = ["it's", 'the "best"', "a' OR name LIKE '%", "b or c", "λ-模型", "50% `x`", "other"]
    mlflow = tracking.client(tmp_path)
    for name in names:
        mlflow.create_registered_model(name)
        mlflow.create_model_version(name, "file:///nowhere", tags={"sacpo.k": name})
    for name in names:
        for key in ("name", "sacpo.k"):
            found = mlflow.search_model_versions(records.where({key: name}))
            assert [version.name for version in found] == [name]


def test_a_text_with_both_kinds_of_quotes_is_refused() -> None:
    """MLflow's filters know no escape."""
    with pytest.raises(BadInput, match="holds both"):
        records.where({"name": """it's "it" """})


def test_a_killed_run_whose_folder_was_moved_goes_on_under_its_own_parent(tmp_path: Path) -> None:
    """MLflow never changes a param, and the same run has other paths after a move."""
    one, two = (read("quickstart", [f"gate.anchor=/{place}/anchor"]) for place in ("one", "two"))
    killed = tracking.Tracker(tmp_path, one, "digest", {})
    killed.fail("KILLED")
    moved = tracking.Tracker(tmp_path, two, "digest", {})
    settled(moved)
    assert not moved._out.missed and moved._parent == killed._parent
    assert tracking.client(tmp_path).get_run(moved._parent).data.params["gate.anchor"] == "/one/anchor"


def test_a_table_that_no_page_could_load_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"candidate": "a", "split": "test", "suite": "harmless", "prompt": "p", "sample": 0}
    (tmp_path / "answers.jsonl").write_text(json.dumps({**key, "answer": "x"}) + "\n")
    (tmp_path / "scores.jsonl").write_text(json.dumps({**key, "metric": "harmless", "status": "ok"}) + "\n")
    mlflow = tracking.client(tmp_path)
    run = mlflow.create_run(mlflow.create_experiment("tables")).info.run_id
    monkeypatch.setattr(records, "LARGEST_TABLE", 10)
    records.table(mlflow, run, tmp_path)
    assert not mlflow.list_artifacts(run)
    monkeypatch.undo()
    records.table(mlflow, run, tmp_path)
    assert [held.path for held in mlflow.list_artifacts(run)] == ["answers_and_verdicts.json"]
