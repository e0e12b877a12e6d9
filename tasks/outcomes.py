"""How a run ended: `outcome.json` beside its report, from which the same command finds nothing left to do."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from typing_extensions import TypedDict

from models import markdown
from models.artifacts import Noun, Scores, file_digest
from models.files import sealed
from models.recipe import Assessment, Recipe
from tasks.run import AnyRun, digest, folder
from tasks.work import store, terminal
from tasks.work.runs_folder import root

SHOWN = ("report.*", "tables/*.jsonl")
"""What the command line, the pages and `diff` show of a run."""


class Outcome(TypedDict):
    """What `outcome.json` holds."""

    report: str
    """Folder of the report."""
    exit_code: int
    state: str
    """Name of the end, as in Prefect and MLflow: `Promoted`, `NotPromoted`, …"""
    decision: str
    """What was decided, in sentences."""
    stages: list[str]
    """Folders of all results that the report rests on."""
    finished: str
    """UTC, ISO 8601."""
    files: dict[str, str]
    """Name → sha256, of `SHOWN`."""


def finished(recipe: Recipe | Assessment) -> Outcome | None:
    """Return the outcome of this recipe on these data if nothing is left to do; needs no Prefect and no torch."""
    place = _place(recipe)
    outcome = sealed.read(place, Outcome)
    if outcome and _is_whole(outcome) and all(store.verified(Path(path)) for path in outcome["stages"]):
        return outcome
    if place.exists():
        terminal.say(f"{place.parent}: damaged in part; what is missing is made again", "dim")
    return None


def forget_failed(recipe: Recipe | Assessment) -> int:
    """Forget the verdicts of a finished run that hold failed ones, so that they are asked for again; return how many.

    What judges did say is remembered by content: only the failed verdicts cost anything.
    """
    place = _place(recipe)
    outcome = sealed.read(place, Outcome)
    paths = [Path(path) for path in outcome["stages"]] if outcome else []
    scores = {path: store.load(path, Scores) for path in paths if path.name.startswith("judge-")}
    failed = {path: noun.failed for path, noun in scores.items() if noun and noun.failed}
    if failed:
        place.unlink()  # first: a kill in between leaves a run that is not finished, and never a report without results
    for path in failed:
        shutil.rmtree(path)
    return sum(failed.values())


def close(run: AnyRun, stages: Sequence[Noun], exit_code: int, state: str, decision: str) -> Outcome:
    """Send the report to MLflow, and write `outcome.json`: from here on there is nothing left to do."""
    complete = run.tracker.finish(run.folder, {"sacpo.outcome": state, "mlflow.note.content": markdown.plain(decision)})
    report_files = sorted(path for pattern in SHOWN for path in run.folder.glob(pattern) if path.is_file())
    outcome: Outcome = {
        "report": str(run.folder),
        "exit_code": exit_code,
        "state": state,
        "decision": decision,
        "stages": sorted({str(noun.path) for noun in stages}),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": {str(path.relative_to(run.folder)): file_digest(path) for path in report_files},
    }
    # Without the file the run counts as unfinished, so that the same command sends what MLflow has not taken.
    if complete:
        sealed.write(run.folder / "outcome.json", outcome)
    return outcome


def _place(recipe: Recipe | Assessment) -> Path:
    return folder(root(), recipe, digest(recipe)) / "outcome.json"


def _is_whole(outcome: Outcome) -> bool:
    """Return whether the report is the one that the run wrote."""
    with suppress(OSError):
        return all(file_digest(Path(outcome["report"]) / name) == sha256 for name, sha256 in outcome["files"].items())
    return False
