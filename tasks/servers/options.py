"""The options of `sacpo up` (ports, a team's PostgreSQL, a store), and the environment that follows from them."""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from models.errors import BadPlace
from models.files.kept import RunsFolderEntry
from tasks.access import passwords, proxies
from tasks.servers.environment import QUIET
from tasks.tracking.connection import without_password

DATABASES = ("mlflow", "prefect", "sacpo")
"""Names of the databases on a team's PostgreSQL: MLflow's, Prefect's, and our own."""
LOGIN_SECONDS = 10
"""Seconds to wait for PostgreSQL to let us in."""


@dataclass(frozen=True)
class ServerOptions:
    """What the user asked `sacpo up` for."""

    mlflow_port: int = 5000
    prefect_port: int = 4200
    # the address may hold a password, which no traceback or log may show
    postgres: str = field(default="", repr=False)
    """`postgresql://user@host:port`; empty: the records stay in the runs folder."""
    artifacts: str = ""
    """Where MLflow keeps artifacts, as `s3://bucket`; empty: in the runs folder."""
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
        """Variable that names a server → its address."""
        return {"MLFLOW_TRACKING_URI": self.mlflow, "PREFECT_API_URL": self.prefect}

    @property
    def started_variables(self) -> list[str]:
        """The variables that name the servers which `sacpo up` starts itself."""
        starts = {"MLFLOW_TRACKING_URI": self.starts_mlflow, "PREFECT_API_URL": self.starts_prefect}
        return [name for name, is_ours in starts.items() if is_ours]

    @property
    def starts_mlflow(self) -> bool:
        """Whether `sacpo up` starts MLflow."""
        # compared by address: the user may have exported the line that an earlier `sacpo up` printed
        return self.mlflow == f"http://127.0.0.1:{self.mlflow_port}"

    @property
    def starts_prefect(self) -> bool:
        """Whether `sacpo up` starts Prefect."""
        return self.prefect == f"http://127.0.0.1:{self.prefect_port}/api"

    @property
    def postgres_parts(self) -> SplitResult:
        """The parts of the address of the team's PostgreSQL.

        Raises:
            BadPlace: `--postgres` is no such address, or names a database or settings.
        """
        parts = urlsplit(self.postgres)
        try:
            # `port` raises for what is no number; an address without a port means 5432
            is_address = parts.hostname and (parts.port or True)
        except ValueError:
            is_address = False
        if parts.scheme not in ("postgresql", "postgres") or not is_address or parts.path.strip("/") or parts.query:
            # the message does not repeat the address, since it may hold a password
            raise BadPlace(
                "--postgres must be postgresql://user@host:port, without the name of a database; set the password in "
                "PGPASSWORD, and other settings in libpq's variables, for instance PGSSLMODE"
            )
        return parts

    def database(self, name: str, driver: str) -> str:
        """Return SQLAlchemy's address of a database on the team's PostgreSQL, without the password: that is PGPASSWORD.

        Args:
            driver: `psycopg` or `asyncpg`.
        """
        login, _, host = self.postgres_parts.netloc.rpartition("@")
        user = login.partition(":")[0]
        return f"postgresql+{driver}://{user + '@' if login else ''}{host}/{name}"


def environment_of(root: Path, options: ServerOptions) -> dict[str, str]:
    """Return the environment of the servers, the worker and its flow runs: the user's own, with ours added.

    Raises:
        BadPlace: an option or a variable names no server, or the password file cannot be used.
    """
    # the user's variables win over these, and lose against `required` below
    defaults = {
        **QUIET,
        "PREFECT_HOME": str(root / RunsFolderEntry.prefect),
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # MLflow would start eight processes that we never use
        "SACPO_DATABASE": f"sqlite:///{root / RunsFolderEntry.operations}",
    }
    required = {"SACPO_RUNS": str(root), **options.addresses}
    if options.postgres:
        defaults["SACPO_DATABASE"] = options.database("sacpo", "psycopg")
        if options.postgres_parts.password:
            required["PGPASSWORD"] = unquote(options.postgres_parts.password)
    if options.starts_prefect:
        # a person who presses Run on Prefect's page waits for the worker's next question; Prefect's default is 10
        defaults["PREFECT_WORKER_QUERY_SECONDS"] = "3"
        required["PREFECT_API_AUTH_STRING"] = passwords.prefect(root, os.environ)
    # with rules of the user's own, the admin and the password are the user's too
    if options.starts_mlflow and not os.environ.get("MLFLOW_AUTH_CONFIG_PATH"):
        login = passwords.mlflow(root, os.environ)
        required |= {"MLFLOW_TRACKING_USERNAME": login.user, "MLFLOW_TRACKING_PASSWORD": login.password}
    return {**defaults, **os.environ, **required, **proxies.direct(os.environ)}


def check_postgres(options: ServerOptions) -> None:
    """Refuse a PostgreSQL that does not let us in, or lacks a database.

    Raises:
        BadPlace: PostgreSQL refuses us, or a database is missing.
    """
    import psycopg

    parts = options.postgres_parts
    password = unquote(parts.password) if parts.password else None
    for name in DATABASES:
        try:
            psycopg.connect(
                host=parts.hostname, port=parts.port or 5432, user=unquote(parts.username or "") or None,
                password=password, dbname=name, connect_timeout=LOGIN_SECONDS,
            ).close()  # fmt: skip
        except psycopg.OperationalError as error:
            reason = str(error).strip().splitlines()[0].removeprefix("connection failed: ")
            is_missing = "does not exist" in reason
            remedy = f"; createdb -h {parts.hostname} -p {parts.port or 5432} {name}" if is_missing else ""
            raise BadPlace(f"PostgreSQL, database {name}: {reason}{remedy}") from error


def listening(port: int, option: str) -> socket.socket:
    """Return a socket that listens on a port of this machine.

    Raises:
        BadPlace: the number is no port, or another program listens there.
    """
    if not 0 < port < 65536:
        raise BadPlace(f"{option} {port} is no port; choose one from 1 to 65535")
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise BadPlace(f"port {port} is taken already; choose another with {option}") from error


def _named(name: str) -> str:
    """Return the address of the server that an environment variable names; empty where it is not set.

    Raises:
        BadPlace: the variable holds something else than the address of a server.
    """
    address = os.environ.get(name, "").rstrip("/")
    if address and not address.startswith(("http://", "https://")):
        raise BadPlace(f"{name} = {without_password(address)} is no server; unset it, and `sacpo up` starts one")
    return address
