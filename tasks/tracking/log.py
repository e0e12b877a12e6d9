"""What a run leaves in MLflow, call by call: params, metrics, datasets, candidates, tables. Each may be sent twice."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock

from models.artifacts import Preferences
from models.errors import BadInput
from models.files import jsonl
from models.files.kept import Kept
from models.gate.promotion_log import Registered
from models.recipe.record import flat

CURVE = ("loss", "grad_norm", "learning_rate", "chosen", "rejected", "margin", "accuracy", "clipped")
JUDGED = ("metric", "status", "score", "good", "label", "why")
LARGEST_TABLE = 64 * 2**20
"""Bytes of answers of which MLflow gets a table: its pages load all of a table at once, and so do we."""


def database(path: Path) -> None:
    """Create MLflow's sqlite file under another name and rename it: a kill between two of its migrations breaks it."""
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with FileLock(path.with_name(path.name + ".lock")):
        if path.exists():
            return
        new = path.with_name(path.name + ".new")
        new.unlink(missing_ok=True)
        SqlAlchemyStore(f"sqlite:///{new}", (path.parent / Kept.artifacts).as_uri()).engine.dispose()
        new.rename(path)


def where(wanted: dict[str, str]) -> str:
    """Return a filter of MLflow: attributes, and tags (their names have a dot), with their values.

    Raises:
        BadInput: a value holds both kinds of quotes: the filters know no escape.
    """
    named = {f"tags.`{key}`" if "." in key else key: value for key, value in wanted.items()}
    both = next((value for value in named.values() if "'" in value and '"' in value), "")
    if both:
        raise BadInput(f"{both}: holds both ' and \", which MLflow cannot search for; take another name")
    return " and ".join(f'{key} = "{value}"' if "'" in value else f"{key} = '{value}'" for key, value in named.items())


def candidate(mlflow: Any, run: Any, told: dict[str, Any]) -> None:
    """Make a candidate known as a model whose weights stay where they are, with its figures."""
    from mlflow.entities import LoggedModelStatus, Metric

    params = ("kind", "metric", "method", "beta", "lambda", "beta_over_lambda", "merge_weight")
    model = mlflow.create_logged_model(
        run.info.experiment_id,
        name=re.sub(r"[^A-Za-z0-9_-]+", "-", told["name"].replace("λ", "lambda")),
        source_run_id=run.info.run_id,
        tags={"sacpo.policy": told["digest"], "sacpo.path": told["path"], "sacpo.name": told["name"]},
        params={key: str(told[key]) for key in params},
        model_type="policy",
    )
    from models.metrics.reported import unmarked  # scipy takes a second, and most commands record nothing

    tags = {"mlflow.parentRunId": run.info.run_id, "sacpo.candidate": told["digest"]}
    own = mlflow.create_run(run.info.experiment_id, run_name=f"candidate · {told['name']}", tags=tags).info.run_id
    figures = {name: value for name, value in unmarked(told["metrics"]).items() if value is not None}
    where = {"model_id": model.model_id, "run_id": own}
    metrics = [Metric(_name(name), value, run.info.start_time, 0, **where) for name, value in figures.items()]
    mlflow.log_batch(own, metrics=metrics)
    mlflow.set_terminated(own)
    mlflow.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def headline(tree: dict[str, Any]) -> dict[str, float]:
    """Return the figures by which whole runs are compared: of the chosen candidate, and of every test of the bound."""
    from models.metrics.reported import unmarked

    chosen = (tree["chosen"] or {"candidate": ""})["candidate"]
    told: dict[str, float | None] = {}
    for candidate in tree["candidates"]:
        if candidate["name"] == chosen:
            told |= {f"chosen/{name}": value for name, value in unmarked(candidate["metrics"]).items()}
            told |= {f"chosen/{name}": candidate[name] for name in ("lambda", "beta_over_lambda", "merge_weight")}
    for test in tree["constraints"][0]["tested"][:1] if chosen and tree["constraints"] else ():
        told |= {"test/safety_rate": test["value"], "test/lower_bound": test["lower_bound"]}
        told |= {f"test/{check['name']}": check["value"] for check in test["checks"] if check["name"] != "safety rate"}
    return {_name(name): float(value) for name, value in told.items() if value is not None}


def _name(metric: str) -> str:
    """Return a metric's name in the letters that MLflow allows; categories may hold others."""
    return re.sub(r"[^\w .:/-]", "-", metric, flags=re.ASCII)


def numbers(mlflow: Any, run_id: str, values: dict[str, float]) -> None:
    """Log single figures."""
    from mlflow.entities import Metric

    started = mlflow.get_run(run_id).info.start_time  # a fixed time: sent twice, it is stored once
    mlflow.log_batch(run_id, metrics=[Metric(name, float(value), started, 0) for name, value in values.items()])


def params(mlflow: Any, run_id: str, tree: dict[str, Any], known: Collection[str] = ()) -> None:
    """Log a tree of settings, flat, without those that are empty or known there already."""
    from mlflow.entities import Param

    told = {key: value for key, value in flat(tree).items() if value != "" and key not in known}
    params = [Param(key, str(value)[:6000]) for key, value in told.items()]
    for start in range(0, len(params), 100):  # MLflow's limit
        mlflow.log_batch(run_id, params=params[start : start + 100])


def dataset(mlflow: Any, run_id: str, title: str, pairs: Preferences) -> None:
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
    mlflow.log_inputs(run_id, [DatasetInput(dataset, tags)])


def curve(mlflow: Any, run_id: str, path: Path) -> None:
    """Send what a run does not hold yet of a training curve; a resumed training repeats some updates."""
    from mlflow.entities import Metric

    rows = [row for row in jsonl.whole(path) if "time" in row]
    held = {point.step for point in mlflow.get_metric_history(run_id, "loss")} if rows else set()  # most have no curve
    rows = [row for row in rows if row["done"] not in held]
    metrics = [Metric(k, row[k], int(row["time"] * 1000), row["done"]) for row in rows for k in CURVE if k in row]
    for start in range(0, len(metrics), 1000):
        mlflow.log_batch(run_id, metrics=metrics[start : start + 1000])


def table(mlflow: Any, run_id: str, folder: Path) -> None:
    """Log answers with their verdicts as one MLflow table, which its pages show row by row; once per run.

    Of more than `LARGEST_TABLE` none is logged: the same rows lie in MLflow as `tables/answers.jsonl`.
    """
    import pandas

    name = "answers_and_verdicts.json"
    if (folder / "answers.jsonl").stat().st_size > LARGEST_TABLE:
        return
    if any(held.path == name for held in mlflow.list_artifacts(run_id)):
        return  # logged again, the rows would be there twice
    answers = pandas.DataFrame(jsonl.read(folder / "answers.jsonl"))
    if answers.empty:
        return
    key = ["candidate", "split", "suite", "prompt", "sample"]
    scores = pandas.DataFrame(jsonl.read(folder / "scores.jsonl"), columns=[*key, *JUDGED])
    for rows in (answers, scores):
        rows["prompt"] = [p if isinstance(p, str) else json.dumps(p, ensure_ascii=False) for p in rows["prompt"]]
    mlflow.log_table(run_id, answers.merge(scores, how="left", on=key), name)


def pages(mlflow: Any, server: str, run: str, registered: Registered) -> list[tuple[str, str]]:
    """Return (address, text) of the pages of a run and of a version on a server."""
    experiment = mlflow.get_run(run).info.experiment_id
    place, name, version = f"{server.rstrip('/')}/#", registered.name, registered.version
    return [
        (f"{place}/experiments/{experiment}/runs/{run}", "Run in MLflow"),
        (f"{place}/models/{quote(name, safe='')}/versions/{version}", f"{name} version {version} in MLflow"),
    ]
