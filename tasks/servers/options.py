"""What `sacpo up` is asked for: ports, a team's PostgreSQL, a store; and the environment that follows from it."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from models.errors import BadPlace
from models.files.kept import Kept
from tasks.access import passwords, proxies
from tasks.servers.environment import QUIET
from tasks.tracking.connection import without_password

DATABASES = ("mlflow", "prefect", "sacpo")
"""On a team's PostgreSQL: MLflow's, Prefect's, and our own."""


@dataclass(frozen=True)
class ServerOptions:
    """What the user asked for."""

    mlflow_port: int = 5000
    prefect_port: int = 4200
    postgres: str = field(default="", repr=False)  # may hold a password
    artifacts: str = ""
    worker: bool = True

    @property
    def mlflow(self) -> str:
        """The address of MLflow: one that the user named, else ours."""
        return _named("MLFLOW_TRACKING_URI") or f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def prefect(self) -> str:
        """The address of Prefect's API: one that the user named, else ours."""
        return _named("PREFECT_API_URL") or f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def addresses(self) -> dict[str, str]:
        """Where both are, by the variables that name them."""
        return {"MLFLOW_TRACKING_URI": self.mlflow, "PREFECT_API_URL": self.prefect}

    @property
    def started(self) -> list[str]:
        """The variables of the servers that are ours to start."""
        starts = {"MLFLOW_TRACKING_URI": self.starts_mlflow, "PREFECT_API_URL": self.starts_prefect}
        return [name for name, ours in starts.items() if ours]

    @property
    def starts_mlflow(self) -> bool:
        """Whether MLflow is ours to start; the address that we print may stand in the environment."""
        return self.mlflow == f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def starts_prefect(self) -> bool:
        """Whether Prefect is ours to start."""
        return self.prefect == f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def server(self) -> SplitResult:
        """The team's PostgreSQL, taken apart.

        Raises:
            BadPlace: it is no such address; what was given is not repeated, since it may hold a password.
        """
        parts = urlsplit(self.postgres)
        try:
            whole = parts.hostname and (parts.port or True)
        except ValueError:
            whole = False
        if parts.scheme not in ("postgresql", "postgres") or not whole or parts.path.strip("/") or parts.query:
            raise BadPlace(
                "--postgres must be postgresql://user@host:port, without the name of a database; a password goes "
                "into PGPASSWORD, and what else libpq knows into its variables, as PGSSLMODE"
            )
        return parts

    def database(self, name: str, driver: str) -> str:
        """Return the address of a database on the team's PostgreSQL, without the password: that is PGPASSWORD."""
        user, _, place = self.server.netloc.rpartition("@")
        return f"postgresql+{driver}://{user.partition(':')[0] + '@' if user else ''}{place}/{name}"


def environment_of(root: Path, wanted: ServerOptions) -> dict[str, str]:
    """Return what the servers, the worker and its flow runs find in their environment; what the user set stays."""
    given = {
        **QUIET,
        "PREFECT_HOME": str(root / Kept.prefect),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes that we have no work for
        "SACPO_DATABASE": f"sqlite:///{root / Kept.operations}",
    }
    ours = {"SACPO_RUNS": str(root), **wanted.addresses}
    if wanted.postgres:
        given["SACPO_DATABASE"] = wanted.database("sacpo", "psycopg")
        if wanted.server.password:
            ours["PGPASSWORD"] = unquote(wanted.server.password)
    if wanted.starts_prefect:
        given["PREFECT_WORKER_QUERY_SECONDS"] = "3"  # who presses Run waits for it; Prefect's own is 10
        ours["PREFECT_API_AUTH_STRING"] = passwords.prefect(root, os.environ)
    if wanted.starts_mlflow and not os.environ.get("MLFLOW_AUTH_CONFIG_PATH"):
        login = passwords.mlflow(root, os.environ)
        ours |= {"MLFLOW_TRACKING_USERNAME": login.user, "MLFLOW_TRACKING_PASSWORD": login.password}
    return {**given, **os.environ, **ours, **proxies.direct(os.environ)}


def reachable(wanted: ServerOptions) -> None:
    """Refuse a PostgreSQL that does not let us in, or lacks a database."""
    import psycopg

    parts = wanted.server
    password = unquote(parts.password) if parts.password else None
    for name in DATABASES:
        try:
            psycopg.connect(
                host=parts.hostname, port=parts.port or 5432, user=unquote(parts.username or "") or None,
                password=password, dbname=name, connect_timeout=10,
            ).close()  # fmt: skip
        except psycopg.OperationalError as error:
            why = str(error).strip().splitlines()[0].removeprefix("connection failed: ")
            remedy = f"; createdb -h {parts.hostname} -p {parts.port or 5432} {name}" if "does not exist" in why else ""
            raise BadPlace(f"PostgreSQL, database {name}: {why}{remedy}") from error


def listening(port: int, option: str) -> socket.socket:
    """Return a socket that listens on a port of this machine.

    Raises:
        BadPlace: it is no port, or somebody else listens there.
    """
    if not 0 < port < 65536:
        raise BadPlace(f"{option} {port} is no port; choose one from 1 to 65535")
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise BadPlace(f"port {port} is taken already; choose another with {option}") from error


def _named(name: str) -> str:
    """Return the server that an environment variable names, if any.

    Raises:
        BadPlace: it names no server.
    """
    address = os.environ.get(name, "").rstrip("/")
    if address and not address.startswith(("http://", "https://")):
        raise BadPlace(f"{name} = {without_password(address)} is no server; unset it, and `sacpo up` starts one")
    return address
