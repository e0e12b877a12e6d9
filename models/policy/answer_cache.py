"""Every answer that was generated, in one sqlite table, so that none is generated twice.

An answer is named by the digest of the policy, by the decoding settings, and by the prompt with the number of the
sample. A batch is committed whole: a run that is killed between two batches goes on with the next one. All of this can
be generated again: a row that changed on the disk counts as missing, and a file that cannot be read is begun anew.
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

# `sqlite.connect` adds the column `seal`: tables of the first version have none
TABLE = """CREATE TABLE IF NOT EXISTS answers (
    policy TEXT, decoding TEXT, prompt TEXT, sample INTEGER, text TEXT, ids TEXT, tie INTEGER,
    PRIMARY KEY (policy, decoding, prompt, sample)
) WITHOUT ROWID"""


class AnswerTable:
    """The answers of one policy under one decoding setting."""

    def __init__(self, path: Path, policy: str, decoding: str) -> None:
        self.path, self.key = path, (policy, decoding)

    def stored(self, asks: Sequence[Ask]) -> dict[int, Answer]:
        """Return index → answer, for those that were generated before."""
        return self._in_table(lambda connection: self._select(connection, asks))

    def add(self, answers: Iterable[tuple[Ask, Answer]]) -> None:
        """Store answers; all of them, or after a kill none."""
        rows = [
            (*self.key, _digest(ask.prompt), ask.sample, answer.text, json.dumps(answer.ids), answer.tie)
            for ask, answer in answers
        ]
        sealed = [(*row, sqlite.seal(row)) for row in rows]

        def insert(connection: sqlite3.Connection) -> None:
            with connection:  # one transaction
                connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", sealed)

        self._in_table(insert)

    def _select(self, connection: sqlite3.Connection, asks: Sequence[Ask]) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        for i, ask in enumerate(asks):
            key = (*self.key, _digest(ask.prompt), ask.sample)
            row = connection.execute(
                "SELECT text, ids, tie, seal FROM answers WHERE policy=? AND decoding=? AND prompt=? AND sample=?", key
            ).fetchone()
            if row is not None and sqlite.sealed((*key, *row)):
                answers[i] = Answer(row[0], json.loads(row[1]), row[2])
        return answers

    def _in_table(self, use: Callable[[sqlite3.Connection], R]) -> R:
        """Use the table; where the file cannot be read, begin it anew and use the empty one."""
        for is_second_try in (False, True):
            try:
                with closing(sqlite.connect(self.path, TABLE, "answers")) as connection:
                    return use(connection)
            except sqlite3.DatabaseError:
                # A sound file that is merely locked, or on a full disk, is not begun anew
                if is_second_try or not sqlite.begin_anew(self.path):
                    raise
        raise AssertionError


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
