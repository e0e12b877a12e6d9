"""What a run tells MLflow: records are queued, and a dead server costs a warning. Decisions wait for an answer.

mlflow_run.py and registration.py say what is sent; the next command sends what a dead server has missed.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from models.artifacts import Noun, Policy
from models.errors import BadPlace
from models.gate.promotion_log import Registered
from models.recipe import Assessment, Recipe
from models.words import first_line
from tasks.tracking import connection, outbox
from tasks.tracking.mlflow_run import AnyStage, MlflowRun
from tasks.tracking.outbox import Outbox
from tasks.tracking.pages import pages
from tasks.tracking.registration import Registration

P = ParamSpec("P")
T = TypeVar("T")

FOLLOW_SECONDS = 10.0
"""Seconds between two looks at the curve of a running stage."""


class Tracker:
    """One pipeline run as MLflow sees it, and the queue of what it is still to be told.

    Calls that only remember are queued and never stop a training: a server that fails is reported once per call, and
    the next command sends what is missing. `register` decides something, so it waits and raises.
    """

    def __init__(self, root: Path, recipe: Recipe | Assessment, digest: str, tags: dict[str, str]) -> None:
        self._root = root
        self._out = Outbox("MLflow")
        self._run = MlflowRun(root, recipe, digest, tags)
        self._registration = Registration(self._run)
        self._closed = False
        self._next_look: dict[str, float] = {}  # stage key → when to look at its curve again (time.monotonic)
        opened = self._out.send("the run", self._run.begin)
        if connection.SERVER:
            # a server that the user named and that refuses the run must be reported before hours of training
            self._out.wait(opened)
            if self._out.missed:
                address = connection.shown_uri(root)
                raise BadPlace(f"MLFLOW_TRACKING_URI = {address} takes no runs; see above, or unset it")

    def follow(self, stage: AnyStage) -> None:
        """Queue what a running stage has written of its curve, every FOLLOW_SECONDS seconds."""
        now = time.monotonic()
        if now >= self._next_look.get(stage.key, now):
            # no second look is queued while this one waits; the time of the next one is set when it is sent or left out
            self._next_look[stage.key] = math.inf
            record = self._out.send(stage.title, self._run.follow, stage)
            record.add_done_callback(lambda _: self._next_look.update({stage.key: time.monotonic() + FOLLOW_SECONDS}))

    def record(self, stage: AnyStage, noun: Noun) -> None:
        """Queue a finished stage as a child run: its own params, its curve, its counts. Once, however often called."""
        self._out.send(stage.title, self._run.record, stage, noun)

    def register(self, policy: Policy, tags: dict[str, str]) -> str:
        """Register the chosen policy and return its version; aliases are moved elsewhere (registry/champion.py).

        A version of the same policy from the same run is found again, not made twice, and carries the newest tags.

        Raises:
            BadPlace: MLflow does not answer.
            Damaged: the policy's files are not what its digest names.
        """
        return self._answer("did not register the policy", self._registration.register, policy, tags)

    def versions(self, policy: Policy) -> list[str]:
        """Return the versions that this run has registered of a policy.

        Raises:
            BadPlace: MLflow does not answer.
        """
        versions = self._answer("does not answer", self._registration.versions, policy)
        return [str(version.version) for version in versions]

    def describe(self, registered: Registered, card: str, out: Path) -> None:
        """Write the model card, and queue it as description of the version and as artifact of the run."""
        (out / "model_card.md").write_text(card, "utf-8")
        self._out.send("the model card", self._registration.describe, registered, card, out)

    def pages(self, registered: Registered) -> list[tuple[str, str]]:
        """Return (address, text) of the pages of the run and of the version, where MLflow is a server."""
        return pages(self._run, registered)

    def tag(self, model: str, version: str, tags: dict[str, str]) -> None:
        """Queue tags of a registered version."""
        for key, value in tags.items():
            self._out.send("a tag", self._registration.tag, model, version, key, value)

    def finish(self, report: Path, tags: dict[str, str]) -> bool:
        """Log the report and one model per candidate, close the run, wait, and return whether all was taken.

        A slow server is waited for no longer than `outbox.LONGEST`.
        """
        self._closed = True
        self._out.close(self._out.send("the report", self._run.finish, report, tags), outbox.LONGEST)
        return not self._out.missed

    def fail(self, status: str) -> None:
        """Close the parent run as FAILED or KILLED; the same command opens it again, and sends what still waits."""
        if self._closed:
            return
        self._closed, killed = True, status == "KILLED"
        if killed:  # the process that ends this one waits a few seconds only, so only the closing call is sent
            self._out.drop_waiting()
        last = self._out.send("the end of the run", self._run.fail, status)
        self._out.close(last, outbox.LAST if killed else outbox.LONGEST)

    def _answer(self, trouble: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what a call returns, after everything that waits to be sent.

        Raises:
            BadPlace: MLflow failed; `trouble` says what it did not do.
        """
        try:
            return self._out.wait(self._out.submit(call, *args, **kwargs)).result()
        except connection.failures() as error:
            why = f"{trouble} ({first_line(error)}); the same command tries again"
            raise BadPlace(f"MLflow at {connection.shown_uri(self._root)} {why}") from error
