"""Processes that live as long as `sacpo up`: started with a log, watched, and ended with everything they started.

Each carries a mark in its environment, which whatever it starts inherits. A killed `sacpo up` leaves processes whose
parent, group and session tell nothing (Prefect gives every flow run its own session); the mark does.
"""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from models.errors import BadPlace
from models.files.kept import Kept

CHECKOUT = Path(__file__).parents[2]
MARK = "SACPO_UP"
"""In the environment of every child: `worker` or `server`, and the runs folder."""
KINDS = ("run", "worker", "server")
"""In the order in which they end: a flow run tells MLflow that it was stopped, its worker tells Prefect."""
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect in the environment of a flow run, which else has its worker's."""
START_TIMEOUT = 180.0
"""Seconds for a start; a first one migrates databases, which a busy machine takes a minute for."""

GRACE = 10.0
"""Seconds for a process to end by itself."""


@dataclass(frozen=True)
class ServerProcess:
    """A running process, its log, and what it is called."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    door: socket.socket | None = None
    """The socket on which it listens; ours, so that nobody else gets its port while we live."""

    @property
    def last_line(self) -> str:
        """The last line of the log that says something."""
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines()]
        return next((line[:300] for line in reversed(lines) if any(map(str.isalpha, line))), "it said nothing")

    @property
    def how(self) -> str:
        """How it ended, and where to read on."""
        code = self.process.poll()
        if code is None:
            why = f"not done after {START_TIMEOUT:.0f} s: {self.last_line}"
        else:
            why = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {self.last_line}"
        return f"{why} (see {self.log})"


def started(pid: int) -> str:
    """Return what tells this process from others that have, had or will have its number; empty if it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    return "" if state == "Z" else f"{boot} {rest[18]}"


def end_with(parent: int) -> None:
    """End this process as soon as its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def start(
    root: Path,
    kind: str,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    door: socket.socket | None = None,
) -> ServerProcess:
    """Start a process in its own session, out of reach of the terminal's Ctrl-C, with its output in `root/logs`.

    Args:
        door: a socket that the process inherits, under the same number.
    """
    log = root / Kept.logs / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    if log.exists():
        log.replace(log.with_suffix(".log.1"))
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**environment, MARK: f"{kind}:{root}"},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[door.fileno()] if door else [],
            start_new_session=True,
        )
    return ServerProcess(name, process, log, door)


def until(child: ServerProcess, ready: Callable[[], bool]) -> None:
    """Wait until a child is ready.

    Raises:
        BadPlace: it ended, or it takes too long.
    """
    end = time.monotonic() + START_TIMEOUT
    while not ready():
        if child.process.poll() is not None:
            raise BadPlace(f"{child.name} did not start, {child.how}")
        if time.monotonic() > end:
            raise BadPlace(f"{child.name} did not start, {child.how}")
        time.sleep(0.2)


def answers(address: str, seconds: float = 5.0) -> bool:
    """Whether a server answers there at once, and well."""
    try:
        urllib.request.urlopen(address, timeout=seconds).close()
    except OSError:
        return False
    return True


def listens(child: ServerProcess, port: int) -> bool:
    """Whether a child, or what it started, listens on a port: no other program can then."""
    with suppress(psutil.Error):
        process = psutil.Process(child.process.pid)
        for one in (process, *process.children(recursive=True)):
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in one.net_connections("tcp")):
                return True
    return False


def finish(child: ServerProcess) -> None:
    """Wait until a child has done what it was started for.

    Raises:
        BadPlace: it failed.
    """
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(START_TIMEOUT)
    if child.process.returncode != 0:
        raise BadPlace(f"{child.name} failed, {child.how}")


def watch(children: Sequence[ServerProcess]) -> None:
    """Wait for as long as all children live.

    Raises:
        BadPlace: one ended.
    """
    while True:
        for child in children:
            if child.process.poll() is not None:
                raise BadPlace(f"{child.name} ended, {child.how}; everything is stopped")
        time.sleep(0.5)


def marked(root: Path, kind: str) -> list[psutil.Process]:
    """Return the living processes of a kind that this runs folder started, directly or not."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # not ours, or gone meanwhile
            environment = process.environ()
            started = f"{'worker' if kind == 'run' else kind}:{root}"
            of_run = FLOW_RUN in environment
            if environment.get(MARK) == started and of_run == (kind == "run") and process.pid != os.getpid():
                found.append(process)
    return found


def end(root: Path) -> int:
    """End everything that this runs folder started, and return how many processes that were."""
    count = 0
    for kind in KINDS:
        processes = marked(root, kind)
        count += len(processes)
        known = {process.pid for process in processes}
        for process in processes:
            with suppress(psutil.Error):
                if kind != "run" or process.ppid() not in known:  # a flow run ends its own workers
                    process.terminate()
        psutil.wait_procs(processes, timeout=GRACE)
        for process in marked(root, kind):
            with suppress(psutil.Error):
                process.kill()
                process.wait(5)
    return count
