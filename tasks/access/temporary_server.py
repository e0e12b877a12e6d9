"""A Prefect server for the time of one command, where the user names no other.

It runs in a session of its own: Ctrl-C in the terminal, or a signal to the whole process group, ends the command alone,
which can still send the server the last states. The server ends with the command, however that ends. It listens on a
socket that the command holds: when the server dies and is started again, requests wait, and no other program can take
its port and receive the password.
"""

import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from models.files.kept import RunsFolderEntry
from models.words import first_line
from tasks.access import passwords
from tasks.work import terminal
from tasks.work.processes import CHECKOUT, ServerProcess, answers, wait_until_ready

VARIABLE = "PREFECT_API_URL"
RESTARTS = 5
"""How often a server that died is started again."""
GRACE = 5.0
"""Seconds for Prefect's client to send what it still holds, and then for the server to end by itself."""
MIGRATION_WAIT = 120.0
"""Seconds to wait while another command makes the database."""
HEALTH_WAIT = 2.0
"""Seconds to wait for one answer to "are you healthy?": the socket stays open, so a dead server refuses nothing."""
BACKLOG = 128
"""Connections that may wait while the server starts."""
DRAIN_ERRORS = (RuntimeError, AssertionError, AttributeError, TypeError, queue.Full)
"""What may go wrong in `drain_all` of Prefect 3.8, which is no part of its public interface: an event loop that is
closed, a queue that is full, and in another version another name or other parameters."""

_address = ""


@contextmanager
def temporary_server(root: Path) -> Iterator[Callable[[], None]]:
    """Run a server on the database of the runs folder inside this context, and name it in the environment.

    Where the environment names a server already, do nothing.

    Yields:
        A function that waits until the server answers, and raises `BadPlace` where it does not.
    """
    global _address
    if os.environ.get(VARIABLE):
        yield lambda: None
        return
    environment = {**os.environ, **passwords.temporary(root, os.environ)}
    log, is_over = root / RunsFolderEntry.logs / "temporary-server.log", threading.Event()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    database_lock = _lock_database(root / RunsFolderEntry.prefect)
    with socket.create_server(("127.0.0.1", 0), backlog=BACKLOG) as door:
        servers = [_start(door, environment, log)]
        keeper = threading.Thread(target=_keep_alive, args=(servers, door, environment, log, is_over), daemon=True)

        def ready() -> None:
            wait_until_ready(servers[-1], lambda: answers(f"{_address}/health", HEALTH_WAIT))
            # a server that answers has made its database
            database_lock.release()
            # a server that dies while it starts is an error, so it is kept alive only from here on
            if not keeper.ident:
                keeper.start()

        _address = f"http://127.0.0.1:{door.getsockname()[1]}/api"
        os.environ[VARIABLE] = _address
        try:
            yield ready
        finally:
            database_lock.release()
            # the keeper stops first, else it would start a new server in the place of the one that ends here
            is_over.set()
            if keeper.ident:
                keeper.join()
            try:
                if servers[-1].process.poll() is None:
                    _send_rest()
            finally:
                _end(servers[-1].process)
                del os.environ[VARIABLE]
                _address = ""


def address() -> str:
    """Return the address of the temporary server of this process; empty where there is none."""
    return _address


def lasting_server() -> str:
    """Return the address of a Prefect server that outlives this command; empty where there is none."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value() or ""
    return "" if url == _address else url


def _lock_database(home: Path) -> FileLock:
    """Wait while another command makes Prefect's database.

    Of several commands that begin in a new folder at once, two would make the same tables, and one of them would fail.

    Returns:
        A lock; it is locked if this command has to make the database.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "making.lock")
    # A process that holds the lock for so long is stuck: go on without it.
    with suppress(Timeout):
        lock.acquire(timeout=MIGRATION_WAIT)
        if (home / "prefect.db").exists():
            lock.release()
    return lock


def _start(door: socket.socket, environment: dict[str, str], log: Path) -> ServerProcess:
    command = [sys.executable, "-m", "tasks.access.prefect_server", "--temporary", "--fd", str(door.fileno())]
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[door.fileno()],
            cwd=CHECKOUT,  # in the user's folder `-m` could find another package named `tasks`
            start_new_session=True,
        )
    return ServerProcess("Prefect's temporary server", process, log)


def _keep_alive(
    servers: list[ServerProcess], door: socket.socket, environment: dict[str, str], log: Path, is_over: threading.Event
) -> None:
    """Start the server again when it dies, `RESTARTS` times, until `is_over` is set.

    Args:
        servers: all that were started; a new one is appended.
    """
    for restarts in range(RESTARTS + 1):
        while servers[-1].process.poll() is None:
            if is_over.wait(1):
                return
        if restarts < RESTARTS:
            terminal.say("Prefect's temporary server died; it is started again", "dim")
            servers.append(_start(door, environment, log))
    # requests that wait fail now, instead of waiting for a server that will not come
    door.close()


def _send_rest() -> None:
    """Let Prefect's client send the events and lines of the log that it still holds: its server is about to end."""
    services = (("prefect.events.worker", "EventsWorker"), ("prefect.logging.handlers", "APILogWorker"))
    for module, name in services:
        service = getattr(sys.modules.get(module), name, None)
        try:
            if service is not None:
                service.drain_all(timeout=GRACE, at_exit=False)
        except DRAIN_ERRORS as error:
            # the run is complete without these lines, so it does not fail for them
            terminal.say(f"the last lines of the flow's log may be missing in Prefect ({first_line(error)})", "dim")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a process; kill it where it does not end by itself."""
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
