"""What a judge was asked and answered, in one sqlite table by content: nothing is asked, or paid for, twice.

Only verdicts are kept as such; a call that failed is counted in what the judge has cost, and asked again next time.
A verdict that changed on the disk is not known.
"""

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from models.artifacts import content_digest
from models.files import sqlite

TABLES = """
CREATE TABLE IF NOT EXISTS verdicts
    (judge TEXT, content TEXT, verdict TEXT, PRIMARY KEY (judge, content)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, calls INTEGER, tokens INTEGER) WITHOUT ROWID;
"""


class ScoreCache:
    """The verdicts of one judge of one version."""

    def __init__(self, path: Path, judge: str) -> None:
        self.path, self.judge = path, judge

    def known(self, contents: Iterable[Any]) -> dict[str, Any]:
        """Return digest of the content → verdict, for the contents that this judge has seen."""
        found = {}
        with closing(self._open()) as table:
            for content in contents:
                key = content_digest(content)
                row = table.execute(
                    "SELECT verdict, seal FROM verdicts WHERE judge=? AND content=?", (self.judge, key)
                ).fetchone()
                if row is not None and sqlite.sealed((self.judge, key, *row)):
                    found[key] = json.loads(row[0])
        return found

    def add(self, verdicts: Iterable[tuple[Any, Any]], calls: int = 0, tokens: int = 0) -> None:
        """Remember (content, verdict) pairs, and what they cost; all of it, or after a kill nothing."""
        rows = [(self.judge, content_digest(content), json.dumps(verdict)) for content, verdict in verdicts]
        sealed = [(*row, sqlite.seal(row)) for row in rows]
        with closing(self._open()) as table, table:
            table.executemany("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?, ?)", sealed)
            table.execute(
                "INSERT INTO spent VALUES (?, ?, ?) ON CONFLICT (judge) DO UPDATE "
                "SET calls = calls + excluded.calls, tokens = tokens + excluded.tokens",
                (self.judge, calls, tokens),
            )

    def spent(self) -> tuple[int, int]:
        """Return the calls and tokens that this judge has cost in this runs folder."""
        with closing(self._open()) as table:
            row = table.execute("SELECT calls, tokens FROM spent WHERE judge=?", (self.judge,)).fetchone()
        return (row[0], row[1]) if row else (0, 0)

    def _open(self) -> sqlite3.Connection:
        return sqlite.connect(self.path, TABLES, "verdicts")
