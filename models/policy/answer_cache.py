"""Every answer that was generated, in one sqlite table, so that none is generated twice.

An answer is named by the digest of the policy, by the decoding settings, and by the prompt with the number of the
sample. A batch is committed whole: a run that is killed between two batches goes on with the next one. Nothing here
cannot be made again: a row that changed on the disk is not known, and a file that cannot be read is begun anew.
"""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from models.files import sqlite
from models.policy.generate import Answer, Ask

R = TypeVar("R")

TABLE = """CREATE TABLE IF NOT EXISTS answers (
    policy TEXT, decoding TEXT, prompt TEXT, sample INTEGER, text TEXT, ids TEXT, tie INTEGER,
    PRIMARY KEY (policy, decoding, prompt, sample)
) WITHOUT ROWID"""


class AnswerTable:
    """The answers of one policy under one decoding setting."""

    def __init__(self, path: Path, policy: str, decoding: str) -> None:
        self.path, self.named = path, (policy, decoding)

    def known(self, asked: Sequence[Ask]) -> dict[int, Answer]:
        """Return index → answer, for those that were generated before."""
        return self._whole(lambda table: self._known(table, asked))

    def add(self, answers: Iterable[tuple[Ask, Answer]]) -> None:
        """Remember answers; all of them, or after a kill none."""
        rows = [
            (*self.named, _digest(ask.prompt), ask.sample, told.text, json.dumps(told.ids), told.tie)
            for ask, told in answers
        ]
        sealed = [(*row, sqlite.seal(row)) for row in rows]

        def insert(table: sqlite3.Connection) -> None:
            with table:
                table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", sealed)

        self._whole(insert)

    def _known(self, table: sqlite3.Connection, asked: Sequence[Ask]) -> dict[int, Answer]:
        found: dict[int, Answer] = {}
        for i, ask in enumerate(asked):
            key = (*self.named, _digest(ask.prompt), ask.sample)
            row = table.execute(
                "SELECT text, ids, tie, seal FROM answers WHERE policy=? AND decoding=? AND prompt=? AND sample=?", key
            ).fetchone()
            if row is not None and sqlite.sealed((*key, *row)):
                found[i] = Answer(row[0], json.loads(row[1]), row[2])
        return found

    def _whole(self, use: Callable[[sqlite3.Connection], R]) -> R:
        """Use the table; where the file cannot be read, begin it anew."""
        for last in (False, True):
            try:
                with closing(sqlite.connect(self.path, TABLE, "answers")) as table:
                    return use(table)
            except sqlite3.DatabaseError:
                if last or not sqlite.begin_anew(self.path):
                    raise
        raise AssertionError


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
