"""A run of a deployment whose process, or whose worker, dies."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import AwaitingRetry, Cancelling

from flows.align import align
from models.recipe.toml import read
from tasks import leases
from tasks.tracking import connection
from tests.watching import checkpoints, gone, statuses, until, updates, weights, workers

ROOT = Path(__file__).parent.parent


@pytest.fixture
def deployed(client: SyncPrefectClient, prefect: str, runs: Path, tmp_path: Path) -> Iterator[Any]:
    """A deployment in a process pool; yields how to begin a run, and the worker's process."""
    pool = tmp_path.name.replace("_", "-")
    client.create_work_pool(WorkPoolCreate(name=pool, type="process", base_job_template={}))
    there = [{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}]
    deployment = client.create_deployment(
        client.create_flow(align), pool, work_pool_name=pool, entrypoint="flows.align.align", pull_steps=there
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PREFECT_API_URL": prefect, "SACPO_RUNS": str(runs), "PYTHONPATH": paths}
    command = [str(Path(sys.executable).parent / "prefect"), "worker", "start", "--pool", pool, "--type", "process"]
    with (tmp_path / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def begin(changes: list[str]) -> FlowRun:
        recipe = read("quickstart", changes).model_dump(mode="json", by_alias=True)
        return client.create_flow_run_from_deployment(deployment, parameters={"recipe": recipe})

    yield begin, worker
    for lease in filter(None, map(leases.read, runs.glob("leases/*.json"))):
        with suppress(OSError):
            os.kill(lease.pid, signal.SIGKILL)
    with suppress(OSError):
        os.killpg(worker.pid, signal.SIGKILL)  # a polite worker takes a minute
    worker.wait(60)


def name(client: SyncPrefectClient, flow_run: FlowRun) -> str:
    state = client.read_flow_run(flow_run.id).state
    return state.name if state else ""


def held_by(runs: Path, flow_run: FlowRun) -> int:
    """Return the process that carries a flow run out, as its lease says, or 0."""
    lease = leases.read(runs / "leases" / f"{flow_run.id}.json")
    return lease.pid if lease else 0


@pytest.mark.slow
def test_a_run_that_is_cancelled_terminated_and_killed_goes_on_to_the_same_weights(
    client: SyncPrefectClient,
    deployed: Any,
    start: Callable[..., "subprocess.Popen[str]"],
    run: Callable[..., tuple[int, str]],
    runs: Path,
    undisturbed: Path,
    small: list[str],
) -> None:
    """One long test, since every start takes seconds: from the page, with SIGTERM, with SIGKILL, then undisturbed."""
    (begin, _), rare = deployed, [*small, "sft.save_every=1000", "compute.processes=2"]  # neither changes the weights
    cancelled = begin(rare)
    until(lambda: updates(runs, "sft"))
    process = held_by(runs, cancelled)
    client.set_flow_run_state(cancelled.id, Cancelling())
    until(lambda: gone(process), 60)
    assert all(map(gone, workers(runs)))
    assert checkpoints(runs, "sft")  # 1000 updates were never reached
    until(lambda: name(client, cancelled) == "Cancelled", 60)
    log = client._client.post("/logs/filter", json={"logs": {"flow_run_id": {"any_": [str(cancelled.id)]}}}).json()
    assert log and not [line for line in log if "memory ran out" in line["message"]]  # nobody died
    assert statuses(runs)["quickstart · seed 0"] == "KILLED"

    came_to = updates(runs, "sft")
    terminated = start("run", "quickstart", changes=rare)
    until(lambda: updates(runs, "sft") > came_to or terminated.poll() is not None)
    (lease,) = map(leases.read, runs.glob("leases/*.json"))
    assert lease and lease.pid == terminated.pid and lease.alive
    begun = time.monotonic()
    terminated.send_signal(signal.SIGTERM)
    out, _ = terminated.communicate(timeout=600)
    assert terminated.returncode == 143 and "sacpo: terminated; the same command goes on" in out
    assert "base · sft: a killed attempt came to" in out and "Traceback" not in out
    assert time.monotonic() - begun < 60  # `ending.END`, and as much for a busy machine
    assert len(workers(runs)) == 4 and all(map(gone, workers(runs)))
    assert checkpoints(runs, "sft") > came_to
    assert "RUNNING" not in statuses(runs).values() and not list(runs.glob("leases/*.json"))

    killed = start("run", "quickstart", changes=rare)
    until(lambda: checkpoints(runs, "dpo") or killed.poll() is not None)
    killed.send_signal(signal.SIGKILL)
    out, _ = killed.communicate(timeout=600)
    assert killed.returncode == -signal.SIGKILL and "base · sft: a killed attempt came to" in out, out

    code, out = run("run", "quickstart", changes=rare)
    assert code == 0, out
    assert weights(runs) == weights(undisturbed)
    assert not list(runs.glob("leases/*.json")) and name(client, cancelled) == "Cancelled"
    assert set(statuses(runs).values()) == {"FINISHED"}
    mlflow = connection.client(runs)
    assert len(mlflow.search_model_versions("name = 'quickstart'")) == 1
    found = mlflow.search_runs([mlflow.get_experiment_by_name("quickstart").experiment_id])
    assert len([run for run in found if "mlflow.parentRunId" not in run.data.tags]) == 1


@pytest.mark.slow
def test_a_killed_run_is_retried_and_outlives_its_worker(
    client: SyncPrefectClient, deployed: Any, runs: Path, undisturbed: Path, small: list[str]
) -> None:
    begin, worker = deployed
    killed = begin(small)
    until(lambda: updates(runs, "dpo"))
    os.kill(held_by(runs, killed), signal.SIGKILL)
    until(lambda: name(client, killed) == "Crashed")
    until(lambda: not held_by(runs, killed), 60)  # the worker's hook
    assert "RUNNING" not in statuses(runs).values()

    def retried() -> int:
        if name(client, killed) == "Crashed":  # the worker says so twice, the second time seconds later
            client.set_flow_run_state(killed.id, AwaitingRetry(), force=True)  # as the page does
        return held_by(runs, killed)

    process = until(retried)
    os.killpg(worker.pid, signal.SIGKILL)
    until(lambda: name(client, killed) in ("Promoted", "NotPromoted"))
    until(lambda: gone(process))
    assert weights(runs) == weights(undisturbed)
    assert not list(runs.glob("leases/*.json")) and set(statuses(runs).values()) == {"FINISHED"}
    assert len(connection.client(runs).search_model_versions("name = 'quickstart'")) == 1
