"""The runs folder: where it is, that it can be written, and that nobody else reads it."""

import os
import shutil
import stat
from pathlib import Path

from models.errors import BadPlace
from models.files.kept import Kept

LEAST_FREE = 64 * 2**20
"""Bytes; on less, Prefect's own server fails without a word that would help."""
OURS = (Kept.mlflow, Kept.prefect, Kept.store, Kept.operations)
"""What tells a runs folder from a folder of the user's that happens to be named so; one that is empty is ours too."""


def root() -> Path:
    """Return the runs folder: `SACPO_RUNS`, else `runs` in the working directory."""
    return Path(os.environ.get("SACPO_RUNS", "runs")).resolve()


def writable() -> Path:
    """Return the runs folder, made if need be, for nobody else to read.

    Raises:
        BadPlace: it cannot be written, or its disk is full.
    """
    runs = root()
    try:
        runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(runs.iterdir()) or any((runs / name).exists() for name in OURS):
            _close(runs)
        probe = runs / Kept.writable
        probe.write_text("")
        probe.unlink()
        free = shutil.disk_usage(runs).free
    except OSError as error:
        raise BadPlace(f"{runs}: cannot be written ({error.strerror}); set SACPO_RUNS to a folder that can") from error
    if free < LEAST_FREE:
        raise BadPlace(
            f"{runs}: only {free / 2**20:.0f} MiB free; Prefect and MLflow alone need "
            f"{LEAST_FREE / 2**20:.0f}; free space, or set SACPO_RUNS to another disk"
        )
    return runs


def _close(runs: Path) -> None:
    """Take a runs folder that an older version, or the user's mkdir, left open to others away from them."""
    now = runs.stat()
    if now.st_uid == os.getuid() and now.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        runs.chmod(0o700)
