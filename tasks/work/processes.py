"""Processes that live as long as `sacpo up`: started with a log, watched, and ended with everything they started.

Each carries a mark in its environment, which the processes that it starts inherit. When a `sacpo up` was killed, the
next one finds by the mark what is left. Parent, group and session would not do: Prefect gives every flow run a session
of its own.
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
from models.files.kept import RunsFolderEntry

CHECKOUT = Path(__file__).parents[2]
"""The folder that holds `flows`, `tasks` and `models`."""
MARK = "SACPO_UP"
"""The variable in the environment of every child: `worker` or `server`, a colon, and the runs folder."""
KINDS = ("run", "worker", "server")
"""Kinds of processes, in the order in which they are ended: a flow run still tells MLflow that it was stopped, and its
worker tells Prefect."""
FLOW_RUN = "PREFECT__FLOW_RUN_ID"
"""Set by Prefect in the environment of a flow run, which otherwise is the environment of its worker."""
START_TIMEOUT = 180.0
"""Seconds for a start; the first one makes databases, which takes a minute on a busy machine."""
LONGEST_LINE = 300
"""Characters of a log's line that a message repeats."""
GRACE = 10.0
"""Seconds for a process to end by itself."""


@dataclass(frozen=True)
class ServerProcess:
    """A child process with its name and its log."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    door: socket.socket | None = None
    """The socket on which it listens, if we opened it: no other program can get its port while we live."""

    @property
    def last_line(self) -> str:
        """The last line of the log with a letter in it: tracebacks and tables may end in lines of signs."""
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines()]
        return next((line[:LONGEST_LINE] for line in reversed(lines) if any(map(str.isalpha, line))), "it said nothing")

    @property
    def outcome(self) -> str:
        """How it ended, or that it has not, and where to read more."""
        code = self.process.poll()
        if code is None:
            reason = f"not done after {START_TIMEOUT:.0f} s: {self.last_line}"
        elif code < 0:  # where a signal ended the process, the code is its negative number
            reason = f"killed by {signal.Signals(-code).name}"
        else:
            reason = f"exit code {code}: {self.last_line}"
        return f"{reason} (see {self.log})"


def identity_of(pid: int) -> str:
    """Return the boot of the machine and the time since then at which a process was started; empty if it is gone.

    The two tell a process from all others that had or will have the same number.
    """
    try:
        # the second field is the name of the program in parentheses, which may hold spaces and parentheses itself
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
    start_time = fields[18]  # field 22 of proc(5), in clock ticks
    # a zombie has ended, and only waits for its parent to ask how
    return "" if state == "Z" else f"{boot} {start_time}"


def end_with(parent: int) -> None:
    """End this process as soon as its parent, a process id, is gone; does not return."""
    # the system gives an orphan another parent
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
        root: the runs folder.
        kind: `worker` or `server`, for the mark.
        name: what messages and the log call it.
        folder: where it runs.
        door: a socket that the process inherits, under the same number.
    """
    log = root / RunsFolderEntry.logs / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # the log of the start before stays, for a look at what ended it
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


def wait_until_ready(child: ServerProcess, ready: Callable[[], bool]) -> None:
    """Wait until a child is ready.

    Raises:
        BadPlace: it ended, or it takes too long.
    """
    end = time.monotonic() + START_TIMEOUT
    while not ready():
        if child.process.poll() is not None or time.monotonic() > end:
            raise BadPlace(f"{child.name} did not start, {child.outcome}")
        time.sleep(0.2)


def answers(address: str, seconds: float = 5.0) -> bool:
    """Return whether a server answers at an address within some seconds, and with no error code."""
    try:
        urllib.request.urlopen(address, timeout=seconds).close()
    except OSError:
        return False
    return True


def listens(child: ServerProcess, port: int) -> bool:
    """Return whether a child, or a process that it started, listens on a port: no other program can then."""
    # a process may end while we look at it
    with suppress(psutil.Error):
        parent = psutil.Process(child.process.pid)
        for process in (parent, *parent.children(recursive=True)):
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in process.net_connections("tcp")):
                return True
    return False


def wait_for_exit(child: ServerProcess) -> None:
    """Wait until a child has ended by itself, with exit code 0.

    Raises:
        BadPlace: it failed, or takes too long.
    """
    # the exit code of a child that takes too long is None
    with suppress(subprocess.TimeoutExpired):
        child.process.wait(START_TIMEOUT)
    if child.process.returncode != 0:
        raise BadPlace(f"{child.name} failed, {child.outcome}")


def watch(children: Sequence[ServerProcess]) -> None:
    """Wait for as long as all children live.

    Raises:
        BadPlace: one ended.
    """
    while True:
        for child in children:
            if child.process.poll() is not None:
                raise BadPlace(f"{child.name} ended, {child.outcome}; everything is stopped")
        time.sleep(0.5)


def processes_of_kind(root: Path, kind: str) -> list[psutil.Process]:
    """Return the living processes of a kind that this runs folder started, directly or not.

    Args:
        kind: one of `KINDS`.
    """
    # a flow run inherits its worker's mark
    mark = f"{'worker' if kind == 'run' else kind}:{root}"
    processes = []
    for process in psutil.process_iter():
        # another user's environment cannot be read, and a process may end meanwhile
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            is_flow_run = FLOW_RUN in environment
            if environment.get(MARK) == mark and is_flow_run == (kind == "run") and process.pid != os.getpid():
                processes.append(process)
    return processes


def end(root: Path) -> int:
    """End everything that this runs folder started, and return how many processes that were."""
    count = 0
    for kind in KINDS:
        processes = processes_of_kind(root, kind)
        count += len(processes)
        pids = {process.pid for process in processes}
        for process in processes:
            with suppress(psutil.Error):
                # a flow run ends its own workers
                if kind != "run" or process.ppid() not in pids:
                    process.terminate()
        psutil.wait_procs(processes, timeout=GRACE)
        # a new look: processes may have started others meanwhile
        for process in processes_of_kind(root, kind):
            with suppress(psutil.Error):
                process.kill()
                process.wait(5)
    return count
