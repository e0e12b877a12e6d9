"""The runs folder as the home of Prefect and MLflow: it can be written, it is quiet, and named servers answer."""

import http.client
import os
import shutil
import urllib.error
import urllib.request
from pathlib import Path

from models.errors import BadPlace
from tasks.launch import reap
from tasks.run import root

LEAST_FREE = 64 * 2**20
"""Bytes; on less, Prefect's own server fails without a word that would help."""
QUIET = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Nothing is sent anywhere, and servers say only what matters."""


def settle() -> None:
    """Give Prefect and MLflow a home in the runs folder, and keep them quiet; what the user set stays."""
    runs = writable()
    reap(runs)
    for name, health in (("PREFECT_API_URL", "/health"), ("MLFLOW_TRACKING_URI", "/health")):
        _answers(name, os.environ.get(name, ""), health)
    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}  # errors are told in one line; the pages have all
    for name, value in {"PREFECT_HOME": str(runs / "prefect"), **quiet, **QUIET}.items():
        os.environ.setdefault(name, value)


def writable() -> Path:
    """Return the runs folder, made if need be.

    Raises:
        BadPlace: it cannot be written, or its disk is full.
    """
    runs = root()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / ".writable"
        probe.write_text("")
        probe.unlink()
        free = shutil.disk_usage(runs).free
    except OSError as error:
        raise BadPlace(f"{runs}: cannot be written ({error.strerror}); set SACPO_RUNS to a folder that can") from error
    if free < LEAST_FREE:
        raise BadPlace(
            f"{runs}: only {free / 2**20:.0f} MiB free; Prefect and MLflow alone need "
            f"{LEAST_FREE / 2**20:.0f}; free space, or set SACPO_RUNS to another disk"
        )
    return runs


def _answers(name: str, address: str, health: str) -> None:
    """Refuse a server address that does not answer, before anything is trained."""
    if not address.startswith("http"):
        return
    try:
        urllib.request.urlopen(address.rstrip("/") + health, timeout=5).close()
    except urllib.error.HTTPError:
        return  # something answers; whether it lets us in is its own message
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise BadPlace(f"{name} = {address} does not answer ({why}); start that server, or unset {name}") from error
