"""Leases: a file per flow run that names the process that carries it out, so that no death goes unnoticed.

A process that is killed tells no server, and Prefect and MLflow would show its run as running for ever. `sweep` finds
the leases whose process is gone and closes both runs. A run whose end Prefect knows of gives its lease back.
"""

import logging
import os
import platform
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID

from filelock import FileLock
from typing_extensions import TypedDict

from models.files import sealed
from models.files.kept import RunsFolderEntry
from tasks.access import passwords
from tasks.access.temporary_server import lasting_server
from tasks.best_effort import best_effort
from tasks.registry import events
from tasks.work.processes import identity_of
from tasks.work.runs_folder import root

if TYPE_CHECKING:
    from prefect import Flow, State
    from prefect.client.schemas.objects import FlowRun
    from prefect.settings import Settings

F = TypeVar("F", bound="Flow[..., Any]")

HEALTH_TIMEOUT = 3.0
"""Seconds that a Prefect server has to answer."""
GOES_ON = "the same recipe goes on from its checkpoints"
WHY = "its process was killed; run the same command to continue"
UNFINISHED = ("RUNNING", "PENDING", "CANCELLING", "PAUSED")
"""Types of Prefect's states that a run with a dead process cannot leave by itself."""


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
    """Boot and clock tick at which the process started: the system gives the same number to another process later."""
    host: str
    api: str
    """Address of the Prefect server; empty for the temporary one, whose database lies in PREFECT_HOME."""

    @property
    def alive(self) -> bool:
        """Whether the process lives; one of another host, which cannot be looked at from here, counts as alive."""
        return self.host != platform.node() or identity_of(self.pid) == self.started


def take(root: Path, name: str, run: str = "") -> None:
    """Leave a lease for the flow run that calls, in place of an earlier one; outside a flow run do nothing.

    Args:
        name: of the recipe.
        run: digest of the run, as soon as it is known.
    """
    from prefect.runtime import flow_run

    if flow_run.id:
        pid = os.getpid()
        lease = Lease(str(flow_run.id), name, run, pid, identity_of(pid), platform.node(), lasting_server())
        _folder(root).mkdir(parents=True, exist_ok=True)
        sealed.write(_folder(root) / f"{lease.flow_run}.json", asdict(lease))


def gives_lease_back(flow: F) -> F:
    """Make a flow give its lease back when Prefect knows that it has ended, and say so if it failed.

    Not when it was cancelled: Prefect would start a process for that before it calls the run cancelled.
    """
    for when in (flow.on_completion, flow.on_failure, flow.on_crashed):
        when(_give_back)
    return flow


def sweep(root: Path) -> list[str]:
    """Close the flow runs and MLflow runs whose process is gone, and return a sentence for each.

    What cannot be closed now, since a server does not answer, is left for the next sweep.
    """
    if not any(_folder(root).glob("*.json")):
        return []
    sentences = []
    with FileLock(_folder(root) / "lock"):  # two sweeps at once would tell of one death twice
        leases = {path: lease for path in sorted(_folder(root).glob("*.json")) if (lease := read(path))}
        dead = {path: lease for path, lease in leases.items() if not lease.alive}
        # The same recipe may have been started again: its run in MLflow, which has the same digest, is not dead.
        going_on = {lease.run for lease in leases.values() if lease.alive}
        for path, lease in dead.items():
            # At `info`, since a server that is down for days is no news at every start; the next sweep tries again.
            with best_effort(f"close flow run {lease.flow_run}, whose process is gone", logging.INFO):
                crashed = _close_flow_run(root, lease)
                if lease.run and lease.run not in going_on:
                    _close_tracking(root, lease)
                path.unlink()
                if crashed:
                    payload = {"flow_run_id": lease.flow_run, "state": "Crashed", "why": WHY}
                    events.emit(events.FAILED, f"sacpo.run.{lease.name}", payload)
                    sentences.append(f"{lease.name} (flow run {lease.flow_run}): {WHY}")
    return sentences


def _give_back(flow: "Flow[..., Any]", flow_run: "FlowRun", state: "State[Any]") -> None:
    """Give the lease back. In a worker, which Prefect lets call this after a flow process died, sweep instead."""
    path = _folder(root()) / f"{flow_run.id}.json"
    lease = read(path)
    if lease and lease.pid == os.getpid():
        path.unlink(missing_ok=True)
    elif lease:
        sweep(root())
    # a flow inside another one leaves the telling to the outer one
    if (state.is_failed() or state.is_crashed()) and flow_run.parent_task_run_id is None:
        payload = {"flow_run_id": str(flow_run.id), "state": state.name, "why": state.message or ""}
        events.emit(events.FAILED, f"sacpo.run.{lease.name if lease else flow_run.name}", payload)
        events.flush()  # a process that was told to end has no time for it later


class Login(TypedDict, total=False):
    """What Prefect's client takes beside the address of a server."""

    api_key: str | None
    auth_string: str | None


def _login(root: Path, api: str) -> Login:
    """Return what lets us into a Prefect server: what the settings hold for it, or the password of one of ours."""
    settings = _settings().api
    if (settings.url or "").rstrip("/") == api.rstrip("/"):
        key, auth = settings.key, settings.auth_string
        return {
            "api_key": key.get_secret_value() if key else None,
            "auth_string": auth.get_secret_value() if auth else None,
        }
    return {"auth_string": passwords.credentials(root, {"PREFECT_API_URL": api}).get("PREFECT_API_AUTH_STRING")}


def _close_flow_run(root: Path, lease: Lease) -> bool:
    """Set a flow run that Prefect shows as running to CRASHED, or to CANCELLED if that was asked for.

    Returns:
        Whether it is CRASHED now.

    Raises:
        Exception: no server that knows the run answers; Prefect's client has no common class for that.
    """
    from prefect.client.orchestration import SyncPrefectClient, get_client
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled, Crashed

    if lease.api and _answers(lease.api):
        client = SyncPrefectClient(lease.api, **_login(root, lease.api))
    else:  # a server on the same database may have another address by now
        client = get_client(sync_client=True)
    with client:
        try:
            state = client.read_flow_run(UUID(lease.flow_run)).state
        except ObjectNotFound:
            if lease.api and not _answers(lease.api):
                raise  # the server that we asked has another database; the one of this run may come back
            return False
        if state is None or state.type.value not in UNFINISHED:
            return False
        cancelling = state.is_cancelling()  # a person asked for the end, so it is no crash
        state = Cancelled(message=f"cancelled; {GOES_ON}") if cancelling else Crashed(message=WHY)
        client.set_flow_run_state(UUID(lease.flow_run), state, force=True)
        return not cancelling


def _close_tracking(root: Path, lease: Lease) -> None:
    """Close the run in MLflow as KILLED."""
    from tasks.tracking.mlflow_run import close_killed

    close_killed(root, lease.name, lease.run)


def _settings() -> "Settings":
    from prefect.settings import get_current_settings

    return get_current_settings()


def _answers(api: str) -> bool:
    """Return whether a server answers, be it with a refusal."""
    try:
        urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=HEALTH_TIMEOUT).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _folder(root: Path) -> Path:
    return root / RunsFolderEntry.leases


def read(path: Path) -> Lease | None:
    """Return a lease; none where it is gone, or cannot be read."""
    return sealed.read(path, Lease)
