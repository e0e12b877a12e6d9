"""What is left when things die: flow process, worker, MLflow server; and who hears of it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import Cancelling, Running

from flows.align import align
from tasks import leases
from tasks.tracking import connection
from tasks.work import processes
from tests.watching import checkpoints, statuses, until, updates, weights, workers

ROOT = Path(__file__).parent.parent


# Leases


def test_a_dead_process_is_found_and_others_are_left_alone(
    client: SyncPrefectClient, prefect: str, tmp_path: Path, port: int
) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    child.wait()
    api, here = str(prefect), processes.identity_of(os.getpid())
    dead = leases.Lease("", "quickstart", "", os.getpid(), "another boot 1", os.uname().nodename, api)
    kinds = {
        "dead": dead,
        "to be cancelled": dead,
        "temporary server": replace(dead, api=""),
        "alive": replace(dead, started=here),
        "elsewhere": replace(dead, host="elsewhere"),
        "no answer": replace(dead, api=f"http://127.0.0.1:{port}/api", flow_run=str(UUID(int=1))),
        "unknown": replace(dead, flow_run=str(UUID(int=2))),
        "no such pid": replace(dead, pid=child.pid),
    }
    leases_left = {}
    for kind, lease in kinds.items():
        flow_run = lease.flow_run or str(client.create_flow_run(align, state=Running()).id)
        leases_left[kind] = replace(lease, flow_run=flow_run)
        (tmp_path / "leases").mkdir(exist_ok=True)
        (tmp_path / "leases" / f"{flow_run}.json").write_text(json.dumps(leases_left[kind].__dict__))
    client.set_flow_run_state(UUID(leases_left["to be cancelled"].flow_run), Cancelling())

    said = leases.sweep(tmp_path)

    assert len(said) == 3 and all(leases.WHY in sentence for sentence in said)
    ids = {kind: UUID(lease.flow_run) for kind, lease in leases_left.items()}
    states = {kind: client.read_flow_run(id_).state for kind, id_ in ids.items() if id_.int > 2}
    names = {kind: state.name for kind, state in states.items() if state}
    assert names.pop("to be cancelled") == "Cancelled" and names.pop("alive") == names.pop("elsewhere") == "Running"
    assert set(names.values()) == {"Crashed"} and len(names) == 3
    left = {path.stem for path in (tmp_path / "leases").glob("*.json")}
    assert left == {leases_left[kind].flow_run for kind in ("alive", "elsewhere", "no answer")}
    assert leases.sweep(tmp_path) == [] == leases.sweep(tmp_path / "nothing")


# The temporary server


def temporary_server(runs: Path) -> int:
    """Return the process of Prefect's temporary server for a runs folder, or 0."""
    home, module = f"PREFECT_HOME={runs / 'prefect'}".encode(), b"--temporary"
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment, command = ((process / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
            if home in environment and module in command:
                return int(process.name)
    return 0


@pytest.mark.slow
def test_a_temporary_server_that_dies_is_started_again(
    start: Callable[..., "subprocess.Popen[str]"], runs: Path, undisturbed: Path, small: list[str]
) -> None:
    process = start("run", "quickstart", changes=[*small, "compute.processes=2"], PREFECT_API_URL="")
    until(lambda: updates(runs, "sft"))
    os.kill(temporary_server(runs), signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0 and "temporary server died; it is started again" in out, out
    assert weights(runs) == weights(undisturbed) and not temporary_server(runs)


@pytest.mark.slow
def test_sigterm_ends_the_command_whose_temporary_server_is_dead(
    start: Callable[..., "subprocess.Popen[str]"], runs: Path, small: list[str]
) -> None:
    process = start("run", "quickstart", changes=[*small, "sft.save_every=1000"], PREFECT_API_URL="")
    until(lambda: updates(runs, "sft"))
    os.kill(temporary_server(runs), signal.SIGKILL)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143 and "sacpo: terminated; the same command goes on" in out, out
    assert "Traceback" not in out
    assert list(runs.glob("store/sft-*.partial/checkpoint-*/complete.json"))


# The run


def test_a_run_that_is_killed_goes_on_to_the_same_weights(
    start: Callable[..., "subprocess.Popen[str]"],
    run: Callable[..., tuple[int, str]],
    runs: Path,
    undisturbed: Path,
    small: list[str],
) -> None:
    killed = start("run", "quickstart", changes=small)
    until(lambda: checkpoints(runs, "dpo") or killed.poll() is not None)
    killed.send_signal(signal.SIGKILL)
    for pid in workers(
        runs
    ):  # an orphan ends by itself, but only within half a second, in which it may finish the step
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL
    code, out = run("run", "quickstart", changes=small)
    assert code == 0 and "a killed attempt came to" in out, out
    assert weights(runs) == weights(undisturbed)
    assert not list(runs.glob("leases/*.json")) and set(statuses(runs).values()) == {"FINISHED"}
    mlflow = connection.client(runs)
    assert len(mlflow.search_model_versions("name = 'quickstart'")) == 1


# Who hears of it


def test_an_event_of_a_short_process_calls_the_webhook_of_the_documentation(
    client: SyncPrefectClient, prefect: str
) -> None:
    heard: list[tuple[str | None, dict[str, Any]]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.headers["Authorization"], json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    team = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=team.serve_forever, daemon=True).start()
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    block = Webhook(url=f"http://127.0.0.1:{team.server_port}/", headers=headers).save("team", overwrite=True)
    text = (ROOT / "docs" / "notifications.md").read_text("utf-8").partition("```yaml\n")[2].partition("```")[0]
    automation = yaml.safe_load(text.replace("ID-OF-THE-BLOCK", str(block)))
    made = client._client.post("/automations/", json=automation)
    assert made.status_code == 201, made.text
    try:
        emit = (
            "from tasks.registry import events\n"
            "events.emit(events.FAILED, 'sacpo.run.mine', {'why': 'it said \"no\"'})\n"
            "events.emit(events.CHANGED, 'sacpo.model.mine', {'version': '3'})\n"
        )
        environment = os.environ | {"PREFECT_API_URL": prefect}
        end = time.monotonic() + 600
        while len({body["text"] for _, body in heard}) < 2:  # until the server's triggers know of the automation
            assert time.monotonic() < end, heard
            subprocess.run([sys.executable, "-c", emit], env=environment, cwd=ROOT, check=True)
            time.sleep(1)
    finally:
        client._client.delete(f"/automations/{made.json()['id']}")
        team.shutdown()
    assert {token for token, _ in heard} == {"Bearer secret"}
    payloads = {said["text"]: said["more"] for _, said in heard}
    assert payloads.pop("sacpo.run.failed mine") == {"why": 'it said "no"'}
    assert payloads == {"sacpo.champion.changed mine": {"version": "3"}}


def test_an_event_that_nobody_takes_fails_nothing(port: int) -> None:
    emit = "from tasks.registry import events\nevents.emit(events.FAILED, 'sacpo.run.mine', {})\n"
    emit += "events.flush(1); print('on')"
    environment = os.environ | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    process = subprocess.Popen(
        [sys.executable, "-c", emit], env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=-3
    )
    try:
        assert process.stdout and process.stdout.readline() == "on\n"
    finally:
        process.kill()


# MLflow


@pytest.mark.slow
def test_what_a_dead_mlflow_server_missed_is_sent_when_it_is_back(
    run: Callable[..., tuple[int, str]],
    start: Callable[..., "subprocess.Popen[str]"],
    runs: Path,
    port: int,
    tmp_path: Path,
    undisturbed: Path,
) -> None:
    address = f"http://127.0.0.1:{port}"
    command = [str(Path(sys.executable).parent / "mlflow"), "server", "--workers", "1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    def server() -> "subprocess.Popen[bytes]":
        begun = subprocess.Popen(
            command, env=environment, cwd=tmp_path, start_new_session=True, stdout=-3, stderr=subprocess.DEVNULL
        )
        until(answers)
        return begun

    first = server()
    process = start("run", "quickstart", MLFLOW_TRACKING_URI=address)
    until(lambda: updates(runs, "sft") or process.poll() is not None)
    os.killpg(first.pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 2 and f"MLflow at {address} does not answer" in out and "merge · q=0.5" in out
    second = server()
    try:
        code, out = run("run", "quickstart", MLFLOW_TRACKING_URI=address)
        assert code == 0, out
        import mlflow

        there = mlflow.MlflowClient(address)
        assert len(there.search_model_versions("name = 'quickstart'")) == 1
        found = there.search_runs([there.get_experiment_by_name("quickstart").experiment_id])
        assert {held.info.status for held in found} == {"FINISHED"}
        curves = {held.info.run_name: len(there.get_metric_history(held.info.run_id, "loss")) for held in found}
        assert [curves[name] for name in curves if "dpo" in name] == [12, 12, 12] and curves["base · sft"] == 60
    finally:
        os.killpg(second.pid, signal.SIGKILL)
