"""A damaged database is named or begun anew; damaged rows and weights are not believed."""

import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from models import artifacts
from models.alignment.merge import interpolate
from models.artifacts import Policy, file_digest
from models.errors import BadPlace, BadPolicy, Damaged
from models.files import sealed, sqlite
from models.judges.score_cache import ScoreCache
from models.policy.answer_cache import AnswerTable
from models.policy.generate import Answer, Ask
from models.policy.weights import intact
from models.recipe.toml import read
from tasks.tracking.download import fetch
from tasks.tracking.tracker import Tracker
from tasks.work import health, store
from tests.damages import Damage, braces, brackets, cut, empty, folder, gone, noise


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


TABLE = [cut, braces, brackets, noise, folder]


# Databases


def database(path: Path) -> Path:
    """A real sqlite file with a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as table, table:
        table.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY, word TEXT)")
        table.executemany("INSERT INTO numbers VALUES (?, ?)", [(n, "word" * 50) for n in range(200)])
    return path


@pytest.mark.parametrize("name", list(health.LOST))
@pytest.mark.parametrize("damage", TABLE)
def test_a_damaged_database_is_named_before_anything_begins(damage: Damage, name: str, runs: Path) -> None:
    place = database(runs / name)
    assert health.check(runs, {}) == []
    damage(place)
    with pytest.raises(BadPlace) as raised:
        health.check(runs, {})
    sentence = str(raised.value)
    assert sentence.startswith(f"{place}: cannot be read (") and health.LOST[name] in sentence and "backup" in sentence
    assert len(sentence.splitlines()) == 1 and raised.value.exit_code == 2
    elsewhere = {"MLFLOW_TRACKING_URI": "http://a", "PREFECT_API_URL": "http://b/api", "SACPO_DATABASE": "postgresql:"}
    if name != "verdicts.db":
        assert health.check(runs, elsewhere) == []


def test_an_empty_database_is_damaged_only_where_none_begins_empty(runs: Path) -> None:
    for name in health.LOST:
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        empty(runs / name)
        if name in health.NEVER_EMPTY:
            with pytest.raises(BadPlace, match="it is empty"):
                health.check(runs, {})
        else:
            assert health.check(runs, {}) == []
        (runs / name).unlink()


def test_a_large_or_busy_database_is_looked_at_for_a_while_only(tmp_path: Path) -> None:
    place = database(tmp_path / "large.db")
    with closing(sqlite3.connect(place)) as table, table:
        table.executemany("INSERT INTO numbers VALUES (?, ?)", [(n, "word" * 50) for n in range(200, 30_000)])
    begun = time.monotonic()
    assert sqlite.fault(place, seconds=0) == ""
    assert time.monotonic() - begun < 30
    with closing(sqlite3.connect(place)) as table:
        table.execute("BEGIN EXCLUSIVE")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sqlite, "WAIT", 0.0)
            assert sqlite.fault(place) == ""


ASKS = [(Ask(f"what is {n} ?"), Answer(f"it is {n}", [n, 2], -1)) for n in range(300)]


@pytest.mark.parametrize("damage", [*TABLE, empty, gone])
def test_answers_that_cannot_be_read_are_begun_anew(damage: Damage, tmp_path: Path) -> None:
    table = AnswerTable(tmp_path / "answers.db", "policy", "greedy")
    table.add(ASKS)
    assert len(table.stored([ask for ask, _ in ASKS])) == 300
    damage(table.path)
    assert table.stored([ask for ask, _ in ASKS]) == {}
    table.add(ASKS)
    assert table.stored([ask for ask, _ in ASKS]) == {i: answer for i, (_, answer) in enumerate(ASKS)}
    assert list(tmp_path.glob("answers.db.damaged-*")) or damage in (empty, gone)


def test_answers_are_set_aside_before_the_run_too(runs: Path) -> None:
    noise(database(runs / "answers.db"))
    (sentence,) = health.check(runs, {})
    assert "answers are generated again" in sentence and health.check(runs, {}) == []


def test_no_flipped_bit_changes_an_answer_or_a_verdict(tmp_path: Path) -> None:
    """A row that changed on the disk is not known; sqlite itself would hand it out."""
    answers = AnswerTable(tmp_path / "answers.db", "policy", "greedy")
    answers.add(ASKS)
    verdicts = ScoreCache(tmp_path / "verdicts.db", "judge")
    verdicts.add([({"prompt": n}, {"score": n / 300}) for n in range(300)], calls=300)
    right = {i: answer for i, (_, answer) in enumerate(ASKS)}
    asked = [{"prompt": n} for n in range(300)]
    scores = verdicts.stored(asked)
    assert answers.stored([ask for ask, _ in ASKS]) == right and len(scores) == 300
    draw, lost = Random(0), 0
    for path in (answers.path, verdicts.path):
        held = path.read_bytes()
        for _ in range(60):
            bad = bytearray(held)
            bad[draw.randrange(4096, len(bad))] ^= 1 << draw.randrange(8)
            path.write_bytes(bad)
            try:
                known: dict[Any, Any] = (
                    answers.stored([a for a, _ in ASKS]) if path == answers.path else verdicts.stored(asked)
                )
            except sqlite3.DatabaseError:  # `health.check` names it
                continue
            expected: dict[Any, Any] = right if path == answers.path else scores
            assert known.items() <= expected.items()
            lost += len(known) < 300
    assert lost > 20


def test_tables_of_an_older_version_are_read_and_sealed_from_then_on(tmp_path: Path) -> None:
    old = "CREATE TABLE verdicts (judge TEXT, content TEXT, verdict TEXT, PRIMARY KEY (judge, content)) WITHOUT ROWID"
    with closing(sqlite3.connect(tmp_path / "verdicts.db")) as table, table:
        table.execute(old)
        key = artifacts.content_digest({"prompt": 1})
        table.execute("INSERT INTO verdicts VALUES ('judge', ?, '1')", (key,))
    verdicts = ScoreCache(tmp_path / "verdicts.db", "judge")
    verdicts.add([({"prompt": 2}, 2)])
    assert list(verdicts.stored([{"prompt": 1}, {"prompt": 2}]).values()) == [1, 2]


# Weights


def test_damaged_parents_are_not_merged_under_their_old_digests(
    policy: Policy, other_policy: Policy, tmp_path: Path
) -> None:
    bad = shutil.copytree(other_policy.path, tmp_path / "bad")
    flip(bad / "model.safetensors")
    (tmp_path / "out").mkdir()
    for safe, reward in ((policy, other_policy.at(bad)), (other_policy.at(bad), policy)):
        with pytest.raises(Damaged, match="weights have digest"):
            interpolate(tmp_path / "out", safe, reward, 0.5)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_weights_are_not_registered(policy: Policy, runs: Path) -> None:
    bad = shutil.copytree(policy.path, runs / "store" / "dpo-1")
    sealed.write(bad / store.MANIFEST, {"noun": {"name": "p"}})
    flip(bad / "model.safetensors")
    tracker = Tracker(runs, read("quickstart"), "digest", {})
    with pytest.raises(Damaged, match="weights have digest"):
        tracker.register(policy.at(bad), {})
    tracker.fail("FAILED")
    assert not (bad / store.MANIFEST).exists()  # made again by the next command


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "weights"
    place.write_bytes(b"a" * 1000)
    first = file_digest(place)
    flip(place)
    assert file_digest(place) != first  # in the same tick of the clock, perhaps
    os.utime(place, (1e9, 1e9))
    second = file_digest(place)
    monkeypatch.setattr(artifacts.hashlib, "file_digest", None)  # nobody reads it again
    assert file_digest(place) == second
    os.utime(place, (2e9, 2e9))  # the clock was set back since
    with pytest.raises(TypeError):
        file_digest(place)


def test_a_damaged_version_is_neither_fetched_nor_served(policy: Policy, runs: Path) -> None:
    from mlflow.pyfunc import load_model

    tracker = Tracker(runs, read("quickstart"), "digest", {})
    assert tracker.register(policy, {}) == "1"
    tracker.fail("FAILED")
    (held,) = runs.glob("artifacts/**/model.safetensors")
    whole = held.read_bytes()
    flip(held)
    with pytest.raises(BadPolicy, match="is not the policy that was registered"):
        fetch(runs, "models:/quickstart/1")
    with pytest.raises(ValueError, match="not the file that was registered"):
        load_model("models:/quickstart/1")
    held.write_bytes(whole)
    place = fetch(runs, "models:/quickstart/1")
    intact(place, policy.digest)
    flip(place / "model.safetensors")  # the copy
    with pytest.raises(BadPolicy, match="if the same command says so again"):
        fetch(runs, "models:/quickstart/1")
    intact(fetch(runs, "models:/quickstart/1"), policy.digest)
