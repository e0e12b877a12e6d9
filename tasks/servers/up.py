"""MLflow, Prefect, a worker and the deployments on one machine: what is started, where it keeps things, who may in.

For one person everything lies in the runs folder, where `sacpo run` without servers keeps it too. For a team both
servers keep their records in PostgreSQL and MLflow its artifacts where it is told. A server that MLFLOW_TRACKING_URI or
PREFECT_API_URL names is used as it is.
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

from models.errors import BadPlace
from models.files.kept import Kept
from tasks.access import passwords
from tasks.servers.environment import VERSION_PATHS, request_json
from tasks.servers.options import ServerOptions, environment_of, listening, reachable
from tasks.tracking.ledger_tables import secret
from tasks.work import health, processes
from tasks.work.processes import CHECKOUT, ServerProcess

POOL = "sacpo"
SILENCE = 90
"""Seconds without a heartbeat after which a flow run counts as crashed; Prefect allows no beat under 30 s."""
ZOMBIES = {
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
        # any news of it will do: a run that is suspended or waits for a retry has no process, and is no zombie
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
"""An automation of Prefect's server; made once."""


def up(root: Path, wanted: ServerOptions, say: Callable[[str], None]) -> None:
    """Start what is wanted, say where it is, and wait; Ctrl-C or a termination ends all of it.

    A second one beside it only says where the first one is.

    Raises:
        BadPlace: a port is taken, a named server does not answer, something does not start or ends by itself.
    """
    os.umask(0o077)  # also of what the servers write
    lock = FileLock(root / Kept.starting)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        noted = passwords.noted(root)
        if not noted:
            say("another `sacpo up` is starting or stopping here")
        else:
            say("already up:")
            _tell(noted["addresses"], say)
            if wanted.addresses != {name: noted["addresses"].get(name) for name in wanted.addresses}:
                say("it was started with other options; end it first to change them")
        return
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a shell's background job ignores the first
        if name is not signal.SIGHUP or signal.getsignal(name) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(name, signal.default_int_handler)
    place = root / Kept.servers
    try:
        place.unlink(missing_ok=True)
        left = processes.end(root)
        if left:
            say(f"ended {left} processes that a killed `sacpo up` left behind")
        environment = environment_of(root, wanted)
        started = _start(root, wanted, environment, say)
        named = {name: environment[name] for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "SACPO_DATABASE")}
        addresses = {name: address for name, address in named.items() if not secret(address)}
        passwords.note(root, addresses, wanted.started, os.environ)
        say("up:")
        _tell(addresses, say)
        say(f"Logs:    {root / Kept.logs}\nCtrl-C stops all of it")
        processes.watch(started)
    except KeyboardInterrupt:
        say("stopping")
    finally:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(name, signal.SIG_IGN)  # it takes seconds, and nothing may be left behind
        processes.end(root)
        place.unlink(missing_ok=True)
        lock.release()


def _tell(addresses: dict[str, str], say: Callable[[str], None]) -> None:
    say(f"MLflow:  {addresses['MLFLOW_TRACKING_URI']}")
    say(f"Prefect: {addresses['PREFECT_API_URL'].removesuffix('/api')}")
    say("Each page asks for a password once: sacpo up --show-password")
    say(f"In another terminal: export {' '.join(f'{name}={value}' for name, value in addresses.items())}")


def _start(
    root: Path, wanted: ServerOptions, environment: dict[str, str], say: Callable[[str], None]
) -> list[ServerProcess]:
    """Look first, then start what is ours, wait until all is healthy, and register everything with Prefect."""
    if wanted.postgres:
        reachable(wanted)
    files = {name: "" for name in wanted.started} if not wanted.postgres else {}
    for sentence in health.look(root, environment | files):
        say(sentence)
    if wanted.starts_mlflow and wanted.starts_prefect and wanted.mlflow_port == wanted.prefect_port:
        raise BadPlace(f"--mlflow-port and --prefect-port are both {wanted.mlflow_port}; each server needs its own")
    if wanted.starts_mlflow:
        listening(wanted.mlflow_port, "--mlflow-port").close()
    door = listening(wanted.prefect_port, "--prefect-port") if wanted.starts_prefect else None
    servers = {"mlflow": wanted.starts_mlflow, "prefect": wanted.starts_prefect}
    for name in (name for name, ours in servers.items() if not ours):
        _greet(name, wanted, environment, say)
    say(f"starting; logs are in {root / Kept.logs}")
    started = []
    if wanted.starts_mlflow:
        started.append(_mlflow(root, wanted, environment))
    if door:
        started.append(_prefect(root, wanted, environment, door))
    for child in started:
        _answering(child, wanted)
        _greet(child.name, wanted, environment, say)
    _pool(environment)
    registering = _deploy(root, environment)
    if wanted.worker:
        started.append(_worker(root, environment))
    if registering:
        processes.finish(registering)
        if wanted.worker:
            _reconcile(environment)
    known = request_json("PREFECT_API_URL", "/automations/filter", environment, {})
    if ZOMBIES["name"] not in [one["name"] for one in known]:
        request_json("PREFECT_API_URL", "/automations/", environment, ZOMBIES)
    return started


def _greet(name: str, wanted: ServerOptions, environment: dict[str, str], say: Callable[[str], None]) -> None:
    """Ask a server for its version, with our password; warn of one that was not tested.

    Raises:
        BadPlace: it does not answer, or does not let us in.
    """
    address = {"mlflow": "MLFLOW_TRACKING_URI", "prefect": "PREFECT_API_URL"}[name]
    there, here = str(request_json(address, VERSION_PATHS[address], environment)), version(name)
    if there.split(".")[:2] != here.split(".")[:2]:
        say(f"warning: {address} = {environment[address]} is {name} {there}; tested with {here}")


def _mlflow(root: Path, wanted: ServerOptions, environment: dict[str, str]) -> ServerProcess:
    server = dict(environment)
    del server["MLFLOW_TRACKING_URI"]
    for name, value in (("MLFLOW_DISABLE_TELEMETRY", "true"), ("MLFLOW_LOGGING_LEVEL", "WARNING")):
        os.environ.setdefault(name, value)  # of this process, before it imports mlflow
    # by environment, since a command line is for all to see
    if wanted.postgres:
        server["MLFLOW_BACKEND_STORE_URI"] = wanted.database("mlflow", "psycopg")
    else:
        from tasks.tracking.log import database

        database(root / Kept.mlflow)
        server["MLFLOW_BACKEND_STORE_URI"] = f"sqlite:///{root / Kept.mlflow}"
    if wanted.postgres or wanted.artifacts:
        server["MLFLOW_ARTIFACTS_DESTINATION"] = wanted.artifacts or (root / Kept.artifacts).as_uri()
    else:  # as without servers: no client without a server can read what goes through one
        server["MLFLOW_DEFAULT_ARTIFACT_ROOT"] = (root / Kept.artifacts).as_uri()
    command = [_tool("mlflow"), "server", "--host", "127.0.0.1", "--port", str(wanted.mlflow_port), "--workers", "1"]
    command += ["--app-name", "sacpo"]  # with users, and closed to other pages (mlflow_app.py)
    server |= _locked(root, wanted, server["MLFLOW_BACKEND_STORE_URI"])
    return processes.start(root, "server", "mlflow", command, server, root)


def _locked(root: Path, wanted: ServerOptions, records: str) -> dict[str, str]:
    """Return the settings with which MLflow asks for passwords; its users stand beside the records of a team."""
    users = records if wanted.postgres else f"sqlite:///{root / Kept.users}"
    settings = root / Kept.auth
    settings.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {users.replace('%', '%%')}\n"
        "auth_cache_ttl_seconds = 60\n",  # else every request hashes its password: 112 s of CPU in a small run, not 10
        "utf-8",
    )
    chosen = os.environ.get("MLFLOW_FLASK_SERVER_SECRET_KEY")
    key = {"MLFLOW_FLASK_SERVER_SECRET_KEY": chosen or secrets.token_hex(32)}
    if os.environ.get("MLFLOW_AUTH_CONFIG_PATH"):
        return key  # the user's own rules, and his own admin
    login = passwords.mlflow(root, os.environ)
    admin = {"MLFLOW_AUTH_ADMIN_USERNAME": login.user, "MLFLOW_AUTH_ADMIN_PASSWORD": login.password}
    return {**key, **admin, "MLFLOW_AUTH_CONFIG_PATH": str(settings)}


def _prefect(root: Path, wanted: ServerOptions, environment: dict[str, str], door: socket.socket) -> ServerProcess:
    closed = {
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": wanted.prefect.removesuffix("/api"),
        "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "true",
        "PREFECT_SERVER_UI_API_URL": "/api",  # its pages ask where they came from: through a tunnel too
    }
    server = {**closed, **environment, "PREFECT_SERVER_API_AUTH_STRING": passwords.prefect(root, os.environ)}
    del server["PREFECT_API_URL"]
    if wanted.postgres:
        server["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = wanted.database("prefect", "asyncpg")
    command = [sys.executable, "-m", "tasks.access.prefect_server", "--fd", str(door.fileno())]
    return processes.start(root, "server", "prefect", command, server, CHECKOUT, door)


def _deploy(root: Path, environment: dict[str, str]) -> ServerProcess | None:
    """Start to register what prefect.yaml names."""
    if not (CHECKOUT / "prefect.yaml").exists():
        return None
    command = [_tool("prefect"), "--no-prompt", "deploy", "--all"]
    return processes.start(root, "server", "deploy", command, environment, CHECKOUT)


def _reconcile(environment: dict[str, str]) -> None:
    """Let the first flow run repair what killed processes left behind."""
    wanted = {"deployments": {"name": {"any_": ["reconcile"]}}, "work_pools": {"name": {"any_": [POOL]}}}
    for told in request_json("PREFECT_API_URL", "/deployments/filter", environment, wanted):
        request_json(
            "PREFECT_API_URL", f"/deployments/{told['id']}/create_flow_run", environment, {"name": "at the start"}
        )


def _worker(root: Path, environment: dict[str, str]) -> ServerProcess:
    """Start a worker from the checkout, and wait until the server has heard of it."""
    name = f"sacpo-{socket.gethostname()}"

    def heard() -> str:
        workers = request_json("PREFECT_API_URL", f"/work_pools/{POOL}/workers/filter", environment, {})
        return str({worker["name"]: worker["last_heartbeat_time"] for worker in workers}.get(name, ""))

    before = heard()
    command = [_tool("prefect"), "worker", "start", "--pool", POOL, "--type", "process", "--name", name]
    child = processes.start(root, "worker", "worker", command, environment, CHECKOUT)
    processes.until(child, lambda: heard() != before)
    return child


def _pool(environment: dict[str, str]) -> None:
    """Make the work pool, and in it the queue of trainings: one at a time, unless somebody changed that."""
    pools, queues = "/work_pools", f"/work_pools/{POOL}/queues"
    for made, path, look in (
        ({"name": POOL, "type": "process"}, f"{pools}/", f"{pools}/filter"),
        ({"name": "training", "concurrency_limit": 1}, queues, f"{queues}/filter"),
    ):
        if made["name"] not in [one["name"] for one in request_json("PREFECT_API_URL", look, environment, {})]:
            request_json("PREFECT_API_URL", path, environment, made)


def _answering(child: ServerProcess, wanted: ServerOptions) -> None:
    """Wait until a server answers.

    Raises:
        BadPlace: it does not; if another program took MLflow's port after we looked, which one.
    """
    try:
        processes.until(child, partial(_healthy, child, getattr(wanted, child.name)))
    except BadPlace:
        if child.door is None and child.process.poll() is not None:  # it opens its port itself
            listening(wanted.mlflow_port, "--mlflow-port").close()
        raise


def _healthy(child: ServerProcess, address: str) -> bool:
    """Whether a child answers: another program that took its port would too, and must not be sent the password."""
    return processes.listens(child, urlsplit(address).port or 0) and processes.answers(f"{address}/health")


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)
