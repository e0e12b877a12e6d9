"""Records on their way to a server that may be slow, silent or dead: in order, one at a time, never in the way of work.

A server that fails is reported once per record and then left alone for a while. What it missed, the next command sends.
"""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, ParamSpec, TypeVar

from models.words import counted, first_line
from tasks.work import terminal

P = ParamSpec("P")
T = TypeVar("T")

SILENT_SECONDS = 60.0
"""Seconds in which a server that failed is left alone."""
LONGEST = 120.0
"""Seconds for which the end of a run waits for a slow server."""
LAST = 10.0
"""Seconds for the last record of a run that was stopped."""
SLOW = 5.0
"""Seconds of waiting after which a person is told what is waited for, and again each time."""

_log = logging.getLogger(__name__)


class Outbox:
    """One thread that sends."""

    def __init__(self, server: str) -> None:
        self.missed = False
        """Whether something was not taken."""
        self._server = server
        self._queue = ThreadPoolExecutor(1)
        self._waiting: set[Future[Any]] = set()
        self._silent_until = 0.0
        """Nothing is tried before this moment (`time.monotonic`): the server has just failed."""

    def send(self, what: str, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> "Future[None]":
        """Queue a record that may be missed; `what` names it where it is."""
        return self.submit(self._patiently, what, partial(call, *args, **kwargs))

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Queue a call whose failure the caller wants to hear of."""
        record = self._queue.submit(call, *args, **kwargs)
        self._waiting.add(record)
        record.add_done_callback(self._waiting.discard)
        return record

    def wait(self, record: "Future[T]", seconds: float = math.inf) -> "Future[T]":
        """Wait for a record, and say now and then that it is the server which is waited for."""
        end = time.monotonic() + seconds
        while not wait([record], max(0.0, min(SLOW, end - time.monotonic()))).done and time.monotonic() < end:
            terminal.say(f"{self._server} is slow: {_records(len(self._waiting))}", "dim")
        return record

    def drop_waiting(self) -> None:
        """Give up all records but the one that is being sent, so that the next one is sent at once."""
        self._silent_until = 0.0  # the next one is tried even if the server has just failed
        for record in list(self._waiting):
            self.missed |= record.cancel()  # `cancel` returns false for the one that is being sent

    def close(self, last: "Future[Any]", seconds: float) -> None:
        """Wait for the last record for at most `seconds`; nothing is sent after it."""
        self.wait(last, seconds)
        unsent = len(self._waiting)
        self._queue.shutdown(wait=False, cancel_futures=True)
        if unsent:
            self.missed = True
            terminal.say(f"{self._server} is slow: {_records(unsent)} still; the next command sends what is missing")

    def _patiently(self, what: str, call: Callable[[], object]) -> None:
        """Send a record, or leave it out while the server is left alone."""
        if time.monotonic() < self._silent_until:
            self.missed = True
            return
        try:
            call()
        except Exception as error:  # any error: what this thread raises would stay in a Future that is never read
            _log.info("%s did not take %s: %s", self._server, what, type(error).__name__)
            self.missed = True
            self._silent_until = time.monotonic() + SILENT_SECONDS
            terminal.say(
                f"{self._server} did not take {what} ({first_line(error)}); the next command sends what is missing"
            )


def _records(count: int) -> str:
    return f"{counted(count, 'record')} {'waits' if count == 1 else 'wait'}"
