"""What on disk may go: results that nobody needs any more."""

import shutil
import time
from pathlib import Path

from filelock import FileLock, Timeout
from typing_extensions import TypedDict

from models.errors import BadPlace
from models.files import sealed
from models.files.kept import RunsFolderEntry
from models.gate.promotion_log import line_of_champions
from tasks.outcomes import Outcome
from tasks.registry import champion

DAY = 24 * 3600.0


class Registry(TypedDict):
    """The key of `report.json` that says which model version the report is about."""

    registry: dict[str, str] | None


def sweep(root: Path, days: float, delete: bool) -> tuple[int, list[tuple[Path, int]]]:
    """Find, and with `delete` remove, the stored results and fetched copies that are not needed.

    The results behind champion, previous champion and challenger of every model stay, and so does everything that was
    used in the last `days`, since unfinished runs go on from it. A removed result is made again when a run asks for it.

    Returns:
        How many folders stay, and the others with their size in bytes, largest first.

    Raises:
        BadPlace: a run is going on.
    """
    for lock in root.glob("*-*.lock"):  # locks of runs; the servers may hold theirs, since nothing of them is removed
        _refuse_if_held(lock)
    needed = _needed(root)
    old = time.time() - days * DAY
    for place in [*root.glob("store/*.gone"), *root.glob("registered/*.gone")] if delete else ():
        shutil.rmtree(place)  # a killed `sacpo clean` left it behind
    folders = (root / RunsFolderEntry.store, root / RunsFolderEntry.registered)
    places = [p for folder in folders for p in folder.glob("*") if p.is_dir()]
    free = [p for p in places if p.resolve() not in needed and p.stat().st_mtime < old]
    sized = sorted(((p, _size(p)) for p in free), key=lambda pair: -pair[1])
    for place, _ in sized if delete else ():
        if place.stat().st_mtime >= old:  # a run that has begun since we looked uses it
            continue
        gone = place.with_name(place.name + ".gone")
        place.rename(gone)  # a run that starts now finds it whole or not at all
        shutil.rmtree(gone)
    return len(places) - len(free), sized


def _needed(root: Path) -> set[Path]:
    """Return the results behind the versions that serve, served before, or wait for a decision."""
    serving: dict[str, list[str]] = {}  # model → versions
    needed: set[Path] = set()
    for outcome in root.glob("*/*/outcome.json"):
        ended, report = sealed.read(outcome, Outcome), sealed.read(outcome.parent / "report.json", Registry)
        if ended is None or report is None or report["registry"] is None:
            continue
        model, version = report["registry"]["name"], report["registry"]["version"]
        if model not in serving:
            line = line_of_champions(champion.log(root, model))
            serving[model] = [*line[-2:], champion.challenger(root, model)]
        if version in serving[model]:  # `stages` is the whole chain: base, steps, merge, answers and verdicts
            needed |= {Path(stage).resolve() for stage in ended["stages"]}
    return needed


def _refuse_if_held(place: Path) -> None:
    lock = FileLock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BadPlace(f"{place.stem} is running; clean when it has ended") from error
    lock.release()


def _size(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
