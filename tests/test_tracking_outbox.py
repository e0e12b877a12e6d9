"""A slow MLflow: a person is told, a run ends all the same, and the next command sends what is left."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server

from models.data import sources
from models.errors import BadPlace
from models.recipe.toml import read
from tasks.servers import environment as home
from tasks.tracking import connection, log, outbox
from tasks.tracking import tracker as tracking
from tasks.tracking.mlflow_run import MlflowRun
from tasks.work import store
from tasks.work.store import Stage

STAGES = 10


class Slow:
    """A real MLflow server in a thread, which thinks for `seconds` before each of its `requests`."""

    def __init__(self, folder: Path) -> None:
        from mlflow.server import app, handlers

        self.seconds, self.requests = 0.0, 0
        self._app = app.wsgi_app
        database = f"sqlite:///{folder / 'mlflow.db'}"
        handlers.initialize_backend_stores(database, database, str(folder / "artifacts"))
        self.server = make_server("127.0.0.1", 0, self, threaded=True)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __call__(self, environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        self.requests += 1
        time.sleep(self.seconds)
        return self._app(environment, start)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    folder = tmp_path_factory.mktemp("slow")
    log.database(folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlflow.server.handlers._tracking_store", None)
        patch.setattr("mlflow.server.handlers._model_registry_store", None)
        patch.setattr("mlflow.tracking._model_registry.utils._registry_uri", None)  # a server in this process sets
        patch.setenv("MLFLOW_REGISTRY_URI", "")  # both, for all clients of the process
        one = Slow(folder)
        yield one
        one.server.shutdown()


@pytest.fixture
def tracker(slow: Slow, runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], tracking.Tracker]]:
    """`tracker(digest)`: one that speaks to the slow server, whose run ends after a second instead of minutes."""
    monkeypatch.setattr(connection, "SERVER", slow.address)
    for name, seconds in {"SLOW": 0.2, "LONGEST": 1.0, "LAST": 60.0}.items():
        monkeypatch.setattr(outbox, name, seconds)
    slow.seconds = 0.0
    yield lambda digest: tracking.Tracker(runs, read("quickstart"), digest, {})
    slow.seconds = 0.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Stage[Any], Any]]:
    """Stages that have ended."""
    runs = tmp_path_factory.mktemp("made")
    arguments = [{"files": {"sft": "town"}, "sha256": {}, "seed": seed} for seed in range(STAGES)]
    every = [Stage(sources.gather, f"data {g['seed']}", g) for g in arguments]
    return [(stage, store.make(runs, stage)) for stage in every]


def known(digest: str) -> dict[str, str]:
    """Return MLflow run → status, of one pipeline run and its stages."""
    import mlflow

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("quickstart").experiment_id
    (parent,) = client.search_runs([experiment], f"tags.`sacpo.run` = '{digest}'")
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    return {"": parent.info.status} | {run.info.run_name: run.info.status for run in children}


def test_a_run_ends_beside_a_slow_server_and_the_next_command_sends_the_rest(
    tracker: Any, slow: Slow, made: list[Any], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tracker("slow")
    slow.seconds = 0.2
    for stage, noun in made:
        first.record(stage, noun)
    assert first.finish(runs, {}) is False
    out = capsys.readouterr().out
    assert "MLflow is slow: " in out and "records wait" in out and "the next command sends what is missing" in out
    slow.seconds = 0.0
    time.sleep(0.5)  # the request that was under way
    left = len(known("slow"))
    assert left < STAGES
    second = tracker("slow")
    for stage, noun in made:
        second.record(stage, noun)
    second._out.submit(lambda: None).result()
    assert not second._out.missed and list(known("slow").values()).count("FINISHED") == STAGES
    third, before = tracker("slow"), slow.requests
    for stage, noun in made:
        third.record(stage, noun)
    third._out.submit(lambda: None).result()
    assert slow.requests - before < STAGES  # what is there already is asked for once, not stage by stage
    third.fail("FAILED")


def test_a_run_that_is_told_to_end_makes_the_closing_call_only(tracker: Any, slow: Slow, made: list[Any]) -> None:
    run_tracker = tracker("killed")
    run_tracker._out.submit(lambda: None).result()
    slow.seconds = 0.1
    for stage, noun in made:
        run_tracker.record(stage, noun)
    run_tracker.fail("KILLED")
    slow.seconds = 0.0
    there = known("killed")
    assert there.pop("") == "KILLED" and len(there) < STAGES
    assert run_tracker._out.missed


def test_a_run_that_waits_for_a_registration_says_for_what(tracker: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_tracker = tracker("waits")
    run_tracker._out.wait(run_tracker._out.submit(time.sleep, 0.5))
    assert "MLflow is slow: 1 record waits" in capsys.readouterr().out
    run_tracker.fail("FAILED")


@pytest.mark.parametrize("resets", [1, 2, 3])
def test_a_connection_that_is_reset_is_tried_again_twice(resets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        seen = []

        def serve() -> None:
            while len(seen) <= resets:
                connection, _ = listener.accept()
                seen.append(connection.recv(1000))
                if len(seen) <= resets:  # a reset, not an end
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"3.0.0"')
                connection.close()

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setattr(time, "sleep", lambda _: None)
        named = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{listener.getsockname()[1]}"}
        if resets < 3:
            assert home.request_json("MLFLOW_TRACKING_URI", "/version", named) == "3.0.0"
        else:
            with pytest.raises(BadPlace, match="does not answer"):
                home.request_json("MLFLOW_TRACKING_URI", "/version", named)
        assert len(seen) == min(resets + 1, 3)


def test_a_run_begins_although_the_first_connection_broke(
    tracker: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opens, broken = MlflowRun.open, []

    def once(run: MlflowRun) -> str:
        if not broken:
            broken.append(1)
            raise ConnectionResetError(104, "Connection reset by peer")
        return opens(run)

    monkeypatch.setattr(MlflowRun, "open", once)
    run_tracker = tracker("broken")
    assert broken and not run_tracker._out.missed
    run_tracker.fail("FAILED")
    assert known("broken")[""] == "FAILED"
