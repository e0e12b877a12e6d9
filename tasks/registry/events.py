"""What others may listen for: Prefect events of fixed names (docs/notifications.md)."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import JsonValue

from models.gate.promotion_log import Entry
from tasks.access.temporary_server import lasting_server

if TYPE_CHECKING:
    from models.gate.gate import Verdict

FAILED = "sacpo.run.failed"
DECIDED = "sacpo.gate.decided"
CHANGED = "sacpo.champion.changed"
UPDATED = "sacpo.data.updated"

_logger = logging.getLogger(__name__)


def emit(name: str, resource: str, payload: Mapping[str, JsonValue]) -> None:
    """Emit an event; Prefect sends it in the background, at the latest when this process ends.

    Only a server that stays can have listeners, so without one nothing is emitted, and none is started. An event that
    cannot be sent is logged, and stops nothing.

    Args:
        name: one of the names above.
        resource: what it happened to: `sacpo.run.NAME`, `sacpo.model.NAME` or `sacpo.data.NAME`.
        payload: what happened, as docs/notifications.md says.
    """
    from prefect.events import emit_event
    from prefect.exceptions import EventTooLarge

    if not lasting_server():
        return
    # Prefect warns at the end of every process that emitted an event: "Still processing items: 1 items remaining..."
    logging.getLogger("EventsWorker").setLevel(logging.ERROR)
    label = resource.split(".", 2)[-1]
    resource_labels = {"prefect.resource.id": resource, "prefect.resource.name": label}
    try:
        emit_event(name, resource_labels, payload=dict(payload))
    except EventTooLarge as error:  # the only error that `emit_event` raises; it logs all others itself
        _logger.warning("the event %s of %s was not sent: %s", name, resource, error)


def flush(seconds: float = 3.0) -> None:
    """Wait until what was emitted is sent, for at most `seconds`."""
    from prefect.events.worker import EventsWorker

    try:
        EventsWorker.drain_all(timeout=seconds, at_exit=False)
    except (RuntimeError, AssertionError) as error:
        # Prefect's worker is a thread with an event loop: where it has just ended, or not yet begun, waiting for it
        # raises one of these two
        _logger.warning("the last events may not have been sent: %s", error)


def gate_decided(model: str, verdict: "Verdict") -> None:
    """Emit the verdict of the gate."""
    payload: dict[str, JsonValue] = {
        "candidate": verdict.candidate,
        "passes": verdict.passes,
        "why_not": verdict.why_not,
        "holds": verdict.holds,
        "value": verdict.value,
        "lower_bound": verdict.lower_bound,
        "at_least": verdict.at_least,
        "incidents": len(verdict.incidents),
    }
    emit(DECIDED, f"sacpo.model.{model}", payload)


def champion_changed(model: str, entry: Entry) -> None:
    """Emit which version serves from now on."""
    payload = {
        "version": entry.version_to,
        "uri": f"models:/{model}/{entry.version_to}",
        "before": entry.version_from,
        "action": entry.action,
        "who": entry.who,
        "why": entry.why,
        "number": str(entry.number),
    }
    emit(CHANGED, f"sacpo.model.{model}", payload)
