"""How MLflow is reached: its address, a client, the time that it gets for an answer, and the errors that it raises."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from models.files.kept import RunsFolderEntry
from tasks.access import passwords, proxies
from tasks.tracking import log

if TYPE_CHECKING:
    from mlflow import MlflowClient

SERVER = os.environ.get("MLFLOW_TRACKING_URI", "")
"""The server that the user named, if any; read once, since mlflow itself sets the variable later."""
ANSWER_TIMEOUT = "10"
"""Seconds for an answer of MLflow, as the text of an environment variable."""
WEIGHTS_TIMEOUT = "3600"
"""The same for an answer that comes when a file of weights has been moved: a server that keeps artifacts elsewhere (S3)
takes the whole file, copies it there, and answers then."""


def uri(root: Path) -> str:
    """Return the tracking address: `MLFLOW_TRACKING_URI`, else a sqlite file in the runs folder."""
    own_file = f"sqlite:///{root / RunsFolderEntry.mlflow}"
    return passwords.with_numeric_host(root, "MLFLOW_TRACKING_URI", SERVER) or own_file


def shown_uri(root: Path) -> str:
    """Return the tracking address as it may be shown."""
    return without_password(uri(root))


def without_password(address: str) -> str:
    """Return an address without user and password."""
    scheme, separator, rest = address.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def client(root: Path) -> "MlflowClient":
    """Return an MLflow client for this runs folder.

    Raises:
        BadPlace: the password of the runs folder, which our own server asks for, cannot be read.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", ANSWER_TIMEOUT)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # imported here: it takes seconds, and mlflow reads the variables above while it is imported
    import mlflow

    # MLflow logs the traceback of a database that it cannot use; our own sentence says the same in one line
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    if SERVER:
        variables = passwords.credentials(root, {**os.environ, "MLFLOW_TRACKING_URI": SERVER, "PREFECT_API_URL": ""})
        # only the login and the proxies go into the environment here: `set_tracking_uri` sets the address
        variables.pop("MLFLOW_TRACKING_URI", None)
        os.environ.update(proxies.direct(os.environ) | variables)
    else:
        # without this variable every client leaves an empty ./mlruns in the folder in which the command was given
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = (root / RunsFolderEntry.artifacts).as_uri()
        root.mkdir(parents=True, exist_ok=True)
        log.database(root / RunsFolderEntry.mlflow)
    mlflow.set_tracking_uri(uri(root))
    return mlflow.MlflowClient()


@contextmanager
def long_timeout() -> Iterator[None]:
    """Give MLflow the time that weights take; a limit that the user has set stays."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name, ANSWER_TIMEOUT)
    os.environ[name] = WEIGHTS_TIMEOUT if before == ANSWER_TIMEOUT else before
    try:
        yield
    finally:
        os.environ[name] = before


def failures() -> tuple[type[Exception], ...]:
    """Return what MLflow raises where it cannot do or find what it is asked for; imports mlflow."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)


def error_code(error: Exception) -> str:
    """Return MLflow's code of an error, as `RESOURCE_DOES_NOT_EXIST`; empty where another library raised it."""
    return str(getattr(error, "error_code", ""))
