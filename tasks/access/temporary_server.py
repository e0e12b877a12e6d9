"""Prefect's server for the time of one command, where no other is named.

It runs in a session of its own: Ctrl-C in the terminal, or a signal to the whole group, ends the command, which still
tells it so. It ends with the command, however that ends. It listens on a socket of the command's: where it dies and is
started again, requests wait, and nobody else gets its port and with it the password.
"""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from models.files.kept import Kept
from models.words import first_line
from tasks.access import passwords
from tasks.work import terminal
from tasks.work.processes import CHECKOUT, ServerProcess, answers, until

NAMED = "PREFECT_API_URL"
REVIVALS = 5
"""How often one that dies is started again."""
GRACE = 5.0
"""Seconds in which it writes what it still holds."""
MAKING = 120.0
"""Seconds to wait for another command that makes the database."""
ONCE = 2.0
"""Seconds of one question whether it answers: nobody closes the socket of one that has died."""
WAITING = 128
"""Connections that wait while it starts."""

_address = ""


@contextmanager
def temporary_server(root: Path) -> Iterator[Callable[[], None]]:
    """Name a server on the database of the runs folder while this lasts, unless the environment names one already.

    Yields:
        A function that waits until the server answers; `BadPlace` is raised where it does not.
    """
    global _address
    if os.environ.get(NAMED):
        yield lambda: None
        return
    environment = {**os.environ, **passwords.temporary(root, os.environ)}
    log, over = root / Kept.logs / "temporary-server.log", threading.Event()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    making = _turn(root / Kept.prefect)
    with socket.create_server(("127.0.0.1", 0), backlog=WAITING) as door:
        servers = [_start(door, environment, log)]
        keeper = threading.Thread(target=_keep, args=(servers, door, environment, log, over), daemon=True)

        def ready() -> None:
            until(servers[-1], lambda: answers(f"{_address}/health", ONCE))
            making.release()
            if not keeper.ident:
                keeper.start()

        _address = f"http://127.0.0.1:{door.getsockname()[1]}/api"
        os.environ[NAMED] = _address
        try:
            yield ready
        finally:
            making.release()
            over.set()
            if keeper.ident:
                keeper.join()
            try:
                if servers[-1].process.poll() is None:
                    _hand_over()
            finally:
                _end(servers[-1].process)
                del os.environ[NAMED]
                _address = ""


def address() -> str:
    """Return the address of the temporary server of this process; empty where there is none."""
    return _address


def lasting() -> str:
    """Return the address of a Prefect server that outlives this command; empty where there is none."""
    from prefect.settings import PREFECT_API_URL

    named = PREFECT_API_URL.value() or ""
    return "" if named == _address else named


def _turn(home: Path) -> FileLock:
    """Wait until nobody makes the database; return a lock, held where it has to be made.

    Of several commands that begin in a new folder at once, two would make the same tables, and one of them fail.
    """
    home.mkdir(parents=True, exist_ok=True)
    lock = FileLock(home / "making.lock")
    with suppress(Timeout):  # whoever holds it stands still
        lock.acquire(timeout=MAKING)
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
            cwd=CHECKOUT,  # `-m` would take a `tasks` of the folder that the user is in
            start_new_session=True,
        )
    return ServerProcess("Prefect's temporary server", process, log)


def _keep(
    servers: list[ServerProcess], door: socket.socket, environment: dict[str, str], log: Path, over: threading.Event
) -> None:
    """Start it again where it dies; after the last time refuse whoever waits."""
    for revived in range(REVIVALS + 1):
        while servers[-1].process.poll() is None:
            if over.wait(1):
                return
        if revived < REVIVALS:
            terminal.say("Prefect's temporary server died; it is started again", "dim")
            servers.append(_start(door, environment, log))
    door.close()


def _hand_over() -> None:
    """Let Prefect's client send what it still holds: the last lines of a log, for which it would look in vain later."""
    services = (("prefect.events.worker", "EventsWorker"), ("prefect.logging.handlers", "APILogWorker"))
    for module, name in services:
        service = getattr(sys.modules.get(module), name, None)
        try:
            if service is not None:
                service.drain_all(timeout=GRACE, at_exit=False)
        except Exception as error:  # nothing of the run depends on it
            terminal.say(f"the last lines of the flow's log may be missing in Prefect ({first_line(error)})", "dim")


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
