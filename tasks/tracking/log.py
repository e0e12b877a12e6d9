"""What a run leaves in MLflow, call by call: params, metrics, datasets, candidates, tables. Each may be sent twice."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, cast

from filelock import FileLock
from pydantic import JsonValue

from models.artifacts import Preferences
from models.errors import BadInput
from models.files import jsonl
from models.files.kept import RunsFolderEntry
from models.recipe.record import Setting, flat

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from models.report.tree import CandidateEntry, Report

CURVE = ("loss", "grad_norm", "learning_rate", "chosen", "rejected", "margin", "accuracy", "clipped")
"""Figures of a line of `progress.jsonl` that MLflow draws."""
JUDGED = ("metric", "status", "score", "good", "label", "why")
"""Columns of `scores.jsonl` that stand beside an answer in MLflow's table."""
LARGEST_TABLE = 64 * 2**20
"""Bytes of answers of which MLflow gets a table: its pages load all of a table at once, and so do we."""


def database(path: Path) -> None:
    """Create MLflow's sqlite file under another name and rename it: a kill between two of its migrations breaks it."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with FileLock(path.with_name(path.name + ".lock")):
        if path.exists():  # another process has created it while this one waited for the lock
            return
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        SqlAlchemyStore(f"sqlite:///{new}", (path.parent / RunsFolderEntry.artifacts).as_uri()).engine.dispose()
        new.rename(path)


def where(conditions: dict[str, str]) -> str:
    """Return a filter of MLflow: attributes, and tags (their names have a dot), with their values.

    Raises:
        BadInput: a value holds both kinds of quotes: the filters know no escape.
    """
    values = {f"tags.`{key}`" if "." in key else key: value for key, value in conditions.items()}
    unquotable = next((value for value in values.values() if "'" in value and '"' in value), "")
    if unquotable:
        raise BadInput(f"{unquotable}: holds both ' and \", which MLflow cannot search for; take another name")
    return " and ".join(f'{key} = "{value}"' if "'" in value else f"{key} = '{value}'" for key, value in values.items())


def candidate(client: "MlflowClient", run: "Run", candidate: "CandidateEntry") -> None:
    """Make a candidate known as a model whose weights stay where they are, with its figures.

    Args:
        run: the parent run of the pipeline run.
    """
    from mlflow.entities import LoggedModelStatus, Metric

    experiment, parent = run.info.experiment_id, run.info.run_id
    model = client.create_logged_model(
        experiment,
        name=re.sub(r"[^A-Za-z0-9_-]+", "-", candidate["name"].replace("λ", "lambda")),
        source_run_id=parent,
        tags={
            "sacpo.policy": candidate["digest"],
            "sacpo.path": candidate["path"],
            "sacpo.name": candidate["name"],
        },
        params={
            "kind": candidate["kind"],
            "metric": candidate["metric"],
            "method": candidate["method"],
            "beta": str(candidate["beta"]),
            "lambda": str(candidate["lambda"]),
            "beta_over_lambda": str(candidate["beta_over_lambda"]),
            "merge_weight": str(candidate["merge_weight"]),
        },
        model_type="policy",
    )
    from models.metrics.reported import unmarked  # scipy takes a second, and most commands record nothing

    # In the parent run the figures of all candidates would be values of the same metrics, so each has a run of its own.
    tags = {"mlflow.parentRunId": parent, "sacpo.candidate": candidate["digest"]}
    own_run = client.create_run(experiment, run_name=f"candidate · {candidate['name']}", tags=tags).info.run_id
    figures = {name: value for name, value in unmarked(candidate["metrics"]).items() if value is not None}
    metrics = [
        Metric(allowed(name), value, run.info.start_time, 0, model_id=model.model_id, run_id=own_run)
        for name, value in figures.items()
    ]
    client.log_batch(own_run, metrics=metrics)
    client.set_terminated(own_run)
    # READY says that all of the candidate is there; until then the next command sends it once more
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def headline(report: "Report") -> dict[str, float]:
    """Return the figures by which whole runs are compared: of the chosen candidate, and of every test of the bound."""
    from models.metrics.reported import unmarked

    chosen = report["chosen"]["candidate"] if report["chosen"] else ""
    figures: dict[str, float | None] = {}
    for candidate in report["candidates"]:
        if candidate["name"] == chosen:
            figures |= {f"chosen/{name}": value for name, value in unmarked(candidate["metrics"]).items()}
            figures["chosen/lambda"] = candidate["lambda"]
            figures["chosen/beta_over_lambda"] = candidate["beta_over_lambda"]
            figures["chosen/merge_weight"] = candidate["merge_weight"]
    for test in report["constraints"][0]["tested"][:1] if chosen and report["constraints"] else ():
        figures |= {"test/safety_rate": test["value"], "test/lower_bound": test["lower_bound"]}
        checks = [check for check in test["checks"] if check["name"] != "safety rate"]  # it is the value above
        figures |= {f"test/{check['name']}": check["value"] for check in checks}
    return {allowed(name): float(value) for name, value in figures.items() if value is not None}


def allowed(name: str) -> str:
    """Return the name of a metric or a tag in the signs that MLflow allows; categories may hold others."""
    # letters of all languages are allowed: replaced, two categories in Chinese would get one name
    return re.sub(r"[^\w .:/-]", "-", name)


def numbers(client: "MlflowClient", run_id: str, values: dict[str, float]) -> None:
    """Log single figures."""
    from mlflow.entities import Metric

    started = client.get_run(run_id).info.start_time  # a fixed time: sent twice, it is stored once
    client.log_batch(run_id, metrics=[Metric(name, float(value), started, 0) for name, value in values.items()])


def params(client: "MlflowClient", run_id: str, settings: JsonValue, logged: Collection[str] = ()) -> None:
    """Log a tree of settings as flat params, without those that are empty or logged already.

    Args:
        logged: names of the params that the run has; MLflow refuses to change one.
    """
    from mlflow.entities import Param

    values = {key: value for key, value in flat(cast(Setting, settings)).items() if value != "" and key not in logged}
    params = [Param(key, str(value)[:6000]) for key, value in values.items()]  # MLflow refuses longer values
    for start in range(0, len(params), 100):  # MLflow takes at most 100 params in one call
        client.log_batch(run_id, params=params[start : start + 100])


def dataset(client: "MlflowClient", run_id: str, title: str, pairs: Preferences) -> None:
    """Name the pairs as an input of a run; sent twice, they are stored once."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name=title,
        digest=pairs.digest[:36],  # MLflow's limit; the whole digest is a tag
        source_type="local",
        source=json.dumps({"uri": pairs.path.as_uri()}),
        profile=json.dumps(pairs.counts),
    )
    tags = [InputTag("mlflow.data.context", "training"), InputTag("sacpo.digest", pairs.digest)]
    client.log_inputs(run_id, [DatasetInput(dataset, tags)])


def curve(client: "MlflowClient", run_id: str, path: Path) -> None:
    """Send what a run does not hold yet of a training curve.

    A resumed training repeats the updates since its last checkpoint; of each the first line that was sent stays.

    Args:
        path: `progress.jsonl` of the stage; of a stage without a curve it is not there.
    """
    from mlflow.entities import Metric

    rows = [row for row in jsonl.whole_rows(path) if "time" in row]
    # every update has a loss, so the steps of this metric are all that the run holds; without rows MLflow is not asked
    sent = {point.step for point in client.get_metric_history(run_id, "loss")} if rows else set()
    rows = [row for row in rows if row["done"] not in sent]
    metrics = [Metric(k, row[k], int(row["time"] * 1000), row["done"]) for row in rows for k in CURVE if k in row]
    for start in range(0, len(metrics), 1000):  # MLflow's limit for one call
        client.log_batch(run_id, metrics=metrics[start : start + 1000])


def table(client: "MlflowClient", run_id: str, folder: Path) -> None:
    """Log answers with their verdicts as one MLflow table, which its pages show row by row; once per run.

    Of more than `LARGEST_TABLE` none is logged: the same rows lie in MLflow as `tables/answers.jsonl`.
    """
    import pandas

    name = "answers_and_verdicts.json"
    if (folder / "answers.jsonl").stat().st_size > LARGEST_TABLE:
        return
    if any(artifact.path == name for artifact in client.list_artifacts(run_id)):
        return  # `log_table` appends: logged again, the rows would be there twice
    answers = pandas.DataFrame(jsonl.read(folder / "answers.jsonl"))
    if answers.empty:
        return
    key = ["candidate", "split", "suite", "prompt", "sample"]
    scores = pandas.DataFrame(jsonl.read(folder / "scores.jsonl"), columns=[*key, *JUDGED])
    for rows in (answers, scores):
        # a prompt of several turns is a list, which pandas cannot compare and MLflow cannot show
        rows["prompt"] = [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in rows["prompt"]]
    client.log_table(run_id, answers.merge(scores, how="left", on=key), name)
