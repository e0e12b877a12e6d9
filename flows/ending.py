"""How the command ends: told to by SIGTERM, and soon, whoever still waits."""

import os
import signal
import sys
import threading
from typing import NoReturn


class Terminated(BaseException):
    """The command was told to end: spot machines and schedulers do that."""

    exit_code = 128 + signal.SIGTERM


def listen() -> None:
    """Raise `Terminated` on SIGTERM; inside a flow Prefect does it in its own way, and calls this at the end."""
    signal.signal(signal.SIGTERM, _terminate)


def leave_within(seconds: float) -> None:
    """End this process soon, with the exit code that is on its way.

    Prefect offers each event to a dead server for seconds, before the process may end.
    """
    code = getattr(sys.exc_info()[1], "code", 1)
    watchdog = threading.Timer(seconds, _leave, [code if isinstance(code, int) else int(code is not None)])
    watchdog.daemon = True
    watchdog.start()


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while we clean up
    raise Terminated


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)
