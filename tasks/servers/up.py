"""`sacpo up`: starts MLflow, Prefect, a worker and the deployments on one machine, and ends them together.

For one person everything lies in the runs folder, where `sacpo run` without servers keeps it too. For a team both
servers keep their records in PostgreSQL, and MLflow keeps its artifacts where `--artifacts` says. A server that
MLFLOW_TRACKING_URI or PREFECT_API_URL names is used as it is, and not started.
"""

import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout
from pydantic import JsonValue

from models.errors import BadPlace
from models.files.kept import RunsFolderEntry
from tasks.access import passwords
from tasks.servers.environment import VERSION_PATHS, records, request_json
from tasks.servers.options import ServerOptions, check_postgres, environment_of, listening
from tasks.tracking.ledger_tables import holds_password
from tasks.work import health, processes
from tasks.work.processes import CHECKOUT, ServerProcess

Say = Callable[[str], None]
"""Prints a line for the user."""
POOL = "sacpo"
"""Prefect's work pool; the deployments in prefect.yaml name it."""
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end `sacpo up`: Ctrl-C, a termination, a closed terminal."""
SILENCE = 90
"""Seconds without a heartbeat after which a flow run counts as crashed; Prefect allows no beat under 30 s."""
ZOMBIES: dict[str, JsonValue] = {
    "name": "sacpo: a flow run without a heartbeat has crashed",
    "description": "A flow run whose process and worker were killed would stay Running for ever.",
    "enabled": True,
    "trigger": {
        "type": "event",
        "posture": "Proactive",
        "match": {"prefect.resource.id": "prefect.flow-run.*"},
        "match_related": {"prefect.resource.role": "flow", "prefect.resource.name": ["align", "evaluate", "retrain"]},
        "for_each": ["prefect.resource.id"],
        "after": ["prefect.flow-run.heartbeat"],
        # Any event of the run counts as a sign of life, not only a heartbeat: a run that is suspended or waits for a
        # retry has no process that could send heartbeats, and is no zombie.
        "expect": ["prefect.flow-run.*"],
        "threshold": 1,
        "within": SILENCE,
    },
    "actions": [
        {
            "type": "change-flow-run-state",
            "state": "CRASHED",
            "message": f"No heartbeat for {SILENCE} seconds: its process is gone; a new run of the recipe goes on.",
        }
    ],
}
"""An automation of Prefect's server; it is made once, and a user's changes to it stay."""


def up(root: Path, options: ServerOptions, say: Say) -> None:
    """Start what the options ask for, say where it is, and wait; Ctrl-C or a termination ends all of it.

    Where another `sacpo up` runs on this folder, only say where that one's servers are.

    Raises:
        BadPlace: a port is taken, a named server does not answer, something does not start or ends by itself.
    """
    os.umask(0o077)  # it is inherited: the servers' files are for this user alone too
    lock = FileLock(root / RunsFolderEntry.starting)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _describe_running(root, options, say)
        return
    # A background job of a shell ignores Ctrl-C; handlers of our own make `kill -INT` work there too.
    for name in END_SIGNALS:
        # under nohup SIGHUP is ignored, and stays so
        if name is not signal.SIGHUP or signal.getsignal(name) is not signal.SIG_IGN:
            signal.signal(name, signal.default_int_handler)
    record_file = root / RunsFolderEntry.servers
    try:
        record_file.unlink(missing_ok=True)
        ended = processes.end(root)
        if ended:
            say(f"ended {ended} processes that a killed `sacpo up` left behind")
        environment = environment_of(root, options)
        started = _start(root, options, environment, say)
        variables = {name: environment[name] for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "SACPO_DATABASE")}
        # an address with a password in it is neither printed nor written down
        addresses = {name: address for name, address in variables.items() if not holds_password(address)}
        passwords.write_running(root, addresses, options.started_variables, os.environ)
        say("up:")
        _print_addresses(addresses, say)
        say(f"Logs:    {root / RunsFolderEntry.logs}\nCtrl-C stops all of it")
        processes.watch(started)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        # Ending takes seconds; a second Ctrl-C in that time would leave processes behind.
        for name in END_SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        processes.end(root)
        record_file.unlink(missing_ok=True)
        lock.release()


def _describe_running(root: Path, options: ServerOptions, say: Say) -> None:
    """Say where the servers of the `sacpo up` are that holds the lock."""
    running = passwords.read_running(root)
    if running is None:
        say("another `sacpo up` is starting or stopping here")
        return
    say("already up:")
    _print_addresses(running["addresses"], say)
    if options.addresses != {name: running["addresses"].get(name) for name in options.addresses}:
        say("it was started with other options; end it first to change them")


def _print_addresses(addresses: dict[str, str], say: Say) -> None:
    say(f"MLflow:  {addresses['MLFLOW_TRACKING_URI']}")
    say(f"Prefect: {addresses['PREFECT_API_URL'].removesuffix('/api')}")
    say("Each page asks for a password once: sacpo up --show-password")
    say(f"In another terminal: export {' '.join(f'{name}={value}' for name, value in addresses.items())}")


def _start(root: Path, options: ServerOptions, environment: dict[str, str], say: Say) -> list[ServerProcess]:
    """Check everything, start our servers, wait until they are healthy, and register the deployments with Prefect.

    Returns:
        The processes that must live as long as `sacpo up`.
    """
    if options.postgres:
        check_postgres(options)
    # health.check skips the files of a server whose address is set. Our servers have files, unless they use PostgreSQL.
    own_files = {} if options.postgres else {name: "" for name in options.started_variables}
    for sentence in health.check(root, environment | own_files):
        say(sentence)
    if options.starts_mlflow and options.starts_prefect and options.mlflow_port == options.prefect_port:
        raise BadPlace(f"--mlflow-port and --prefect-port are both {options.mlflow_port}; each server needs its own")
    if options.starts_mlflow:
        listening(options.mlflow_port, "--mlflow-port").close()  # a check only: MLflow opens its port itself
    door = listening(options.prefect_port, "--prefect-port") if options.starts_prefect else None
    for name, is_ours in (("mlflow", options.starts_mlflow), ("prefect", options.starts_prefect)):
        if not is_ours:
            _check_version(name, environment, say)
    say(f"starting; logs are in {root / RunsFolderEntry.logs}")
    started = []
    if options.starts_mlflow:
        started.append(_mlflow(root, options, environment))
    if door:
        started.append(_prefect(root, options, environment, door))
    for child in started:
        _answering(child, options)
        _check_version(child.name, environment, say)
    # the pool comes first: the deployments name it, and the worker serves it
    _pool(environment)
    registration = _deploy(root, environment)
    if options.worker:
        started.append(_worker(root, environment))
    if registration:
        # a worker starts while `prefect deploy` is still registering; both take seconds
        processes.wait_for_exit(registration)
        if options.worker:
            _reconcile(environment)
    if ZOMBIES["name"] not in [automation["name"] for automation in records("/automations/filter", environment)]:
        request_json("PREFECT_API_URL", "/automations/", environment, ZOMBIES)
    return started


def _check_version(name: str, environment: dict[str, str], say: Say) -> None:
    """Ask a server for its version, with our password; warn of a minor version that was not tested.

    Args:
        name: `mlflow` or `prefect`.

    Raises:
        BadPlace: it does not answer, or does not let us in.
    """
    variable = {"mlflow": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}[name]
    server_version = str(request_json(variable, VERSION_PATHS[variable], environment))
    client_version = version(name)
    if server_version.split(".")[:2] != client_version.split(".")[:2]:
        say(f"warning: {variable} = {environment[variable]} is {name} {server_version}; tested with {client_version}")


def _mlflow(root: Path, options: ServerOptions, environment: dict[str, str]) -> ServerProcess:
    """Start MLflow's server."""
    server = dict(environment)
    # the variable is for clients, and the server is no client of itself
    del server["MLFLOW_TRACKING_URI"]
    # this process imports mlflow below, which reads these variables then
    for name, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("MLFLOW_LOGGING_LEVEL", "WARNING")):
        os.environ.setdefault(name, value)
    # the places go into the environment, since every user of the machine can read a command line
    if options.postgres:
        server["MLFLOW_BACKEND_STORE_URI"] = options.database("mlflow", "psycopg")
    else:
        from tasks.tracking.log import database

        database(root / RunsFolderEntry.mlflow)
        server["MLFLOW_BACKEND_STORE_URI"] = f"sqlite:///{root / RunsFolderEntry.mlflow}"
    if options.postgres or options.artifacts:
        # clients send artifacts through the server, which alone has the keys of the store
        server["MLFLOW_ARTIFACTS_DESTINATION"] = options.artifacts or (root / RunsFolderEntry.artifacts).as_uri()
    else:
        # Clients write the files themselves, as they do without a server; a client without a server could not read
        # an artifact that went through one.
        server["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = (root / RunsFolderEntry.artifacts).as_uri()
    command = [_tool("mlflow"), "server", "--host", "127.0.0.1", "--port", str(options.mlflow_port), "--workers", "1"]
    command += ["--app-name", "sacpo"]  # tasks/access/mlflow_app.py adds users, and refuses other pages
    server |= _mlflow_auth(root, options, server["MLFLOW_BACKEND_STORE_URI"])
    return processes.start(root, "server", "mlflow", command, server, root)


def _mlflow_auth(root: Path, options: ServerOptions, records_uri: str) -> dict[str, str]:
    """Write MLflow's settings of who may do what, and return the variables with which it asks for passwords.

    Args:
        records_uri: the database of MLflow's records; a team's users stand in it too.
    """
    users_uri = records_uri if options.postgres else f"sqlite:///{root / RunsFolderEntry.users}"
    settings = root / RunsFolderEntry.auth
    escaped_uri = users_uri.replace("%", "%%")  # configparser reads a single % as the beginning of a reference
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {escaped_uri}\n"
        # without a cache every request hashes its password: 112 s of CPU in a small run instead of 10
        "auth_cache_ttl_seconds = 60\n",
        "utf-8",
    )
    key = os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY") or secrets.token_hex(32)
    variables = {"MLFLOW_FLASK_SERVER_SECRET_KEY": key}
    if os.environ.get("MLFLOW_AUTH_CONFIG_PATH"):
        return variables  # the user has rules of their own, with an admin of their own
    login = passwords.mlflow(root, os.environ)
    admin = {"MLFLOW_AUTH_ADMIN_USERNAME": login.user, "MLFLOW_AUTH_ADMIN_PASSWORD": login.password}
    return {**variables, **admin, "MLFLOW_AUTH_CONFIG_PATH": str(settings)}


def _prefect(root: Path, options: ServerOptions, environment: dict[str, str], door: socket.socket) -> ServerProcess:
    """Start Prefect's server on a socket that listens already."""
    protection = {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": options.prefect.removesuffix("/api"),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        # a relative address: the pages also work through a tunnel from another port
        "PREFECT_SERVER_UI_API_URL": "/api",
    }
    server = {**protection, **environment, "PREFECT_SERVER_API_AUTH_STRING": passwords.prefect(root, os.environ)}
    # the variable is for clients, and the server is no client of itself
    del server["PREFECT_API_URL"]
    if options.postgres:
        server["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = options.database("prefect", "asyncpg")
    command = [sys.executable, "-m", "tasks.access.prefect_server", "--fd", str(door.fileno())]
    return processes.start(root, "server", "prefect", command, server, CHECKOUT, door)


def _deploy(root: Path, environment: dict[str, str]) -> ServerProcess | None:
    """Start to register the deployments in prefect.yaml; None where there is no such file."""
    if not (CHECKOUT / "prefect.yaml").exists():
        return None
    command = [_tool("prefect"), "--no-prompt", "deploy", "--all"]
    return processes.start(root, "server", "deploy", command, environment, CHECKOUT)


def _reconcile(environment: dict[str, str]) -> None:
    """Start a flow run that repairs what killed processes left behind."""
    condition: JsonValue = {"deployments": {"name": {"any_": ["reconcile"]}}, "work_pools": {"name": {"any_": [POOL]}}}
    for deployment in records("/deployments/filter", environment, condition):
        path = f"/deployments/{deployment['id']}/create_flow_run"
        request_json("PREFECT_API_URL", path, environment, {"name": "at the start"})


def _worker(root: Path, environment: dict[str, str]) -> ServerProcess:
    """Start a worker from the checkout, and wait until the server has heard of it."""
    name = f"sacpo-{socket.gethostname()}"

    def last_heartbeat() -> str:
        workers = records(f"/work_pools/{POOL}/workers/filter", environment)
        return str({worker["name"]: worker["last_heartbeat_time"] for worker in workers}.get(name, ""))

    # the server remembers a worker of an earlier start under the same name, so only a newer heartbeat counts
    earlier = last_heartbeat()
    command = [_tool("prefect"), "worker", "start", "--pool", POOL, "--type", "process", "--name", name]
    child = processes.start(root, "worker", "worker", command, environment, CHECKOUT)
    processes.wait_until_ready(child, lambda: last_heartbeat() != earlier)
    return child


def _pool(environment: dict[str, str]) -> None:
    """Make the work pool, and in it the queue of trainings: one at a time, unless a user has changed that."""
    pools, queues = "/work_pools", f"/work_pools/{POOL}/queues"
    pool_and_queue: list[tuple[dict[str, JsonValue], str, str]] = [
        ({"name": POOL, "type": "process"}, f"{pools}/", f"{pools}/filter"),
        ({"name": "training", "concurrency_limit": 1}, queues, f"{queues}/filter"),
    ]
    for record, creation_path, filter_path in pool_and_queue:
        if record["name"] not in [existing["name"] for existing in records(filter_path, environment)]:
            request_json("PREFECT_API_URL", creation_path, environment, record)


def _answering(child: ServerProcess, options: ServerOptions) -> None:
    """Wait until a server answers.

    Raises:
        BadPlace: it does not; the error names the port where another program took MLflow's after our check.
    """
    address = options.mlflow if child.name == "mlflow" else options.prefect
    try:
        processes.wait_until_ready(child, partial(_healthy, child, address))
    except BadPlace:
        # a server that got no socket from us opens its port itself, and ends where the port is taken
        if child.door is None and child.process.poll() is not None:
            listening(options.mlflow_port, "--mlflow-port").close()
        raise


def _healthy(child: ServerProcess, address: str) -> bool:
    """Return whether a child answers, and is the one that listens there.

    Another program that took its port would answer too, and must not be sent the password.
    """
    return processes.listens(child, urlsplit(address).port or 0) and processes.answers(f"{address}/health")


def _tool(name: str) -> str:
    """Return the path of a command that is installed beside this Python, whatever PATH says."""
    return str(Path(sys.executable).parent / name)
