"""Is a sqlite file whole? Asked of sqlite itself, before anybody relies on what the file holds.

Sqlite keeps no checksums, so rows of ours carry a seal: a digest of their columns.
"""

import sqlite3
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from filelock import FileLock

from models.artifacts import content_digest
from models.files import sealed as small

SECONDS = 5.0
"""For one file; in a very large one, what was looked at until then is enough."""
STEPS = 10_000
"""Instructions of sqlite's machine between two looks at the clock."""
WAIT = 5.0
"""Seconds for one who holds the file."""
BUSY = ("locked", "interrupted", "busy")


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
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", WAIT, uri=True)) as table:
            table.execute("SELECT count(*) FROM sqlite_master").fetchone()
            table.set_progress_handler(lambda: time.monotonic() > end, STEPS)
            told = [str(row[0]) for row in table.execute("PRAGMA quick_check(1)")]
    except sqlite3.Error as error:
        return "" if any(word in str(error) for word in BUSY) else str(error)
    return "" if told == ["ok"] else told[0].splitlines()[-1]


def begin_anew(path: Path) -> bool:
    """Set a file that sqlite cannot read aside; return whether it was so. Of several processes one does it."""
    with FileLock(path.with_name(path.name + ".lock")):
        if not fault(path):
            return False
        small.aside(path)
        for rest in ("-wal", "-shm", "-journal"):  # of the damaged file
            path.with_name(path.name + rest).unlink(missing_ok=True)
        return True


def connect(path: Path, tables: str, sealed: str) -> sqlite3.Connection:
    """Open a file with its tables; several processes may write, each waits for the others.

    Args:
        tables: statements that make them where they are not there.
        sealed: name of the table whose rows carry a seal; an older file's gets the column, empty.
    """
    table = sqlite3.connect(path, timeout=120)
    table.executescript(tables)
    if "seal" not in [row[1] for row in table.execute(f"PRAGMA table_info({sealed})")]:
        try:
            table.execute(f"ALTER TABLE {sealed} ADD COLUMN seal TEXT")
        except sqlite3.OperationalError as error:
            if "duplicate column" not in str(error):  # else another process has just added it
                raise
    return table


def seal(row: Sequence[object]) -> str:
    """Return the seal of a row."""
    return content_digest(list(row))


def sealed(row: Sequence[object]) -> bool:
    """Return whether a row, its seal last, is as it was written; one of an older version has none."""
    return row[-1] is None or row[-1] == seal(row[:-1])
