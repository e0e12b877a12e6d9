"""How far a stage is: a bar in the terminal, and about every five seconds a progress artifact on Prefect's page."""

import logging
import time
from contextvars import copy_context
from threading import Thread
from typing import cast
from uuid import UUID

from models.artifacts import Noun
from models.markdown import plain
from models.words import first_line
from tasks.work import terminal
from tasks.work.progress_rows import ProgressRow
from tasks.work.store import Stage

ARTIFACT_SECONDS = 5.0
"""Seconds between two messages to Prefect; a stage that takes less has no artifact."""
LAST_ARTIFACT_TIMEOUT = 5.0
"""Seconds that the end of a stage waits while a slow or dead server has not taken the message before."""

_log = logging.getLogger(__name__)


class Progress:
    """Shows one running stage; must be made in the task run whose artifact it is."""

    def __init__(self) -> None:
        self.artifact: UUID | None = None
        self.last_sent = time.monotonic()
        self.sender: Thread | None = None

    def __call__(self, stage: Stage[Noun], row: ProgressRow) -> None:
        """Show the newest row of the stage's `progress.jsonl`."""
        terminal.update_bar(stage.title, row)
        is_sending = self.sender is not None and self.sender.is_alive()
        if time.monotonic() - self.last_sent >= ARTIFACT_SECONDS and not is_sending:
            self._send(stage, 100.0 * row["done"] / row["of"])

    def done(self, stage: Stage[Noun]) -> None:
        """Show 100 % on Prefect's page, if it has shown a part."""
        if self.sender:
            # one message at a time, else an older share could arrive after 100 %
            self.sender.join(LAST_ARTIFACT_TIMEOUT)
            self._send(stage, 100.0)

    def _send(self, stage: Stage[Noun], percent: float) -> None:
        """Start to send a share to Prefect."""
        self.last_sent = time.monotonic()
        # Sent in a thread, since the client tries a dead server for up to two minutes. A thread has an empty context of
        # its own, and Prefect finds the task run in ours.
        self.sender = Thread(target=copy_context().run, args=(self._put, stage.title, percent), daemon=True)
        self.sender.start()

    def _put(self, title: str, percent: float) -> None:
        """Make the artifact, or change it."""
        import httpx
        from prefect.artifacts import create_progress_artifact, update_progress_artifact
        from prefect.exceptions import PrefectException

        try:
            if self.artifact is None:
                # it would return a coroutine if an event loop ran, which is never so in this thread
                self.artifact = cast(UUID, create_progress_artifact(percent, description=plain(title)))
            else:
                update_progress_artifact(self.artifact, percent)
        # Servers that do not answer, refuse, or answer nonsense; event loops that are closed at the end of a run. The
        # training goes on without the page. Any other error ends this thread alone, with its traceback.
        except (httpx.HTTPError, PrefectException, OSError, RuntimeError, ValueError) as error:
            _log.info("%s: Prefect has not taken its progress (%s)", title, first_line(error))
