"""The environment of Prefect's and MLflow's clients: a home in the runs folder, quiet, and servers that answer."""

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
from typing import TypedDict, cast
from urllib.parse import urlsplit
from uuid import uuid4

from pydantic import JsonValue

from models.errors import BadPlace
from models.files.kept import RunsFolderEntry
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
"""Settings with which neither server sends anything to its makers, and Prefect's logs warnings and errors only."""
BROKEN_CONNECTION = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)
"""Errors of a connection that a proxy or a restart cut: unlike a refused one, it had reached a server."""
CLIENT_RETRIES = "6"
"""How often Prefect's client tries a request again, after twice the pause each time: two minutes in all, in which a
temporary server that died is started again."""
VERSION_WAIT, DATABASE_WAIT = 30.0, 90.0
"""Seconds to wait for an answer. In Prefect's database a request may wait for a minute: sqlite has one writer."""
RETRY_PAUSES = (1, 2, 4, 8)
"""Seconds before a request is sent again, in this order."""
LONGEST_PAUSE_AFTER_BREAK = 2
"""Seconds: a broken connection is tried again only after pauses up to this one, so twice."""
VERSION_PATHS = {"MLFLOW_TRACKING_URI": "/version", "PREFECT_API_URL": "/admin/version"}
"""Variable that names a server → path at which the server returns its version, if the password is right."""
PASSWORDS = {
    "MLFLOW_TRACKING_URI": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
    "PREFECT_API_URL": ("PREFECT_API_AUTH_STRING",),
}
"""Variable that names a server → variables that hold user and password for it; joined by colons they are both."""


class PrefectRecord(TypedDict, total=False):
    """The keys that we read of a record which Prefect's API returns: a deployment, a worker, an automation, …."""

    id: str
    name: str
    last_heartbeat_time: str | None
    """Of workers only: an ISO timestamp."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Raises `HTTPError` for a redirect: following it would send the password to a host that an answer names."""

    def redirect_request(self, *_: object) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirects)
"""For servers elsewhere; it uses the proxy that the environment names."""
LOOPBACK_OPENER = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))
"""For servers on this machine; it uses no proxy, which would learn the password."""


def configure_clients() -> None:
    """Give Prefect and MLflow a home in the runs folder, closed and quiet; what the user set stays.

    Raises:
        BadPlace: the folder cannot be written, a database in it is damaged, or a named server does not answer or does
            not let us in.
    """
    runs = writable()
    os.environ.update(proxies.direct(os.environ))
    for sentence in health.check(runs, os.environ):
        terminal.say(sentence, "dim")
    os.environ.update(passwords.credentials(runs, os.environ))
    if not os.environ.get("PREFECT_API_URL"):
        os.environ.update(passwords.temporary(runs, os.environ))
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", CLIENT_RETRIES)
    # a server that cannot be used is found now, not after hours of training
    for name, path in VERSION_PATHS.items():
        if os.environ.get(name, "").startswith("http"):
            request_json(name, path, os.environ)
    # logging would otherwise print a traceback per batch of log lines that a dead Prefect server did not take
    logging.raiseExceptions = False
    # the command line prints each error as one line itself; Prefect's pages have the whole log
    console_off = {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"}
    # Prefect logs a line per event that a dead server did not take
    console_off |= {"PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL"}
    for name, value in {"PREFECT_HOME": str(runs / RunsFolderEntry.prefect), **console_off, **QUIET}.items():
        os.environ.setdefault(name, value)


def refuse_hidden_server() -> None:
    """Refuse a Prefect server that only a profile or a file of Prefect's names: it would get the password of ours.

    Raises:
        BadPlace: there is one.
    """
    from prefect.settings import Settings

    own_address = temporary_server.address()
    if os.environ.get("PREFECT_API_URL", "") != own_address:
        return
    # the variable wins over profiles and files, so Prefect is asked for its settings without it
    os.environ.pop("PREFECT_API_URL", None)
    hidden_address = Settings().api.url
    if own_address:
        os.environ["PREFECT_API_URL"] = own_address
    if hidden_address:
        raise BadPlace(
            f"a profile or a file of Prefect names the server {without_password(hidden_address)}; set PREFECT_API_URL "
            "to it, and PREFECT_API_AUTH_STRING if it asks for a password; or remove it from that profile or file"
        )


def records(path: str, environment: Mapping[str, str], condition: JsonValue = None) -> list[PrefectRecord]:
    """Return the records of Prefect's that meet a condition; all of them without one.

    Args:
        path: one of the API's paths that end in `/filter`.

    Raises:
        BadPlace: as `request_json`.
    """
    reply = request_json("PREFECT_API_URL", path, environment, {} if condition is None else condition)
    return cast(list[PrefectRecord], reply)  # request_json has checked that it is a list of records


def request_json(name: str, path: str, environment: Mapping[str, str], body: JsonValue = None) -> JsonValue:
    """Ask the server that an environment variable names, with the password that the environment holds for it.

    Args:
        name: `MLFLOW_TRACKING_URI` or `PREFECT_API_URL`.
        path: what to ask for, below that address.
        body: sent as JSON by POST; without it the request is a GET.

    Returns:
        Without a body the server's version; else the record that Prefect made, or a list of them for a `/filter`.

    Raises:
        BadPlace: the server does not answer, does not let us in, or answers what that server never would.
    """
    address = environment[name].rstrip("/")
    printable = without_password(address)
    if "@" in address.partition("://")[2].partition("/")[0]:
        raise BadPlace(
            f"{name} = {printable}: put user and password into {' and '.join(PASSWORDS[name])}, not into the address"
        )
    login = ":".join(environment.get(variable, "") for variable in PASSWORDS[name])
    headers = {"Content-Type": "application/json"}
    if login.strip(":"):
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    if body is not None and name == "PREFECT_API_URL":
        headers |= _csrf_headers(address, headers)
    data, seconds = (None, VERSION_WAIT) if body is None else (json.dumps(body).encode(), DATABASE_WAIT)
    request = urllib.request.Request(address + path, data, headers)
    try:
        text = _read(request, seconds)
    except urllib.error.HTTPError as error:
        raise _refusal(name, address, path, error) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise BadPlace(
            f"{name} = {printable} does not answer ({reason}); start that server, or unset {name}"
        ) from error
    try:
        reply: JsonValue = json.loads(text)
    except ValueError:
        reply = text.strip()  # MLflow returns its version as plain text
    rows = reply if path.endswith("/filter") else [reply]
    is_right = _are_records(rows) if body is not None else re.match(r"\d+\.\d", str(reply))
    if not is_right:  # something else listens there: a router's page, a proxy's
        product = {"MLFLOW_TRACKING_URI": "MLflow", "PREFECT_API_URL": "Prefect"}[name]
        raise BadPlace(f"{name} = {printable} answers {text[:80]!r} to {path}, which is not {product}")
    return reply


def _read(request: urllib.request.Request, seconds: float) -> str:
    """Return what a server answers; send the request again where another try may succeed."""
    pauses = list(RETRY_PAUSES)
    while True:
        try:
            with _open(request, seconds) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            # Prefect answers 503 while its sqlite is locked, which happens now and then for a moment
            if error.code != 503 or not pauses:
                raise
        except OSError as error:
            is_broken = isinstance(getattr(error, "reason", error), BROKEN_CONNECTION)
            if not is_broken or not pauses or pauses[0] > LONGEST_PAUSE_AFTER_BREAK:
                raise
        time.sleep(pauses.pop(0))


def _refusal(name: str, address: str, path: str, error: urllib.error.HTTPError) -> BadPlace:
    """Return what an answer with an error code means, and what to do."""
    printable = without_password(address)
    if error.code in (401, 403):
        return BadPlace(f"{name} = {printable} refuses us; set {' and '.join(PASSWORDS[name])}")
    if error.code == 404 and name == "PREFECT_API_URL" and not address.endswith("/api"):
        return BadPlace(f"{name} = {printable} is not Prefect's API; it ends in /api: {printable}/api")
    if 300 <= error.code < 400:
        return BadPlace(f"{name} = {printable} sends us to another address; give the one that answers itself")
    error_text = error.read().decode("utf-8", "replace")[:200]
    return BadPlace(f"{name} = {printable} answers {error.code} to {path}: {error_text}")


def _are_records(rows: JsonValue) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) and "name" in row for row in rows)


def _open(request: urllib.request.Request, seconds: float) -> http.client.HTTPResponse:
    opener = LOOPBACK_OPENER if urlsplit(request.full_url).hostname in proxies.LOOPBACK else OPENER
    response: http.client.HTTPResponse = opener.open(request, timeout=seconds)
    return response


def _csrf_headers(address: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers by which Prefect tells our request from a forged one; none where it asks for no such token."""
    client = str(uuid4())
    try:
        request = urllib.request.Request(f"{address}/csrf-token?client={client}", headers=dict(headers))
        with _open(request, DATABASE_WAIT) as response:
            return {"Prefect-Csrf-Client": client, "Prefect-Csrf-Token": json.load(response)["token"]}
    except (OSError, ValueError, KeyError, TypeError):
        # a server with CSRF protection off answers 422 here; any other fault shows in the request that follows
        return {}
