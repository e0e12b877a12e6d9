"""The runs folder as the home of Prefect and MLflow: it can be written, it is quiet, and named servers answer."""

import base64
import http.client
import json
import logging
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.errors import BadPlace
from tasks.launch import reap
from tasks.run import root
from tasks.tracking import without_password

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
VERSIONS = {"MLFLOW_TRACKING_URI": "/version", "PREFECT_API_URL": "/admin/version"}
"""Where each server tells its version, to those whom it lets in."""
PASSWORDS = {
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "PREFECT_API_URL": ("PREFECT_API_AUTH_STRING",),
}
"""What lets us in, where a server asks for it."""


def settle() -> None:
    """Give Prefect and MLflow a home in the runs folder, and keep them quiet; what the user set stays."""
    runs = writable()
    reap(runs)
    for name, path in VERSIONS.items():
        if os.environ.get(name, "").startswith("http"):  # before anything is trained
            ask(name, path, os.environ)
    logging.raiseExceptions = False  # else a line per batch of the log that a dead Prefect server did not take
    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}  # errors are told in one line; the pages have all
    quiet |= {"PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL"}  # a line per event that a dead server did not take
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


def ask(name: str, path: str, environment: Mapping[str, str], body: Any = None) -> Any:
    """Ask the server that an environment variable names, with the password that the environment holds for it.

    Raises:
        BadPlace: it does not answer, or does not let us in.
    """
    address = environment[name].rstrip("/")
    shown = without_password(address)
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise BadPlace(f"{name} = {shown}: put user and password into {' and '.join(PASSWORDS[name])}, not in there")
    given = ":".join(environment.get(secret, "") for secret in PASSWORDS[name])
    headers = {"Content-Type": "application/json"}
    if given.strip(":"):
        headers["Authorization"] = f"Basic {base64.b64encode(given.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, headers)
    try:
        for patience in (1, 2, 4, 8, 0):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    text = answer.read().decode()
                break
            except urllib.error.HTTPError as error:
                if error.code != 503 or not patience:  # Prefect's sqlite is locked for a moment now and then
                    raise
                time.sleep(patience)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise BadPlace(f"{name} = {shown} refuses us; set {' and '.join(PASSWORDS[name])}") from error
        if error.code == 404 and name == "PREFECT_API_URL" and not address.endswith("/api"):
            raise BadPlace(f"{name} = {shown} is not Prefect's API; it ends in /api: {shown}/api") from error
        told = error.read().decode("utf-8", "replace")[:200]
        raise BadPlace(f"{name} = {shown} answers {error.code} to {path}: {told}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise BadPlace(f"{name} = {shown} does not answer ({why}); start that server, or unset {name}") from error
    try:
        return json.loads(text)
    except ValueError:
        return text
