"""SIGTERM and Ctrl-C end the process soon, with exit code 143 and 130, whatever its threads wait for."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WAITS = {
    "a lock that nobody gives back": "import threading; lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "a callback that loses the exception": """
import weakref
class Gone:
    pass
def lost(_):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        pass
for _ in range(2):
    gone = Gone()
    held = weakref.ref(gone, lost)
    del gone
""",
    "a thread that is joined": """
import threading
thread = threading.Thread(target=time.sleep, args=(600,))
thread.start()
try:
    thread.join()
finally:
    thread.join()
""",
    "an exit function": "import atexit; atexit.register(time.sleep, 600)\nos.write(1, b'.')\ntime.sleep(600)",
}
"""What the main thread does when the signal comes."""


def started(does: str) -> "subprocess.Popen[bytes]":
    """Start a process that ends as the command does, with seconds for deadlines, and wait until it waits."""
    code = f"""
import os, sys, time
from flows import signals
signals.PATIENCE, signals.END, signals.LAST_WORDS = 1.0, 2.0, 2.0
signals.listen()
try:
    signals.bound()
    os.write(1, b'ready')
    exec({does!r})
except signals.Terminated as told:
    sys.exit(told.exit_code)
except KeyboardInterrupt:
    sys.exit(130)
finally:
    signals.leave()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout and process.stdout.read(5) == b"ready"
    time.sleep(0.5)
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("waits", WAITS)
def test_a_process_that_is_told_to_end_ends_whatever_it_waits_for(waits: str, number: signal.Signals) -> None:
    """A signal that comes while an import takes a lock is lost: Python ignores what a callback raises."""
    process = started(WAITS[waits])
    process.send_signal(number)
    try:
        assert process.wait(60) == 128 + number
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no')", 1, "no"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
        ("import atexit; atexit.register(os.write, 2, b'last words')", 0, "last words"),
        (
            "import threading; threading.Thread(target=lambda: (time.sleep(0.5), os.write(2, b'joined'))).start()",
            0,
            "j",
        ),
    ],
)
def test_leaving_keeps_the_exit_code_and_what_was_registered(does: str, code: int, says: str) -> None:
    process = started(does)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and says in err.decode() and (says or not err)


def test_nothing_is_taken_apart_at_the_end() -> None:
    """A collection of all objects at the end holds every other thread back, and so the clock that bounds the end."""
    late = "class Late:\n    def __del__(self): os.write(2, b'taken apart')\nsys.modules['late'] = Late()"
    _, err = started(late).communicate(timeout=60)
    assert err == b""
