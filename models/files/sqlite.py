"""Whether a sqlite file is whole, as sqlite itself tells, before a run relies on what the file holds.

Sqlite keeps no checksums, so rows of ours carry a seal: a digest of their columns.
"""

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from filelock import FileLock

from models.artifacts import content_digest
from models.files.sealed import set_aside

SECONDS = 5.0
"""Time for checking one file. Of a very large file only a part is checked in it, and that is accepted."""
STEPS = 10_000
"""Instructions of sqlite's machine between two looks at the clock."""
WAIT = 5.0
"""Seconds to wait for another process that has locked the file."""
BUSY = ("locked", "interrupted", "busy")
"""Words in sqlite's errors that say nothing against the file: it is in use, or our clock ended the check."""


def fault(path: Path, seconds: float = SECONDS) -> str:
    """Return what is wrong with a sqlite file; empty if it is whole, does not exist, or is in use.

    `PRAGMA quick_check` reads the structure of every table; a changed letter inside a row stays unseen.
    """
    if not path.exists():
        return ""
    if path.is_dir():
        return "it is a folder"
    end = time.monotonic() + seconds
    try:
        # mode=rw: by default sqlite makes a file that is not there; a read-only connection cannot replay a journal
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", WAIT, uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.set_progress_handler(lambda: time.monotonic() > end, STEPS)
            faults = [str(row[0]) for row in connection.execute("PRAGMA quick_check(1)")]
    except sqlite3.Error as error:
        return "" if any(word in str(error) for word in BUSY) else str(error)
    return "" if faults == ["ok"] else faults[0].splitlines()[-1]


def begin_anew(path: Path) -> bool:
    """Set a file aside if sqlite cannot read it; return whether this was so. Of several processes one does it."""
    with FileLock(path.with_name(path.name + ".lock")):
        if not fault(path):  # another process that waited for the lock before us has done it
            return False
        set_aside(path)
        # What sqlite keeps beside the damaged file would be replayed into the new one
        for ending in ("-wal", "-shm", "-journal"):
            path.with_name(path.name + ending).unlink(missing_ok=True)
        return True


def connect(path: Path, tables: str, sealed: str) -> sqlite3.Connection:
    """Open a file with its tables; several processes may write, each waits for the others.

    Args:
        tables: statements that make them where they are not there.
        sealed: name of the table whose rows carry a seal. The column is added to a table of an older version, where
            it is empty.
    """
    connection = sqlite3.connect(path, timeout=120)
    connection.executescript(tables)
    if "seal" not in [row[1] for row in connection.execute(f"PRAGMA table_info({sealed})")]:
        try:
            connection.execute(f"ALTER TABLE {sealed} ADD COLUMN seal TEXT")
        except sqlite3.OperationalError as error:
            if "duplicate column" not in str(error):  # else another process has just added it
                raise
    return connection


def seal(row: Sequence[object]) -> str:
    """Return the seal of a row."""
    return content_digest(list(row))


def sealed(row: Sequence[object]) -> bool:
    """Return whether a row, its seal last, is as it was written; one of an older version has none."""
    return row[-1] is None or row[-1] == seal(row[:-1])
