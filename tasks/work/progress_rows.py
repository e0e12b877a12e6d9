"""The rows of `progress.jsonl`, in which a running stage says how far it is."""

import json
from itertools import pairwise
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from models.files import jsonl

NAME = "progress.jsonl"
TAIL_BYTES = 4096
"""Read from the end of the file for its newest row; a row has a few hundred bytes."""
LONGEST_GAP = 60
"""Seconds: a longer gap between two rows is taken for time in which no process worked."""


class ProgressRow(TypedDict):
    """How far a stage is, in a unit of its own: updates of a training, answers of a policy."""

    done: int
    of: int
    loss: NotRequired[float]
    """Of trainings only, as other figures that are read elsewhere."""
    time: NotRequired[float]
    """When the row was written, in seconds since 1970; trainings write it."""


def last_row(folder: Path) -> ProgressRow | None:
    """Return the newest whole row of a running stage; None where there is none yet."""
    path = folder / NAME
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            # the first line may be cut by the seek, and the last one may not be written to its end
            lines = [line for line in file.read().splitlines() if line.endswith(b"}") and line.startswith(b"{")]
        return cast(ProgressRow, json.loads(lines[-1])) if lines else None
    except (OSError, json.JSONDecodeError):
        return None


def most_done(folder: Path) -> int:
    """Return how far a stage had come when it was killed, in its own unit; 0 where it had not begun."""
    return max((int(row["done"]) for row in jsonl.whole_rows(folder / NAME) if "done" in row), default=0)


def seconds_spent(folder: Path) -> float:
    """Return the seconds that killed attempts worked on a stage, as far as its rows tell."""
    times = [row["time"] for row in jsonl.whole_rows(folder / NAME) if "time" in row]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    # A gap is negative where the clock was set back. A long one lies between two attempts, and may be days.
    return float(sum(min(max(gap, 0), LONGEST_GAP) for gap in gaps))
