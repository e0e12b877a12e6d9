"""The checkpoints from which a killed training goes on: which of them is whole, and their removal at the end."""

import os
import shutil
from pathlib import Path

from models.files import sealed

COMPLETE = "complete.json"


def complete(folder: Path) -> None:
    """Mark a checkpoint as complete once all of it is on the disk; a kill before leaves one without the mark."""
    # The content of each file first, then the mark: after a power cut a mark must not stand beside half a file
    sizes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[path.name] = path.stat().st_size
    sealed.write(folder / COMPLETE, sizes)


def newest(out: Path) -> str | None:
    """Return the newest complete checkpoint in `out`, and remove those that a kill left incomplete."""
    best: tuple[int, str] | None = None
    for folder in out.glob("checkpoint-*"):
        mark = folder / COMPLETE
        sizes = sealed.read(mark, dict[str, int]) or {"": -1}  # no file has this size: the folder counts as broken
        if any(not (folder / name).exists() or (folder / name).stat().st_size != size for name, size in sizes.items()):
            shutil.rmtree(folder)
            continue
        best = max(best or (0, ""), (int(folder.name.split("-")[1]), str(folder)))  # by number: 1000 is after 999
    return best[1] if best else None


def clear(out: Path) -> None:
    """Remove all checkpoints, once the weights they lead to are saved."""
    for folder in out.glob("checkpoint-*"):
        shutil.rmtree(folder)
