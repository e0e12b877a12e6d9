"""Every answer that was generated, in one sqlite table, so that none is generated twice.

An answer is named by the digest of the policy, by the decoding settings, and by the prompt with the number of the
sample. A batch is committed whole: a run that is killed between two batches goes on with the next one.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path

from models.generate import Answer, Ask

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
        found: dict[int, Answer] = {}
        with closing(self._open()) as table:
            for i, ask in enumerate(asked):
                row = table.execute(
                    "SELECT text, ids, tie FROM answers WHERE policy=? AND decoding=? AND prompt=? AND sample=?",
                    (*self.named, _digest(ask.prompt), ask.sample),
                ).fetchone()
                if row is not None:
                    found[i] = Answer(row[0], json.loads(row[1]), row[2])
        return found

    def add(self, answers: Iterable[tuple[Ask, Answer]]) -> None:
        """Remember answers; all of them, or after a kill none."""
        rows = [
            (*self.named, _digest(ask.prompt), ask.sample, told.text, json.dumps(told.ids), told.tie)
            for ask, told in answers
        ]
        with closing(self._open()) as table, table:
            table.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        """Several processes may write; each waits for the other."""
        table = sqlite3.connect(self.path, timeout=120)
        table.execute(TABLE)
        return table


def _digest(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()
