"""The databases of a runs folder, checked before a server starts on them and before anything is trained.

A damaged one whose content cannot be made again is an error that names the remedy. One that can be made again is set
aside.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from models.errors import BadPlace
from models.files import sqlite
from models.files.kept import RunsFolderEntry

LOST = {
    RunsFolderEntry.operations: "the promotion log, and what earlier decisions have spent of the test prompts",
    RunsFolderEntry.verdicts: "what judges said and cost: they are asked, and paid, once more",
    RunsFolderEntry.mlflow: "MLflow's runs, figures and registered versions",
    f"{RunsFolderEntry.prefect}/prefect.db": "the history of flow runs, and schedules that were set by hand",
}
"""Database → what is lost without it."""
MADE_AGAIN = RunsFolderEntry.answers
"""The database whose rows are generated again if need be."""
NEVER_EMPTY = (RunsFolderEntry.mlflow,)
"""Databases that are made under another name and renamed when complete. An empty file of this name is damage; for the
others it is a database that is about to be made."""


def check(root: Path, environment: Mapping[str, str]) -> list[str]:
    """Check the databases that this process, or a server that it starts, will use.

    Args:
        environment: says which databases these are: not those of servers that an address names.

    Returns:
        A sentence for each database that was set aside.

    Raises:
        BadPlace: one that cannot be made again is damaged.
    """
    for name in _own_databases(root, environment):
        fault = sqlite.fault(root / name)
        # sqlite reads an empty file as a database without tables, which is no fault
        if name in NEVER_EMPTY and (root / name).is_file() and not (root / name).stat().st_size:
            fault = "it is empty"
        if fault:
            raise BadPlace(
                f"{root / name}: cannot be read ({fault}); restore it from a backup (docs/operations.md), or move it "
                f"away, which loses {LOST[name]}"
            )
    if sqlite.fault(root / MADE_AGAIN) and sqlite.begin_anew(root / MADE_AGAIN):
        return [f"{root / MADE_AGAIN}: could not be read and was set aside; answers are generated again"]
    return []


def _own_databases(root: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of the databases in the runs folder that no server elsewhere takes the place of."""
    yield RunsFolderEntry.verdicts
    if environment.get("SACPO_DATABASE", "") in ("", f"sqlite:///{root / RunsFolderEntry.operations}"):
        yield RunsFolderEntry.operations
    if not environment.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        yield RunsFolderEntry.mlflow
    if not environment.get("PREFECT_API_URL"):
        yield f"{RunsFolderEntry.prefect}/prefect.db"
