"""The runs folder as the home of Prefect and MLflow: it can be written, it is quiet, and named servers answer."""

import base64
import http.client
import json
import logging
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from models.errors import BadPlace
from models.files.kept import Kept
from tasks.access import passwords, proxies, temporary_server
from tasks.tracking.connection import without_password
from tasks.work import health, terminal
from tasks.work.runs_folder import writable

QUIET = {
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Nothing is sent anywhere, and servers say only what matters."""
BROKE = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
"""What is said of a connection that a proxy or a restart cut, where somebody listens."""
RETRIES = "6"
"""Of Prefect's client, each after twice the pause: two minutes, in which a temporary server that died starts again."""
VERSION_WAIT, DATABASE_WAIT = 30.0, 90.0
"""Seconds for an answer; one that needs Prefect's database may wait there for a minute: sqlite has one writer."""
LAST_BREAK = 2
"""Seconds of the last pause after which such a connection is tried again."""
VERSION_PATHS = {"MLFLOW_TRACKING_URI": "/version", "PREFECT_API_URL": "/admin/version"}
"""Where each server tells its version, to those whom it lets in."""
PASSWORDS = {
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "PREFECT_API_URL": ("PREFECT_API_AUTH_STRING",),
}
"""What lets us in, where a server asks for it."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows nobody."""

    def redirect_request(self, *_: Any) -> None:
        return None


DIRECT = urllib.request.build_opener(_Stay)
HERE = urllib.request.build_opener(_Stay, urllib.request.ProxyHandler({}))
"""For this machine itself: a proxy would be told the password."""


def configure_clients() -> None:
    """Give Prefect and MLflow a home in the runs folder, closed and quiet; what the user set stays.

    Raises:
        BadPlace: the folder cannot be written, a database in it is damaged, or a named server does not answer or does
            not let us in.
    """
    runs = writable()
    os.environ.update(proxies.direct(os.environ))
    for sentence in health.look(runs, os.environ):
        terminal.say(sentence, "dim")
    os.environ.update(passwords.credentials(runs, os.environ))
    if not os.environ.get("PREFECT_API_URL"):
        os.environ.update(passwords.temporary(runs, os.environ))
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", RETRIES)
    for name, path in VERSION_PATHS.items():
        if os.environ.get(name, "").startswith("http"):  # before anything is trained
            request_json(name, path, os.environ)
    logging.raiseExceptions = False  # else a line per batch of the log that a dead Prefect server did not take
    quiet = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}  # errors are told in one line; the pages have all
    quiet |= {"PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL"}  # a line per event that a dead server did not take
    for name, value in {"PREFECT_HOME": str(runs / Kept.prefect), **quiet, **QUIET}.items():
        os.environ.setdefault(name, value)


def no_hidden_server() -> None:
    """Refuse a Prefect server that only a profile or a file of Prefect's names: it would get the password of ours.

    Raises:
        BadPlace: there is one.
    """
    from prefect.settings import Settings

    ours = temporary_server.address()
    if os.environ.get("PREFECT_API_URL", "") != ours:
        return
    os.environ.pop("PREFECT_API_URL", None)
    hidden = Settings().api.url
    if ours:
        os.environ["PREFECT_API_URL"] = ours
    if hidden:
        raise BadPlace(
            f"a profile or a file of Prefect's names the server {without_password(hidden)}; set PREFECT_API_URL to it, "
            "and PREFECT_API_AUTH_STRING where it asks for a password; or take it out there"
        )


def request_json(name: str, path: str, environment: Mapping[str, str], body: Any = None) -> Any:
    """Ask the server that an environment variable names, with the password that the environment holds for it.

    Raises:
        BadPlace: it does not answer, or does not let us in, or its answer is none of that server's.
    """
    address = environment[name].rstrip("/")
    shown = without_password(address)
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise BadPlace(f"{name} = {shown}: put user and password into {' and '.join(PASSWORDS[name])}, not in there")
    given = ":".join(environment.get(secret, "") for secret in PASSWORDS[name])
    headers = {"Content-Type": "application/json"}
    if given.strip(":"):
        headers["Authorization"] = f"Basic {base64.b64encode(given.encode()).decode()}"
    if body is not None and name == "PREFECT_API_URL":
        headers |= _token(address, headers)
    data, wait = (None, VERSION_WAIT) if body is None else (json.dumps(body).encode(), DATABASE_WAIT)
    request = urllib.request.Request(address + path, data, headers)
    try:
        for patience in (1, 2, 4, 8, 0):
            try:
                with _open(request, wait) as answer:
                    text = answer.read().decode()
                break
            except urllib.error.HTTPError as error:
                if error.code != 503 or not patience:  # Prefect's sqlite is locked for a moment now and then
                    raise
            except OSError as error:
                broke = isinstance(getattr(error, "reason", error), BROKE)
                if not broke or not 0 < patience <= LAST_BREAK:
                    raise
            time.sleep(patience)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise BadPlace(f"{name} = {shown} refuses us; set {' and '.join(PASSWORDS[name])}") from error
        if error.code == 404 and name == "PREFECT_API_URL" and not address.endswith("/api"):
            raise BadPlace(f"{name} = {shown} is not Prefect's API; it ends in /api: {shown}/api") from error
        if 300 <= error.code < 400:  # the password would go along to any host that an answer names
            raise BadPlace(f"{name} = {shown} sends us to another address; give the one that answers itself") from error
        told = error.read().decode("utf-8", "replace")[:200]
        raise BadPlace(f"{name} = {shown} answers {error.code} to {path}: {told}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise BadPlace(f"{name} = {shown} does not answer ({why}); start that server, or unset {name}") from error
    try:
        reply = json.loads(text)
    except ValueError:
        reply = text.strip()
    rows = reply if path.endswith("/filter") else [reply]
    named = isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows)
    if not (named if body is not None else re.match(r"\d+\.\d", str(reply))):
        whose = {"MLFLOW_TRACKING_URI": "MLflow", "PREFECT_API_URL": "Prefect"}[name]
        raise BadPlace(f"{name} = {shown} answers {text[:80]!r} to {path}, which is not {whose}")
    return reply


def _open(request: urllib.request.Request, wait: float) -> Any:
    opener = HERE if urlsplit(request.full_url).hostname in proxies.LOOPBACK else DIRECT
    return opener.open(request, timeout=wait)


def _token(address: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers with which Prefect tells us from a forged request; none where it does not ask for them."""
    client = str(uuid4())
    try:
        request = urllib.request.Request(f"{address}/csrf-token?client={client}", headers=dict(headers))
        with _open(request, DATABASE_WAIT) as response:
            return {"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": json.load(response)["token"]}
    except (OSError, ValueError, KeyError, TypeError):  # what is wrong with the server is said by the request itself
        return {}
