"""What MLflow remembers of a run: runs, params, metrics, models, the registry; log.py and download.py help.

What MLflow holds is a function of the store: every call finds what is already there and adds what is missing. A dead
server therefore costs a warning, and the next command sends what it missed.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from models.artifacts import Noun, Policy, Preferences
from models.errors import BadPlace, Damaged
from models.files.kept import Kept
from models.gate.promotion_log import Registered
from models.policy.weights import content, intact
from models.recipe import Assessment, Recipe
from models.words import first_line
from tasks.access import passwords, proxies
from tasks.tracking import log, outbox
from tasks.tracking.ledger import Ledger
from tasks.tracking.log import where
from tasks.tracking.outbox import Outbox
from tasks.work import store
from tasks.work.store import Stage

SERVER = os.environ.get("MLFLOW_TRACKING_URI", "")
"""The server that the user named, if any; asked once, since mlflow itself sets the variable later."""
CHAT_POLICY = Path(__file__).parents[2] / "mlflow" / "chat_policy.py"
FOLLOW_SECONDS = 10.0
"""Seconds between two looks at the curve of a running stage."""
TRIES = 3
"""For the first call of all, on which a run begins or not."""
ANSWERS, MOVES = "10", "3600"
"""Seconds for an answer of MLflow, and for one that comes when a file of weights has been moved: a server that keeps
artifacts elsewhere (S3) takes the whole file, copies it there, and answers then."""


def uri(root: Path) -> str:
    """Return the tracking address: `MLFLOW_TRACKING_URI`, else a sqlite file in the runs folder."""
    return passwords.numbered(root, "MLFLOW_TRACKING_URI", SERVER) or f"sqlite:///{root / Kept.mlflow}"


def shown(root: Path) -> str:
    """Return the tracking address as it may be shown."""
    return without_password(uri(root))


def without_password(address: str) -> str:
    """Return an address without user and password."""
    head, mark, rest = address.partition("://")
    return f"{head}{mark}{rest.rpartition('@')[2]}"


def client(root: Path) -> Any:
    """Return an MLflow client for this runs folder; importing mlflow takes seconds, so it happens here."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", ANSWERS)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # we say it ourselves, in one line
    if SERVER:
        named = passwords.credentials(root, {**os.environ, "MLFLOW_TRACKING_URI": SERVER, "PREFECT_API_URL": ""})
        named.pop("MLFLOW_TRACKING_URI", None)
        os.environ.update(proxies.direct(os.environ) | named)
    else:
        # without it every client leaves an empty ./mlruns where the command was given
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = (root / Kept.artifacts).as_uri()
        root.mkdir(parents=True, exist_ok=True)
        log.database(root / Kept.mlflow)
    mlflow.set_tracking_uri(uri(root))
    return mlflow.MlflowClient()


@contextmanager
def moving() -> Iterator[None]:
    """Give MLflow the time that weights take; a limit that the user has set stays."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ.get(name, ANSWERS)
    os.environ[name] = MOVES if before == ANSWERS else before
    try:
        yield
    finally:
        os.environ[name] = before


def close_killed(root: Path, experiment: str, digest: str) -> None:
    """Close as KILLED what a run that died left running, its stages included; the same command opens it again."""
    mlflow = client(root)
    known = mlflow.get_experiment_by_name(experiment)
    for parent in mlflow.search_runs([known.experiment_id], where({"sacpo.run": digest})) if known else ():
        stages = mlflow.search_runs([known.experiment_id], where({"mlflow.parentRunId": parent.info.run_id}))
        for run in (*stages, parent):
            if run.info.status == "RUNNING":
                mlflow.set_terminated(run.info.run_id, "KILLED")


class Tracker:
    """One pipeline run as MLflow sees it: a parent run, one child per stage, one model per candidate.

    Calls that only remember are queued and never stop a training: a server that fails is reported once per call, and
    the next command sends what is missing. `register` decides something, so it waits and raises.
    """

    def __init__(self, root: Path, recipe: Recipe | Assessment, digest: str, tags: dict[str, str]) -> None:
        self.root, self.recipe, self.digest, self.tags = root, recipe, digest, tags
        self._out = Outbox("MLflow")
        self._parent = self._experiment = ""
        self._children: dict[str, tuple[str, str]] | None = None  # stage key → its run and status, asked for once
        self._closed = False
        self._next: dict[str, float] = {}  # stage key → when to look at its curve again
        self._running: dict[str, str] = {}  # stage key → run that is not finished
        opened = self._out.send("the run", self._begin)
        if SERVER:  # one that refuses us is said before anything is trained
            self._out.wait(opened)
            if self._out.missed:
                raise BadPlace(f"MLFLOW_TRACKING_URI = {shown(root)} takes no runs; see above, or unset it")

    def follow(self, stage: Stage[Any]) -> None:
        """Queue what a running stage has written of its curve, every FOLLOW_SECONDS seconds."""
        now = time.monotonic()
        if now >= self._next.get(stage.key, now):
            self._next[stage.key] = math.inf  # until this is sent, or left out
            record = self._out.send(stage.title, self._follow, stage)
            record.add_done_callback(lambda _: self._next.update({stage.key: time.monotonic() + FOLLOW_SECONDS}))

    def record(self, stage: Stage[Any], noun: Noun) -> None:
        """Queue a finished stage as a child run: its own params, its curve, its counts. Once, however often called."""
        self._out.send(stage.title, self._record, stage, noun)

    def register(self, policy: Policy, tags: dict[str, str]) -> str:
        """Register the chosen policy and return its version; aliases are moved elsewhere (registry/champion.py).

        A version of the same policy from the same run is found again, not made twice, and carries the newest tags.

        Raises:
            BadPlace: MLflow does not answer.
        """
        return str(self._now("did not register the policy", self._register, policy, tags))

    def versions(self, policy: Policy) -> list[str]:
        """Return the versions that this run has registered of a policy.

        Raises:
            BadPlace: MLflow does not answer.
        """
        return [str(version.version) for version in self._now("does not answer", self._versions, policy)]

    def _now(self, trouble: str, call: Callable[..., Any], *given: Any) -> Any:
        """Return what a call gives, behind everything that waits to be sent."""
        try:
            return self._out.wait(self._out.submit(call, *given)).result()
        except failures() as error:
            why = f"{trouble} ({first_line(error)}); the same command tries again"
            raise BadPlace(f"MLflow at {shown(self.root)} {why}") from error

    def describe(self, registered: Registered, card: str, out: Path) -> None:
        """Write the model card, and queue it as description of the version and as artifact of the run."""
        (out / "model_card.md").write_text(card, "utf-8")
        self._out.send("the model card", self._describe, registered, card, out)

    def _describe(self, registered: Registered, card: str, out: Path) -> None:
        self._client().update_model_version(registered.name, registered.version, card)
        self._client().log_artifact(self._open(), str(out / "model_card.md"))

    def pages(self, registered: Registered) -> list[tuple[str, str]]:
        """Return (address, text) of the pages of the run and of the version, where MLflow is a server."""
        server = shown(self.root)
        return log.pages(self._client(), server, self._open(), registered) if server.startswith("http") else []

    def tag(self, model: str, version: str, tags: dict[str, str]) -> None:
        """Queue tags of a registered version."""
        for key, value in tags.items():
            self._out.send("a tag", self._tag, model, version, key, value)

    def _tag(self, *given: str) -> None:
        self._client().set_model_version_tag(*given)

    def finish(self, report: Path, tags: dict[str, str]) -> bool:
        """Log the report and one model per candidate, close the run, wait, and return whether all was taken.

        A slow server is waited for no longer than `outbox.LONGEST`.
        """
        self._closed = True
        self._out.close(self._out.send("the report", self._finish, report, tags), outbox.LONGEST)
        return not self._out.missed

    def fail(self, status: str) -> None:
        """Close the parent run as FAILED or KILLED; the same command opens it again, and sends what still waits."""
        if self._closed:
            return
        self._closed, killed = True, status == "KILLED"
        if killed:  # only the closing call: somebody waits for our end
            self._out.drop()
        last = self._out.send("the end of the run", self._fail, status)
        self._out.close(last, outbox.LAST if killed else outbox.LONGEST)

    def _fail(self, status: str) -> None:
        parent = self._parent or ("" if status == "KILLED" else self._open())
        for run_id in [parent, *self._running.values()] if parent else ():  # else it was never begun
            self._client().set_terminated(run_id, status)

    def _begin(self) -> str:
        """Open the parent run; a connection that breaks once, as one behind a proxy may, is no refusal."""
        for pause in range(1, TRIES):
            try:
                return self._open()
            except failures():
                time.sleep(pause)
        return self._open()

    def _client(self) -> Any:
        return client(self.root)

    def _open(self) -> str:
        """Return the id of the parent run; a killed one is taken up again."""
        if self._parent:
            return self._parent
        mlflow = self._client()
        experiment = mlflow.get_experiment_by_name(self.recipe.name)
        if experiment is None:
            place = None if SERVER else (self.root / Kept.artifacts).as_uri()
            experiment_id = mlflow.create_experiment(self.recipe.name, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        self._experiment = experiment_id
        found = mlflow.search_runs([experiment_id], where({"sacpo.run": self.digest}), max_results=1)
        if found:
            parent = str(found[0].info.run_id)
            mlflow.update_run(parent, status="RUNNING")
        else:
            tags = {"sacpo.run": self.digest, **self.tags}
            parent = mlflow.create_run(
                experiment_id, run_name=f"{self.recipe.name} · seed {self.recipe.seed} · {self.digest[:8]}", tags=tags
            ).info.run_id
        told = self.recipe.model_dump(mode="json", by_alias=True, exclude={"compute": {"processes"}})
        known = mlflow.get_run(parent).data.params if found else {}  # params never change; paths may have moved
        log.params(mlflow, parent, told, known)  # nor do they hold how many processes a run has
        self._parent = parent
        return parent

    def _child(self, stage: Stage[Any]) -> tuple[str, bool]:
        """Return the id of a stage's own run, and whether it is finished."""
        mlflow, parent = self._client(), self._open()
        known = self._known()
        if stage.key in known:
            run_id, status = known[stage.key]
            if status not in ("FINISHED", "RUNNING"):
                mlflow.update_run(run_id, status="RUNNING")
                known[stage.key] = run_id, "RUNNING"
            return run_id, status == "FINISHED"
        tags = {"sacpo.stage": stage.key, "mlflow.parentRunId": parent}
        run_id = str(mlflow.create_run(self._experiment, run_name=stage.title, tags=tags).info.run_id)
        known[stage.key] = run_id, "RUNNING"
        return run_id, False

    def _known(self) -> dict[str, tuple[str, str]]:
        """Return stage key → run and status; asked for once, since a run that is repeated may have hundreds."""
        if self._children is None:
            found: dict[str, tuple[str, str]] = {}
            page: str | None = None
            children = where({"mlflow.parentRunId": self._open()})
            while page != "":
                held = self._client().search_runs([self._experiment], children, page_token=page)
                found |= {run.data.tags.get("sacpo.stage", ""): (run.info.run_id, run.info.status) for run in held}
                page = held.token or ""
            self._children = found
        return self._children

    def _follow(self, stage: Stage[Any]) -> None:
        path = stage.partial(self.root) / "progress.jsonl"
        with suppress(Exception):  # a look that failed costs nothing: `record` sends the whole curve
            run_id, finished = self._child(stage) if path.exists() else ("", True)
            if not finished:
                self._running[stage.key] = run_id
                log.curve(self._client(), run_id, path)

    def _record(self, stage: Stage[Any], noun: Noun) -> None:
        mlflow, parent = self._client(), self._open()
        run_id, finished = self._child(stage)
        self._running.pop(stage.key, None)
        if finished:
            return
        manifest = store.verified(noun.path)
        if manifest is None:  # the same command finds it out, and makes it again
            raise OSError(f"{noun.path} is damaged")
        mlflow.set_tag(run_id, "sacpo.path", str(noun.path))
        mlflow.set_tag(run_id, "sacpo.digest", noun.digest)
        log.params(mlflow, run_id, manifest["given"])
        log.curve(mlflow, run_id, noun.path / "progress.jsonl")
        numbers = {k: v for k, v in noun.facts().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        log.numbers(mlflow, run_id, {**numbers, "seconds": manifest["seconds"]})
        if isinstance(noun, Preferences):
            for holder in (run_id, parent):
                log.dataset(mlflow, holder, stage.title, noun)
        if (noun.path / "card.json").exists():
            mlflow.log_artifact(run_id, str(noun.path / "card.json"))
        mlflow.set_terminated(run_id)
        self._known()[stage.key] = run_id, "FINISHED"

    def _register(self, policy: Policy, tags: dict[str, str]) -> str:
        assert isinstance(self.recipe, Recipe)  # nothing is registered where nothing is trained
        mlflow, parent, name = self._client(), self._open(), self.recipe.registered_name
        try:
            mlflow.create_registered_model(name)
        except failures() as error:
            if getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
        versions = self._versions(policy)
        if versions:  # by a run that was killed, or that compared with a champion of before
            version = str(versions[0].version)
            for key in {key for key in versions[0].tags if key.startswith("gate.")} - tags.keys():
                mlflow.delete_model_version_tag(name, version, key)
            for key, value in tags.items():
                mlflow.set_model_version_tag(name, version, key, value)
        else:
            address = self._logged(name, policy)
            model_id = address.rpartition("/")[2]  # a server refuses the address without it
            made = mlflow.create_model_version(name, address, parent, tags=self._own(policy) | tags, model_id=model_id)
            version = str(made.version)
        return version

    def _own(self, policy: Policy) -> dict[str, str]:
        """Return the tags by which a version of this run is found."""
        return {"sacpo.policy": policy.digest, "sacpo.run_id": self._open()}

    def _versions(self, policy: Policy) -> list[Any]:
        """Return this run's versions of a policy; everybody can edit tags: the ledger knows which weights are ours."""
        assert isinstance(self.recipe, Recipe)  # nothing is registered where nothing is trained
        name = self.recipe.registered_name
        known = Ledger(self.root).logged(name)
        found = self._client().search_model_versions(where({"name": name, **self._own(policy)}))
        return [version for version in found if known.get(str(version.source)) == policy.digest]

    def _logged(self, name: str, policy: Policy) -> str:
        """Log the weights of a version-to-be of `name` with the code that serves them; return their address."""
        import mlflow as api

        known = Ledger(self.root).logged(name)
        mlflow, parent = self._client(), self._open()
        experiment = mlflow.get_run(parent).info.experiment_id
        for model in mlflow.search_logged_models([experiment], where({"source_run_id": parent})):
            if known.get(str(model.model_uri)) == policy.digest and model.status == "READY":
                return str(model.model_uri)
        try:
            intact(policy.path, policy.digest)
        except Damaged:
            store.distrust(policy.path)
            raise
        decoding = self.recipe.evaluation.model_dump(include={"max_new_tokens", "temperature", "stop"})
        with moving(), api.start_run(run_id=parent):
            logged = api.pyfunc.log_model(
                name="policy",
                python_model=str(CHAT_POLICY),
                artifacts={"policy": str(policy.path)},
                model_config={"decoding": decoding, "sha256": content(policy.path)},
                pip_requirements=[f"{one}=={installed(one).partition('+')[0]}" for one in ("torch", "transformers")],
                tags={"sacpo.weights": policy.digest},
            )
        Ledger(self.root).note_logged(name, str(logged.model_uri), policy.digest)
        return str(logged.model_uri)

    def _finish(self, report: Path, tags: dict[str, str]) -> None:
        mlflow, parent = self._client(), self._open()
        tree = json.loads((report / "report.json").read_text("utf-8"))
        for name in ("report.html", "report.json", "report.md", "frontier.png"):
            if (report / name).exists():  # no picture where nobody judged
                mlflow.log_artifact(parent, str(report / name))
        mlflow.log_artifacts(parent, str(report / "tables"), "tables")
        log.table(mlflow, parent, report / "tables")
        run = mlflow.get_run(parent)
        models = mlflow.search_logged_models([run.info.experiment_id], where({"source_run_id": parent}))
        known = {model.tags.get("sacpo.policy") for model in models if model.status == "READY"}
        for told in tree["candidates"]:
            if told["digest"] not in known:
                log.candidate(mlflow, run, told)
        for key, value in {"sacpo.chosen": (tree["chosen"] or {"candidate": "none"})["candidate"], **tags}.items():
            mlflow.set_tag(parent, key, value)
        log.numbers(mlflow, parent, log.headline(tree))
        mlflow.set_terminated(parent)


def failures() -> tuple[type[Exception], ...]:
    """Return what MLflow raises where it cannot do or find what it is asked for."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, SQLAlchemyError, OSError)
