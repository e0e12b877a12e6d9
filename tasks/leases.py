"""Who is running: a file per flow run with the process that carries it out, so that no death goes unnoticed.

A process that is killed says nothing, and Prefect and MLflow would call its run running for ever. `sweep` finds the
leases whose process is gone and closes both. A run that ends in a way that Prefect was told of gives its lease back.
"""

import os
import platform
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from filelock import FileLock

from models.files import sealed
from models.files.kept import Kept
from tasks.access import passwords
from tasks.access.temporary_server import lasting
from tasks.registry import events
from tasks.work.processes import started
from tasks.work.runs_folder import root

F = TypeVar("F")

HEALTH_TIMEOUT = 3.0
"""Seconds that a Prefect server has to answer."""
GOES_ON = "the same recipe goes on from its checkpoints"
WHY = "its process was killed; run the same command to continue"
UNFINISHED = ("RUNNING", "PENDING", "CANCELLING", "PAUSED")


@dataclass(frozen=True)
class Lease:
    """One flow run, and the process that carries it out."""

    flow_run: str
    name: str
    """Name of the recipe, which is the MLflow experiment."""
    run: str
    """Digest of the run, by which MLflow knows it; empty where MLflow holds none."""
    pid: int
    started: str
    """Boot and clock tick at which the process started: a number alone is given to others later."""
    host: str
    api: str
    """Address of the Prefect server; empty for the temporary one, whose database lies in PREFECT_HOME."""

    @property
    def alive(self) -> bool:
        """Whether the process lives; one of another host is taken to."""
        return self.host != platform.node() or started(self.pid) == self.started


def take(root: Path, name: str, run: str = "") -> None:
    """Leave a lease for the flow run that calls; outside a flow run there is nobody to be missed."""
    from prefect.runtime import flow_run

    if flow_run.id:
        api = lasting()
        pid = os.getpid()
        lease = Lease(str(flow_run.id), name, run, pid, started(pid), platform.node(), api)
        _folder(root).mkdir(parents=True, exist_ok=True)
        sealed.write(_folder(root) / f"{lease.flow_run}.json", asdict(lease))


def watched(flow: F) -> F:
    """Make a flow give its lease back when Prefect knows that it has ended, and say so if it failed.

    Not when it was cancelled: Prefect would start a process for that before it calls the run cancelled.
    """
    hooked: Any = flow
    for when in (hooked.on_completion, hooked.on_failure, hooked.on_crashed):
        when(_ended)
    return flow


def sweep(root: Path) -> list[str]:
    """Close the flow runs and MLflow runs whose process is gone, and return a sentence for each.

    What cannot be closed now, since a server does not answer, is left for the next sweep.
    """
    if not any(_folder(root).glob("*.json")):
        return []
    done = []
    with FileLock(_folder(root) / "lock"):
        leases = {path: lease for path in sorted(_folder(root).glob("*.json")) if (lease := read(path))}
        dead = {path: lease for path, lease in leases.items() if not lease.alive}
        going_on = {lease.run for lease in leases.values() if lease.alive}  # the same recipe, begun again
        for path, lease in dead.items():
            with suppress(Exception):  # a server that does not answer: the next sweep
                crashed = _crashed(root, lease)
                if lease.run and lease.run not in going_on:
                    _killed(root, lease)
                path.unlink()
                if crashed:
                    told = {"flow_run_id": lease.flow_run, "state": "Crashed", "why": WHY}
                    events.emit(events.FAILED, f"sacpo.run.{lease.name}", told)
                    done.append(f"{lease.name} (flow run {lease.flow_run}): {WHY}")
    return done


def _ended(flow: Any, flow_run: Any, state: Any) -> None:
    """Give the lease back; a worker that tells of the death of its flow process sweeps instead."""
    path = _folder(root()) / f"{flow_run.id}.json"
    lease = read(path)
    if lease and lease.pid == os.getpid():
        path.unlink(missing_ok=True)
    elif lease:
        sweep(root())
    # a flow inside another one, as in `retrain`, leaves the telling to the outer one
    if (state.is_failed() or state.is_crashed()) and flow_run.parent_task_run_id is None:
        told = {"flow_run_id": str(flow_run.id), "state": state.name, "why": state.message or ""}
        events.emit(events.FAILED, f"sacpo.run.{lease.name if lease else flow_run.name}", told)
        events.flush()  # a process that was told to end has no time for it later


def _login(root: Path, api: str) -> dict[str, Any]:
    """Return what lets us into a Prefect server: what the settings hold for it, or the password of one of ours."""
    settings = _settings().api
    if (settings.url or "").rstrip("/") == api.rstrip("/"):
        key, auth = settings.key, settings.auth_string
        return {
            "api_key": key.get_secret_value() if key else None,
            "auth_string": auth.get_secret_value() if auth else None,
        }
    return {"auth_string": passwords.credentials(root, {"PREFECT_API_URL": api}).get("PREFECT_API_AUTH_STRING")}


def _crashed(root: Path, lease: Lease) -> bool:
    """Set a flow run that Prefect takes for running CRASHED, or CANCELLED if it was to be; return whether it crashed.

    Raises:
        Exception: no server that knows the run answers.
    """
    from prefect.client.orchestration import SyncPrefectClient, get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    if lease.api and _answers(lease.api):
        client = SyncPrefectClient(lease.api, **_login(root, lease.api))
    else:  # a server on the same database may have another address now
        client = get_client(sync_client=True)
    with client:
        try:
            state = client.read_flow_run(UUID(lease.flow_run)).state
        except ObjectNotFound:
            if lease.api and not _answers(lease.api):
                raise  # another database; its own server may come back
            return False
        if state is None or state.type.value not in UNFINISHED:
            return False
        asked_for = state.is_cancelling()  # and so it happened
        state = Cancelled(message=f"cancelled; {GOES_ON}") if asked_for else Crashed(message=WHY)
        client.set_flow_run_state(UUID(lease.flow_run), state, force=True)
        return not asked_for


def _killed(root: Path, lease: Lease) -> None:
    from tasks.tracking.mlflow_run import close_killed

    close_killed(root, lease.name, lease.run)


def _settings() -> Any:
    from prefect.settings import get_current_settings

    return get_current_settings()


def _answers(api: str) -> bool:
    try:
        urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=HEALTH_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _folder(root: Path) -> Path:
    return root / Kept.leases


def read(path: Path) -> Lease | None:
    """Return a lease; none where it is gone, or cannot be read."""
    return sealed.read(path, Lease)
