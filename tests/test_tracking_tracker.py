"""What MLflow is told while a stage runs, when it has ended, and when it was stopped."""

import json
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Policy
from models.data import sources
from models.errors import BadInput, BadPlace
from models.gate.promotion_log import Registered
from models.recipe.toml import read
from tasks.access import passwords
from tasks.tracking import connection, download, log
from tasks.tracking import tracker as tracking
from tasks.tracking.ledger import Ledger
from tasks.work import store
from tasks.work.store import Stage


def stage() -> Stage[Any]:
    arguments = {"files": {"sft": "town"}, "sha256": {}, "seed": 0}
    return Stage(sources.gather, "data", arguments)


def line(done: int) -> str:
    return json.dumps({"done": done, "of": 4, "loss": 1 / done, "margin": done, "time": time.time()}) + "\n"


def known(runs: Path) -> dict[str, Any]:
    """Return the runs of the experiment by name, and the loss curve of the stage."""
    client = connection.client(runs)
    experiment = client.get_experiment_by_name("quickstart")
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    return found | {"curve": client.get_metric_history(found["data"].info.run_id, "loss") if "data" in found else []}


def tracker(runs: Path) -> tracking.Tracker:
    return tracking.Tracker(runs, read("quickstart"), "digest", {})


def settled(run_tracker: tracking.Tracker) -> None:
    run_tracker._out.submit(lambda: None).result()


def test_a_curve_grows_while_the_stage_runs_and_is_whole_when_it_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FOLLOW_SECONDS", 0.0)
    run_tracker = tracker(tmp_path)
    progress = stage().partial(tmp_path) / "progress.jsonl"
    progress.parent.mkdir(parents=True)
    run_tracker.follow(stage())  # nothing is written yet
    settled(run_tracker)
    assert "data" not in known(tmp_path)
    progress.write_text(line(1) + line(2) + '{"done": 3, "lo')  # as a reader may find it
    run_tracker.follow(stage())
    settled(run_tracker)
    assert [point.step for point in known(tmp_path)["curve"]] == [1, 2]
    assert known(tmp_path)["data"].info.status == "RUNNING"
    progress.write_text("".join(map(line, (1, 2, 3))))
    run_tracker.follow(stage())
    settled(run_tracker)
    assert [point.step for point in known(tmp_path)["curve"]] == [1, 2, 3]
    made = store.make(tmp_path, stage())
    run_tracker.record(stage(), made)
    run_tracker.record(stage(), made)
    settled(run_tracker)  # what still waits when a run is killed, the next one sends
    run_tracker.fail("KILLED")
    found = known(tmp_path)
    assert found["data"].info.status == "FINISHED" and found["data"].data.tags["sacpo.digest"] == made.digest
    assert found["quickstart · seed 0 · digest"].info.status == "KILLED"


def test_a_version_that_is_found_again_carries_the_newest_verdict(tmp_path: Path, policy: Policy) -> None:
    """Passed beside one champion, failed beside the next: who promotes by hand must read the second."""
    first = {"gate": "pass", "gate.helpful against the champion": "0.6"}
    version = tracker(tmp_path).register(policy, first)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == connection.ANSWER_TIMEOUT  # longer while weights are moved only
    again = {"gate": "fail", "gate.why_not": "helpful against the anchor"}
    assert tracker(tmp_path).register(policy, again) == version == "1"
    tags = connection.client(tmp_path).get_model_version("quickstart", version).tags
    assert {key: value for key, value in tags.items() if key.startswith("gate")} == again


def test_edited_tags_put_no_other_weights_in_the_place_of_ours(tmp_path: Path, policy: Policy) -> None:
    """A version, and a logged model, that somebody else made and that call themselves ours."""
    run_tracker, mlflow = tracker(tmp_path), connection.client(tmp_path)
    settled(run_tracker)
    run = run_tracker._run.open()
    mlflow.create_registered_model("quickstart")
    theirs = {"sacpo.policy": policy.digest, "sacpo.run_id": run}
    mlflow.create_model_version("quickstart", "file:///their/weights", run, tags=theirs)
    experiment = mlflow.get_run(run).info.experiment_id
    logged = mlflow.create_logged_model(experiment, "policy", run, {"sacpo.weights": policy.digest})
    mlflow.finalize_logged_model(logged.model_id, "READY")
    version = run_tracker.register(policy, {})
    assert version == "2"
    source = mlflow.get_model_version("quickstart", version).source
    assert source not in ("file:///their/weights", f"models:/{logged.model_id}")
    assert tracker(tmp_path).register(policy, {}) == "2"  # found again
    run_tracker.fail("KILLED")


def test_what_a_kill_left_between_logging_and_registering_is_used(tmp_path: Path, policy: Policy) -> None:
    run_tracker = tracker(tmp_path)
    settled(run_tracker)  # it opens its run in a thread of its own
    address = run_tracker._registration.log_weights("quickstart", policy)
    assert tracker(tmp_path).register(policy, {}) == "1"
    assert connection.client(tmp_path).get_model_version("quickstart", "1").source == address
    run_tracker.fail("KILLED")


class Slow(BaseHTTPRequestHandler):
    """Takes a file, and answers when it has copied it elsewhere."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        time.sleep(2)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_may_take_its_time_with_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow before S3 copies a file of 16 GB there before it answers."""
    from mlflow.store.artifact.http_artifact_repo import HttpArtifactRepository

    connection.client(tmp_path)
    monkeypatch.setattr(connection, "ANSWER_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "weights").write_bytes(b"x" * 1000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}/api/2.0/mlflow-artifacts/artifacts/1"
        with pytest.raises(connection.failures()):
            HttpArtifactRepository(place).log_artifact(str(tmp_path / "weights"))
        with connection.long_timeout():
            HttpArtifactRepository(place).log_artifact(str(tmp_path / "weights"))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")  # what the user set stays
        with connection.long_timeout():
            assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3"
        server.shutdown()


def test_weights_get_that_time(tmp_path: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow as api

    seen = []

    def seeing(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **named: Any) -> Any:
            seen.append(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"])
            return call(*args, **named)

        return called

    run_tracker = tracker(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", connection.ANSWER_TIMEOUT)
    monkeypatch.setattr(api.pyfunc, "log_model", seeing(api.pyfunc.log_model))
    monkeypatch.setattr(api.artifacts, "download_artifacts", seeing(api.artifacts.download_artifacts))
    run_tracker.register(policy, {})
    Ledger(tmp_path).note_registered("quickstart", "1", "", policy.digest)
    download.fetch(tmp_path, "models:/quickstart/1")
    assert seen == [connection.WEIGHTS_TIMEOUT] * 2
    run_tracker.fail("KILLED")


def test_a_look_that_was_left_out_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent for a minute after a failure; the curve must go on after it."""
    monkeypatch.setattr(tracking, "FOLLOW_SECONDS", 0.0)
    run_tracker = tracker(tmp_path)
    progress = stage().partial(tmp_path) / "progress.jsonl"
    progress.parent.mkdir(parents=True)
    progress.write_text(line(1))
    run_tracker._out.send("a record", lambda: 1 / 0)
    run_tracker.follow(stage())
    settled(run_tracker)
    run_tracker._out._silent_until = 0.0  # the minute is over
    run_tracker.follow(stage())
    settled(run_tracker)
    assert [point.step for point in known(tmp_path)["curve"]] == [1]
    run_tracker.fail("KILLED")


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    """Often the first thing to change after memory ran out."""
    for processes in (2, 1):
        run_tracker = tracking.Tracker(tmp_path, read("quickstart", [f"compute.processes={processes}"]), "digest", {})
        settled(run_tracker)
        assert not run_tracker._out.missed
        run_tracker.fail("KILLED")
    assert len([name for name in known(tmp_path) if name == "quickstart · seed 0 · digest"]) == 1


def test_updates_that_a_resumed_training_repeats_are_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "FOLLOW_SECONDS", 0.0)
    run_tracker = tracker(tmp_path)
    progress = stage().partial(tmp_path) / "progress.jsonl"
    progress.parent.mkdir(parents=True)
    for steps in ((1, 2, 3), (1, 2, 3, 4)):
        progress.write_text("".join(map(line, steps)))  # with new times
        run_tracker.follow(stage())
        settled(run_tracker)
    assert [point.step for point in known(tmp_path)["curve"]] == [1, 2, 3, 4]
    run_tracker.fail("KILLED")


def test_a_damaged_database_is_said_and_is_not_taken_for_success(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    run_tracker = tracker(tmp_path)
    settled(run_tracker)
    run_tracker.record(stage(), store.make(tmp_path, stage()))
    assert run_tracker.finish(tmp_path, {}) is False
    assert "MLflow did not take the run" in capsys.readouterr().out
    with pytest.raises(BadPlace, match="did not register the policy"):
        tracker(tmp_path).register(Policy(path=tmp_path, digest="x", name="p", kind="step"), {})


def test_a_stopped_run_leaves_no_stage_running_and_the_next_takes_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FOLLOW_SECONDS", 0.0)
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
    run_tracker = tracker(tmp_path)
    mlflow = run_tracker._run.client()
    monkeypatch.setattr(run_tracker._run, "client", lambda: mlflow)
    monkeypatch.setattr(connection, "SERVER", "http://ada:pw@127.0.0.1:5000/")
    run, version = run_tracker.pages(Registered("a) [b](c #?", "1", ""))
    assert version[0] == "http://127.0.0.1:5000/#/models/a%29%20%5Bb%5D%28c%20%23%3F/versions/1"
    assert run[0].startswith("http://127.0.0.1:5000/#/experiments/")
    name = "MLFLOW_TRACKING_URI"
    passwords.write_running(tmp_path, {name: "http://127.0.0.1:5000"}, [name], {})
    monkeypatch.setattr(connection, "SERVER", "http://localhost:5000")  # another user's program may answer there
    assert run_tracker.pages(Registered("m", "1", ""))[1][0] == "http://127.0.0.1:5000/#/models/m/versions/1"


def test_a_name_with_quotes_finds_itself_and_nothing_else(tmp_path: Path) -> None:
    """As of versions that others have registered: a recipe refuses quotes."""
    names = ["it's", 'the "best"', "a' OR name LIKE '%", "b or c", "λ-模型", "50% `x`", "other"]
    mlflow = connection.client(tmp_path)
    for name in names:
        mlflow.create_registered_model(name)
        mlflow.create_model_version(name, "file:///nowhere", tags={"sacpo.k": name})
    for name in names:
        for key in ("name", "sacpo.k"):
            found = mlflow.search_model_versions(log.where({key: name}))
            assert [version.name for version in found] == [name]


def test_a_text_with_both_kinds_of_quotes_is_refused() -> None:
    """MLflow's filters know no escape."""
    with pytest.raises(BadInput, match="holds both"):
        log.where({"name": """it's "it" """})


def test_a_killed_run_whose_folder_was_moved_goes_on_under_its_own_parent(tmp_path: Path) -> None:
    """MLflow never changes a param, and the same run has other paths after a move."""
    one, two = (read("quickstart", [f"gate.anchor=/{place}/anchor"]) for place in ("one", "two"))
    killed = tracking.Tracker(tmp_path, one, "digest", {})
    killed.fail("KILLED")
    moved = tracking.Tracker(tmp_path, two, "digest", {})
    settled(moved)
    assert not moved._out.missed and moved._run.parent == killed._run.parent
    assert connection.client(tmp_path).get_run(moved._run.parent).data.params["gate.anchor"] == "/one/anchor"


def test_a_table_that_no_page_could_load_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"candidate": "a", "split": "test", "suite": "harmless", "prompt": "p", "sample": 0}
    (tmp_path / "answers.jsonl").write_text(json.dumps({**key, "answer": "x"}) + "\n")
    (tmp_path / "scores.jsonl").write_text(json.dumps({**key, "metric": "harmless", "status": "ok"}) + "\n")
    mlflow = connection.client(tmp_path)
    run = mlflow.create_run(mlflow.create_experiment("tables")).info.run_id
    monkeypatch.setattr(log, "LARGEST_TABLE", 10)
    log.table(mlflow, run, tmp_path)
    assert not mlflow.list_artifacts(run)
    monkeypatch.undo()
    log.table(mlflow, run, tmp_path)
    assert [held.path for held in mlflow.list_artifacts(run)] == ["answers_and_verdicts.json"]
