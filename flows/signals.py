"""How the command ends on SIGTERM and on Ctrl-C: within seconds, whatever its threads still wait for."""

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
"""Seconds from SIGTERM after which this process is gone, whatever still waits. No file is half written then: each is
written whole or not at all."""
LAST_WORDS = 10.0
"""Seconds for what runs at the end of a process; Prefect would try longer to send its events to a dead server."""
GOES_ON = "sacpo: terminated; the same command goes on"
INTERRUPTED = "sacpo: interrupted; the same command goes on"
LAST_LINES = {signal.SIGTERM: GOES_ON, signal.SIGINT: INTERRUPTED}
"""Signal that ends a run → what is said if the main thread cannot say it any more."""


class Terminated(BaseException):
    """The command must end: cluster schedulers send SIGTERM, and so do clouds that take a spot machine back."""

    exit_code = 128 + signal.SIGTERM


def listen() -> None:
    """Raise `Terminated` on SIGTERM. Inside a flow, Prefect's own handler acts first, and then calls this one."""
    signal.signal(signal.SIGTERM, _terminate)


def bound() -> None:
    """See to it that SIGTERM and SIGINT end this process within `END` seconds.

    The exception that a Python handler raises can get lost in a callback or a destructor, or end in a `finally` that
    waits again. The wake-up file descriptor is written by C code as soon as the signal comes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_end_soon, args=(reader,), daemon=True).start()


def leave() -> NoReturn:
    """End this process within seconds, with the exit code of the exception that is being handled.

    Exit functions are called, but the interpreter is not taken apart: to collect what the modules of torch and Prefect
    left took up to 15 s on a busy machine. No other thread runs in that time, and so no watchdog either.
    """
    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    # As the interpreter does it: the code of a SystemExit may be a number, none, or a sentence for stderr.
    code = getattr(error, "code", 0 if error is None else 1)
    if isinstance(code, str):
        print(code, file=sys.stderr)
    code = code if isinstance(code, int) else int(code is not None)
    watchdog = threading.Timer(LAST_WORDS, _leave, [code])
    watchdog.daemon = True
    watchdog.start()
    # These two are what the interpreter itself calls first at its end, in this order. The types name only the second.
    vars(threading)["_shutdown"]()
    atexit._run_exitfuncs()
    _leave(code)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM must not interrupt the clean-up
    raise Terminated


def _end_soon(reader: int) -> None:
    """Wait for one of both signals, and then end this process step by step: nothing yet, its workers, itself."""
    while (number := os.read(reader, 1)[0]) not in LAST_LINES:  # other signals write their numbers, too
        pass
    time.sleep(PATIENCE)
    workers = sys.modules.get("tasks.work.workers")  # if it was never imported, there are no workers
    if workers:
        workers.stop()  # a training writes its checkpoint, and the main thread no longer waits for its worker
    time.sleep(max(0.0, END - PATIENCE - workers.GRACE if workers else 0.0))
    print(LAST_LINES[signal.Signals(number)], file=sys.stderr)
    _leave(128 + number)


def _leave(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the reader of a pipe has gone, or the stream is closed
            continue
    os._exit(code)
