"""How far a stage is: a bar in the terminal, and about every five seconds a progress artifact on Prefect's page."""

import time
from contextlib import suppress
from contextvars import copy_context
from threading import Thread
from typing import Any

from models.markdown import plain
from tasks.work import terminal
from tasks.work.store import Stage

ARTIFACT_SECONDS = 5.0
"""Seconds between two words to Prefect; a stage that takes less has no artifact."""
LAST_ARTIFACT_TIMEOUT = 5.0
"""Seconds that the end of a stage waits for a server that has not taken the word before."""


class Progress:
    """Shows one running stage; made in the task run whose artifact it is."""

    def __init__(self) -> None:
        self.artifact: Any = None
        self.told = time.monotonic()
        self.teller: Thread | None = None

    def __call__(self, stage: Stage[Any], line: dict[str, Any]) -> None:
        """Show the newest line of its `progress.jsonl`."""
        terminal.moved(stage.title, line)
        if time.monotonic() - self.told >= ARTIFACT_SECONDS and not (self.teller and self.teller.is_alive()):
            self._begin(stage, 100.0 * line["done"] / line["of"])

    def done(self, stage: Stage[Any]) -> None:
        """Show the whole, where a part was shown."""
        if self.teller:
            self.teller.join(LAST_ARTIFACT_TIMEOUT)
            self._begin(stage, 100.0)

    def _begin(self, stage: Stage[Any], share: float) -> None:
        """Tell Prefect beside us, since a dead server is asked for a minute; in our context, which names the run."""
        self.told = time.monotonic()
        self.teller = Thread(target=copy_context().run, args=(self._tell, stage.title, share), daemon=True)
        self.teller.start()

    def _tell(self, title: str, share: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        with suppress(Exception):  # a page that cannot be told must not stop a training
            if self.artifact is None:
                self.artifact = create_progress_artifact(share, description=plain(title))
            else:
                update_progress_artifact(self.artifact, share)
