"""The runs folder: where it is, that it can be written, and that no other user can read it."""

import os
import shutil
import stat
from pathlib import Path

from models.errors import BadPlace
from models.files.kept import RunsFolderEntry

LEAST_FREE = 64 * 2**20
"""Bytes; on a disk with less, Prefect's own server fails with a message that does not help."""
CONTENT = (RunsFolderEntry.mlflow, RunsFolderEntry.prefect, RunsFolderEntry.store, RunsFolderEntry.operations)
"""A folder that holds one of these is a runs folder; another one may be a folder of the user's with the same name."""


def root() -> Path:
    """Return the runs folder: `SACPO_RUNS`, else `runs` in the working directory."""
    return Path(os.environ.get("SACPO_RUNS", "runs")).resolve()


def writable() -> Path:
    """Return the runs folder; make it if need be, and close it to other users.

    Raises:
        BadPlace: it cannot be written, or its disk is full.
    """
    runs = root()
    try:
        runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        # the permissions of a folder with other things in it are the user's own affair
        if not any(runs.iterdir()) or any((runs / name).exists() for name in CONTENT):
            _close(runs)
        # writing is the only sure test: on a read-only disk the permissions may still allow it
        probe = runs / RunsFolderEntry.writable
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
    """Let no other user into a runs folder, which an older version or the user's own mkdir may have left open."""
    status = runs.stat()
    if status.st_uid == os.getuid() and status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        runs.chmod(0o700)
