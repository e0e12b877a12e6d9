"""How the command ends: told to by SIGTERM, and soon, whoever still waits."""

import atexit
import os
import signal
import sys
import threading
import time
from typing import NoReturn

PATIENCE = 15.0
"""Seconds from SIGTERM in which the main thread ends its workers and its records by itself."""
END = 30.0
"""Seconds from SIGTERM after which this process is gone, whoever still waits: everything it writes is whole or absent.
"""
LAST_WORDS = 10.0
"""Seconds for what runs at the end of a process: Prefect offers each event to a dead server for longer."""
GOES_ON = "sacpo: terminated; the same command goes on"


class Terminated(BaseException):
    """The command was told to end: spot machines and schedulers do that."""

    exit_code = 128 + signal.SIGTERM


def listen() -> None:
    """Raise `Terminated` on SIGTERM; inside a flow Prefect does it in its own way, and calls this at the end."""
    signal.signal(signal.SIGTERM, _terminate)


def bound() -> None:
    """See to it that SIGTERM ends this process within `END` seconds.

    The exception of a handler can get lost (in a callback, in a destructor) or wait behind one who waits. What is
    written to the wake-up file descriptor comes from C as soon as the signal does.
    """
    seen, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_end_soon, args=(seen,), daemon=True).start()


def leave() -> NoReturn:
    """End this process with the exit code that is on its way, within seconds.

    What was registered for the end is called, the interpreter is not taken apart: collecting what torch's and Prefect's
    modules left took up to 15 s on a busy machine, in which no other thread runs, and so no clock either.
    """
    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    code = getattr(error, "code", 0 if error is None else 1)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    code = code if isinstance(code, int) else int(code is not None)
    watchdog = threading.Timer(LAST_WORDS, _leave, [code])
    watchdog.daemon = True
    watchdog.start()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _leave(code)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while we clean up
    raise Terminated


def _end_soon(seen: int) -> None:
    while os.read(seen, 1) != bytes([signal.SIGTERM]):
        pass
    time.sleep(PATIENCE)
    launch = sys.modules.get("tasks.work.workers")
    if launch:
        launch.stop()  # a training writes its checkpoint, and the main thread hears of the end of its workers
    time.sleep(max(0.0, END - PATIENCE - launch.GRACE if launch else 0.0))
    print(GOES_ON, file=sys.stderr)
    _leave(Terminated.exit_code)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads any more
            continue
    os._exit(code)
