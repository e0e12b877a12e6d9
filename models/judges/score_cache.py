"""The questions and verdicts of a judge, in one sqlite table by content: nothing is asked, or paid for, twice.

Only verdicts are remembered. A call that failed counts in what the judge has cost, and is made again next time. Each
row has a seal: a verdict that changed on the disk is treated as missing.
"""

import json
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from models.artifacts import content_digest
from models.files import sqlite

TABLES = """
CREATE TABLE IF NOT EXISTS verdicts
    (judge TEXT, content TEXT, verdict TEXT, PRIMARY KEY (judge, content)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spent (judge TEXT PRIMARY KEY, calls INTEGER, tokens INTEGER) WITHOUT ROWID;
"""
Verdict = float | list[float]
"""The score of a classifier, or the grades of a chat model's reply."""


class ScoreCache:
    """The verdicts of one judge of one version.

    A content is any JSON value that holds all that the judge was shown.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self.path, self.judge = path, judge

    def stored(self, contents: Iterable[object]) -> dict[str, Verdict]:
        """Return digest of the content → verdict, for the contents that this judge has seen."""
        verdicts = {}
        with closing(self._open()) as table:
            for content in contents:
                key = content_digest(content)
                row = table.execute(
                    "SELECT verdict, seal FROM verdicts WHERE judge=? AND content=?", (self.judge, key)
                ).fetchone()
                if row is not None and sqlite.sealed((self.judge, key, *row)):
                    verdicts[key] = json.loads(row[0])
        return verdicts

    def add(self, verdicts: Iterable[tuple[object, Verdict]], calls: int = 0, tokens: int = 0) -> None:
        """Remember (content, verdict) pairs and what they cost, in one transaction: after a kill, all or nothing."""
        rows = [(self.judge, content_digest(content), json.dumps(verdict)) for content, verdict in verdicts]
        sealed = [(*row, sqlite.seal(row)) for row in rows]
        with closing(self._open()) as table, table:  # sqlite's own `with` commits, but does not close
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
