"""The databases of a runs folder, looked at before a server starts on them and before anything is trained.

One that holds what cannot be made again is named, with the remedy; what can be made again is set aside.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

from models.errors import BadPlace
from models.files import sqlite
from models.files.kept import Kept

LOST = {
    Kept.operations: "the promotion log, and what earlier decisions have spent of the test prompts",
    Kept.verdicts: "what judges said and cost: they are asked, and paid, once more",
    Kept.mlflow: "MLflow's runs, figures and registered versions",
    f"{Kept.prefect}/prefect.db": "the history of flow runs, and schedules that were set by hand",
}
"""Database → what is gone without it."""
MADE_AGAIN = Kept.answers
NEVER_EMPTY = (Kept.mlflow,)
"""Made under another name and renamed: an empty one is no beginning."""


def look(root: Path, environment: Mapping[str, str]) -> list[str]:
    """Look at the databases that this process, or a server that it starts, will use; return what was set aside.

    Raises:
        BadPlace: one that cannot be made again is damaged.
    """
    for name in _ours(root, environment):
        why = sqlite.fault(root / name)
        if name in NEVER_EMPTY and (root / name).is_file() and not (root / name).stat().st_size:
            why = "it is empty"
        if why:
            raise BadPlace(
                f"{root / name}: cannot be read ({why}); restore it from a backup (docs/operations.md), or move it "
                f"away, which loses {LOST[name]}"
            )
    if sqlite.fault(root / MADE_AGAIN) and sqlite.begin_anew(root / MADE_AGAIN):
        return [f"{root / MADE_AGAIN}: could not be read and was set aside; answers are generated again"]
    return []


def _ours(root: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the databases that no server, which an address names, has to care for."""
    yield Kept.verdicts
    if environment.get("SACPO_DATABASE", "") in ("", f"sqlite:///{root / Kept.operations}"):
        yield Kept.operations
    if not environment.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        yield Kept.mlflow
    if not environment.get("PREFECT_API_URL"):
        yield f"{Kept.prefect}/prefect.db"
