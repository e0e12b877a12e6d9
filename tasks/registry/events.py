"""What others may listen for: Prefect events of fixed names (docs/notifications.md)."""

import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from models.gate.promotion_log import Entry
from tasks.access.temporary_server import lasting

if TYPE_CHECKING:
    from models.gate.gate import Verdict

FAILED = "sacpo.run.failed"
DECIDED = "sacpo.gate.decided"
CHANGED = "sacpo.champion.changed"
UPDATED = "sacpo.data.updated"


def emit(name: str, resource: str, payload: dict[str, Any]) -> None:
    """Tell who listens; Prefect sends it in the background, at the latest when this process ends.

    Without a server that stays nobody listens, and none is started for it.

    Args:
        name: one of the names above.
        resource: what it happened to: `sacpo.run.NAME`, `sacpo.model.NAME` or `sacpo.data.NAME`.
        payload: what happened, as docs/notifications.md says.
    """
    from prefect.events import emit_event

    if not lasting():
        return
    logging.getLogger("EventsWorker").setLevel(logging.ERROR)  # at every end: "Still processing items: 1 remaining"
    label = resource.split(".", 2)[-1]
    with suppress(Exception):  # who cannot be told must not stop a run
        emit_event(name, {"prefect.resource.id": resource, "prefect.resource.name": label}, payload=payload)


def flush(seconds: float = 3.0) -> None:
    """Wait until what was emitted is sent."""
    from prefect.events.worker import EventsWorker

    with suppress(Exception):
        EventsWorker.drain_all(timeout=seconds, at_exit=False)


def gate_decided(model: str, verdict: "Verdict") -> None:
    """Tell the verdict of the gate."""
    told = {"candidate": verdict.candidate, "passes": verdict.passes, "why_not": verdict.why_not}
    told |= {"holds": verdict.holds, "value": verdict.value}
    told |= {"lower_bound": verdict.lower_bound, "at_least": verdict.at_least, "incidents": len(verdict.incidents)}
    emit(DECIDED, f"sacpo.model.{model}", told)


def champion(model: str, entry: Entry) -> None:
    """Tell which version serves from now on."""
    told = {"version": entry.version_to, "uri": f"models:/{model}/{entry.version_to}", "before": entry.version_from}
    told |= {"action": entry.action, "who": entry.who, "why": entry.why, "number": str(entry.number)}
    emit(CHANGED, f"sacpo.model.{model}", told)
