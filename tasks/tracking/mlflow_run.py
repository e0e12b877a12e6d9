"""One pipeline run in MLflow: a parent run, one child per stage, one model per candidate.

What MLflow holds is a function of the store: every call finds what is already there and adds what is missing. Every
call waits for MLflow's answer; tracker.py queues them.
"""

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.artifacts import Noun, Preferences
from models.errors import BadInput
from models.files.kept import RunsFolderEntry
from models.recipe import Assessment, Recipe
from tasks.tracking import connection, log
from tasks.tracking.log import where
from tasks.work import store
from tasks.work.store import Stage

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from models.report.tree import Report

TRIES = 3
"""How often the first call of all is tried, on which a run begins or not."""
AnyStage = Stage[Any]
"""A stage, whatever it makes."""


class StageRun(NamedTuple):
    """The run of one stage, as MLflow had it when this process last asked or changed it."""

    run_id: str
    status: str

    @property
    def finished(self) -> bool:
        """Whether all of the stage is in MLflow."""
        return self.status == "FINISHED"


class MlflowRun:
    """The parent run of one pipeline run, and the runs of its stages.

    Every method raises what `connection.failures` names where MLflow does not answer.
    """

    def __init__(self, root: Path, recipe: Recipe | Assessment, digest: str, tags: dict[str, str]) -> None:
        self.root, self.recipe, self.digest, self.tags = root, recipe, digest, tags
        self.parent = ""
        """Id of the parent run; empty until it is opened."""
        self._experiment = ""
        self._stage_runs: dict[str, StageRun] | None = None  # by the key of the stage; None until MLflow was asked
        self._running: dict[str, str] = {}  # stage key → id of its run, of stages that are not finished

    def client(self) -> "MlflowClient":
        """Return an MLflow client."""
        return connection.client(self.root)

    def begin(self) -> str:
        """Open the parent run; a connection that breaks once, as one behind a proxy may, is no refusal."""
        for pause in range(1, TRIES):
            try:
                return self.open()
            except connection.failures():
                time.sleep(pause)
        return self.open()

    def open(self) -> str:
        """Return the id of the parent run; a killed one is taken up again."""
        if self.parent:
            return self.parent
        client = self.client()
        experiment = client.get_experiment_by_name(self.recipe.name)
        if experiment is None:
            # a server knows where it keeps artifacts; for a sqlite file the folder is ours to say
            place = None if connection.SERVER else (self.root / RunsFolderEntry.artifacts).as_uri()
            experiment_id = client.create_experiment(self.recipe.name, artifact_location=place)
        else:
            experiment_id = experiment.experiment_id
        self._experiment = experiment_id
        runs = client.search_runs([experiment_id], where({"sacpo.run": self.digest}), max_results=1)
        if runs:
            parent = str(runs[0].info.run_id)
            client.update_run(parent, status="RUNNING")
        else:
            name = f"{self.recipe.name} · seed {self.recipe.seed} · {self.digest[:8]}"
            parent = client.create_run(
                experiment_id, run_name=name, tags={"sacpo.run": self.digest, **self.tags}
            ).info.run_id
        # MLflow's params are immutable. The number of processes may differ when a run is taken up again, so it is left
        # out; paths may differ too, after the runs folder was moved, so a param that is there is not sent again.
        settings = self.recipe.model_dump(mode="json", by_alias=True, exclude={"compute": {"processes"}})
        logged = client.get_run(parent).data.params if runs else {}
        log.params(client, parent, settings, logged)
        self.parent = parent  # only now: where a call above failed, the next call does all of it again
        return parent

    def follow(self, stage: AnyStage) -> None:
        """Send what a running stage has written of its curve and MLflow does not hold yet."""
        path = stage.partial(self.root) / "progress.jsonl"
        if not path.exists():
            return
        expected: tuple[type[Exception], ...] = (*connection.failures(), BadInput)
        try:
            stage_run = self._stage_run(stage)
            if not stage_run.finished:
                self._running[stage.key] = stage_run.run_id
                log.curve(self.client(), stage_run.run_id, path)
        except expected as error:
            # nothing is lost, and no person needs to hear of it: `record` sends the whole curve
            logging.getLogger(__name__).info("the curve of %s was not sent: %s", stage.title, error)

    def record(self, stage: AnyStage, noun: Noun) -> None:
        """Write down a finished stage: its params, its curve, its counts. Once, however often called.

        Raises:
            OSError: what the stage made is damaged.
        """
        client, parent = self.client(), self.open()
        stage_run = self._stage_run(stage)
        run_id = stage_run.run_id
        self._running.pop(stage.key, None)
        if stage_run.finished:
            return
        manifest = store.verified(noun.path)
        if manifest is None:  # the same command finds the damage too, and makes the result again
            raise OSError(f"{noun.path} is damaged")
        client.set_tag(run_id, "sacpo.path", str(noun.path))
        client.set_tag(run_id, "sacpo.digest", noun.digest)
        log.params(client, run_id, manifest["given"])
        log.curve(client, run_id, noun.path / "progress.jsonl")
        # bool is a subclass of int, and no figure
        numbers = {k: v for k, v in noun.facts().items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        log.numbers(client, run_id, {**numbers, "seconds": manifest["seconds"]})
        if isinstance(noun, Preferences):
            for run in (run_id, parent):
                log.dataset(client, run, stage.title, noun)
        if (noun.path / "card.json").exists():
            client.log_artifact(run_id, str(noun.path / "card.json"))
        client.set_terminated(run_id)
        self._stage_runs_by_key()[stage.key] = StageRun(run_id, "FINISHED")

    def finish(self, report: Path, tags: dict[str, str]) -> None:
        """Log the report in a folder and one model per candidate, and close the parent run."""
        client, parent = self.client(), self.open()
        tree: Report = json.loads((report / "report.json").read_text("utf-8"))
        for name in ("report.html", "report.json", "report.md", "frontier.png"):
            if (report / name).exists():  # there is no picture where the answers were not judged
                client.log_artifact(parent, str(report / name))
        client.log_artifacts(parent, str(report / "tables"), "tables")
        log.table(client, parent, report / "tables")
        run = client.get_run(parent)
        models = client.search_logged_models([run.info.experiment_id], where({"source_run_id": parent}))
        logged = {model.tags.get("sacpo.policy") for model in models if model.status == "READY"}
        for candidate in tree["candidates"]:
            if candidate["digest"] not in logged:
                log.candidate(client, run, candidate)
        chosen = tree["chosen"]["candidate"] if tree["chosen"] else "none"
        for key, value in {"sacpo.chosen": chosen, **tags}.items():
            client.set_tag(parent, key, value)
        log.numbers(client, parent, log.headline(tree))
        client.set_terminated(parent)

    def fail(self, status: str) -> None:
        """Close the parent run and the stages that are not finished as FAILED or KILLED."""
        # a killed process has seconds left: it closes a run that was opened, and opens none
        parent = self.parent or ("" if status == "KILLED" else self.open())
        for run_id in [parent, *self._running.values()] if parent else ():
            self.client().set_terminated(run_id, status)

    def _stage_run(self, stage: AnyStage) -> StageRun:
        """Return a stage's own run; one that was closed unfinished is taken up again."""
        client, parent = self.client(), self.open()
        stage_runs = self._stage_runs_by_key()
        if stage.key in stage_runs:
            stage_run = stage_runs[stage.key]
            if stage_run.status not in ("FINISHED", "RUNNING"):
                client.update_run(stage_run.run_id, status="RUNNING")
                stage_runs[stage.key] = StageRun(stage_run.run_id, "RUNNING")
            return stage_runs[stage.key]
        tags = {"sacpo.stage": stage.key, "mlflow.parentRunId": parent}
        run_id = str(client.create_run(self._experiment, run_name=stage.title, tags=tags).info.run_id)
        stage_runs[stage.key] = StageRun(run_id, "RUNNING")
        return stage_runs[stage.key]

    def _stage_runs_by_key(self) -> dict[str, StageRun]:
        """Return the runs of the stages by stage key; MLflow is asked once, since a repeated run may have hundreds."""
        if self._stage_runs is None:
            stage_runs: dict[str, StageRun] = {}
            token: str | None = None
            children = where({"mlflow.parentRunId": self.open()})
            while token != "":  # the token names the next page; it is empty after the last one
                page = self.client().search_runs([self._experiment], children, page_token=token)
                for run in page:
                    stage_runs[run.data.tags.get("sacpo.stage", "")] = StageRun(run.info.run_id, run.info.status)
                token = page.token or ""
            self._stage_runs = stage_runs
        return self._stage_runs


def close_killed(root: Path, name: str, digest: str) -> None:
    """Close as KILLED what a run that died left running, its stages included; the same command opens it again.

    Args:
        name: name of the recipe, which is the name of the experiment.
        digest: digest of the run.
    """
    client = connection.client(root)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return
    for parent in client.search_runs([experiment.experiment_id], where({"sacpo.run": digest})):
        stages = client.search_runs([experiment.experiment_id], where({"mlflow.parentRunId": parent.info.run_id}))
        for run in (*stages, parent):
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")
