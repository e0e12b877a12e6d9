"""What a test sees of a run from outside: its processes, its updates, its records, its weights."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.files import jsonl
from tasks.tracking import connection
from tasks.work import processes


def until(true: Callable[[], Any], seconds: float = 600) -> Any:
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)
    return result


def gone(pid: int) -> bool:
    return processes.identity_of(pid) == ""


def updates(runs: Path, stage: str) -> int:
    """Return the newest update that a stage that trains has written down, or 0."""
    files = runs.glob(f"store/{stage}-*.partial/progress.jsonl")
    return max((row["done"] for path in files for row in jsonl.whole_rows(path)), default=0)


def checkpoints(runs: Path, stage: str) -> int:
    """Return the update of the newest whole checkpoint of a stage that trains, or 0."""
    whole = runs.glob(f"store/{stage}-*.partial/checkpoint-*/complete.json")
    return max((int(path.parent.name.partition("-")[2]) for path in whole), default=0)


def workers(runs: Path) -> list[int]:
    """Return the process of each worker that ever worked for a runs folder."""
    return [int(log.stem.split("-")[1]) for log in (runs / "logs").glob("worker-*.log")]


def statuses(runs: Path) -> dict[str, str]:
    """Return MLflow run → status; the digest at the end of the run's name is left out."""
    client = connection.client(runs)
    experiment = client.get_experiment_by_name("quickstart")
    runs_ = client.search_runs([experiment.experiment_id])
    return {re.sub(r" · [0-9a-f]{8}$", "", run.info.run_name): run.info.status for run in runs_}


def weights(runs: Path) -> dict[str, str]:
    (path,) = runs.glob("quickstart/*/report.json")
    return {candidate["name"]: candidate["digest"] for candidate in json.loads(path.read_text())["candidates"]}
