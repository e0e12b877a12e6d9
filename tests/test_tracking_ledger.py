"""The ledger's own rows: what is written is read again, whole, and what is claimed twice is refused."""

import sqlite3
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from models.errors import BadPlace, Stale
from models.gate.gate import Check, Verdict
from models.gate.promotion_log import Entry
from tasks.tracking import ledger as ledgers
from tasks.tracking import ledger_tables
from tasks.tracking.ledger import AT_ONCE, Charges, Ledger, Standing

FAILED = Check("safety rate", 0.5, 0.4, 0.9, False, "lower bound")
VERDICT = Verdict(
    "a", 0.5, 0.4, 0.9, False, incidents=("how ?", "why ?"), checks=(FAILED, Check("x", 1.0, 1.0, 2.0, True, "count")),
    n=80, failed=3, method="betting over prompts", must_pass=7,
)  # fmt: skip


def table(runs: Path, query: str) -> list[Any]:
    with sqlite3.connect(runs / "operations.db") as connection:
        return connection.execute(query).fetchall()


def recent(text: str) -> bool:
    """A time in UTC, as ISO 8601 writes it, of less than a minute ago."""
    then = datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return 0 <= (datetime.now(UTC) - then).total_seconds() < 60


def entry(number: int, **changes: str) -> Entry:
    fields = {"action": "promote", "version_from": "1", "version_to": "2", "who": "Ada", "at": "noon", "why": "better"}
    return Entry(number, **fields | changes)


def test_a_ledger_keeps_its_name(runs: Path) -> None:
    name = Ledger(runs).identity()
    assert len(name) == 36 and Ledger(runs).identity() == name
    assert table(runs, "select number, id from sacpo_identity") == [(1, name)]
    assert Ledger(runs.with_name("other")).identity() != name


def test_of_two_that_name_a_ledger_in_the_same_moment_the_first_one_counts(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, names = ledgers.uuid4, []

    def late() -> Any:
        monkeypatch.setattr(ledgers, "uuid4", draw)
        names.append(Ledger(runs).identity())  # another process, after we saw that it has no name
        return draw()

    monkeypatch.setattr(ledgers, "uuid4", late)
    assert [Ledger(runs).identity()] == names


def test_the_promotion_log_is_read_as_it_was_written_oldest_first(runs: Path) -> None:
    ledger = Ledger(runs)
    assert ledger.promotions("m") == [] and ledger.models() == []
    log = [entry(1, action="adopt", version_from=""), entry(2, who="Bo"), entry(3, why="worse", at="later")]
    for one in (log[2], log[0], log[1]):
        ledger.promote("m", one)
    ledger.promote("a", entry(1))
    assert ledger.promotions("m") == log and ledger.promotions("a") == [entry(1)]
    assert ledger.models() == ["a", "m"]


def test_an_entry_that_is_taken_is_refused_and_nothing_is_lost(runs: Path) -> None:
    ledger = Ledger(runs)
    ledger.promote("m", entry(1))
    with pytest.raises(Stale) as refused:
        ledger.promote("m", entry(1, who="Bo"))
    assert str(refused.value) == (
        "m: somebody else moved the champion meanwhile (entry 1 of the promotion log is taken); look at "
        "`sacpo champion` and decide again"
    )
    assert ledger.promotions("m") == [entry(1)]


def test_a_verdict_is_read_as_it_was_taken(runs: Path) -> None:
    ledger = Ledger(runs)
    assert ledger.verdict("q") is None
    assert ledger.decide("m", "q", ledger.charges(["b", "a"]), 0.005, VERDICT)
    assert ledger.verdict("q") == VERDICT and ledger.verdict("other") is None
    ((question, model, at),) = table(runs, "select question, model, at from sacpo_verdicts")
    assert (question, model) == ("q", "m") and recent(at)
    charged = table(runs, "select prompt, number, question, error from sacpo_charges order by prompt")
    assert charged == [("a", 1, "q", 0.005), ("b", 1, "q", 0.005)]


def test_a_question_is_decided_once_and_who_comes_second_charges_nothing(runs: Path) -> None:
    ledger = Ledger(runs)
    assert ledger.decide("m", "q", ledger.charges(["a"]), 0.005, VERDICT)
    other = Verdict("b", 1.0, 0.99, 0.9, True)
    assert not ledger.decide("m", "q", ledger.charges(["a", "b"]), 0.01, other)
    assert ledger.verdict("q") == VERDICT
    assert ledger.charges(["a", "b"]) == {"a": Charges(1, 0.005), "b": Charges(0, 0.0)}


def test_a_verdict_on_no_prompt_is_kept_too(runs: Path) -> None:
    """Where nothing was asked nothing is charged."""
    ledger = Ledger(runs)
    assert ledger.decide("m", "q", {}, 0.005, VERDICT) and ledger.verdict("q") == VERDICT


def test_charges_of_one_prompt_add_up_whichever_model_they_were_about(runs: Path) -> None:
    ledger = Ledger(runs)
    for number, model in enumerate(("m", "m", "n")):
        assert ledger.decide(model, f"q{number}", ledger.charges(["a"]), 0.01 * (number + 1), VERDICT)
    assert ledger.charges(["a"]) == {"a": Charges(3, pytest.approx(0.06))}
    assert ledger.charges([]) == {}


def test_charges_of_more_prompts_than_one_statement_may_name(runs: Path) -> None:
    """And in no more statements than that takes."""
    ledger, suite, asked = Ledger(runs), [f"{i:04}" for i in range(2 * AT_ONCE + 1)], []
    event.listen(ledger._engine, "before_cursor_execute", lambda *arguments: asked.append(arguments[2]))
    charges = ledger.charges(suite)
    assert len(asked) == 3
    assert ledger.decide("m", "q", charges, 0.005, VERDICT)
    assert ledger.charges([*suite, "fresh"]) == {**dict.fromkeys(suite, Charges(1, 0.005)), "fresh": Charges()}


def test_what_was_decided_about_a_version_is_read_oldest_first_and_of_no_other(runs: Path) -> None:
    ledger = Ledger(runs)
    waits = Standing("waits for approval", "", "", "digest", "file:///a")
    agreed = Standing("agreed", "Ada", "read the card", "digest", "file:///a")
    for standing in (waits, agreed, waits):
        ledger.note_standing("m", "1", standing)
    ledger.note_standing("m", "2", agreed)
    ledger.note_standing("n", "1", agreed)
    assert ledger.standings("m", "1") == [waits, agreed, waits]
    assert ledger.standings("m", "2") == ledger.standings("n", "1") == [agreed] and ledger.standings("n", "2") == []
    rows = table(runs, "select number, at from sacpo_standings where model = 'm' and version = '1' order by number")
    assert [number for number, _ in rows] == [1, 2, 3] and all(recent(at) for _, at in rows)


def test_rows_come_in_the_order_that_was_asked_for(runs: Path) -> None:
    """Not in the one that a database happens to have: sqlite can turn its own round."""
    ledger = Ledger(runs)
    standings = [Standing("pass", f"{number}", "", "digest", "file:///a") for number in range(3)]
    for number, standing in enumerate(standings, start=1):
        ledger.promote("m", entry(number))
        ledger.promote(f"m{number}", entry(1))
        ledger.note_standing("m", "1", standing)
    with ledger._engine.connect() as connection:  # the next ones take the same connection from the pool
        connection.exec_driver_sql("PRAGMA reverse_unordered_selects = ON")
    assert [one.number for one in ledger.promotions("m")] == [1, 2, 3]
    assert ledger.models() == ["m", "m1", "m2", "m3"] and ledger.standings("m", "1") == standings


def test_of_two_words_in_the_same_moment_none_is_lost(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, read = Ledger(runs), Ledger.standings
    waits, agreed = (Standing(state, "", "", "digest", "file:///a") for state in ("waits for approval", "agreed"))

    def late(*key: Any) -> list[Standing]:
        found = read(*key)
        monkeypatch.setattr(Ledger, "standings", read)
        ledger.note_standing("m", "1", waits)  # another process, after we looked which number is free
        return found

    monkeypatch.setattr(Ledger, "standings", late)
    ledger.note_standing("m", "1", agreed)
    assert ledger.standings("m", "1") == [waits, agreed]


def test_whose_weights_a_version_holds_is_noted_once_and_in_order(runs: Path) -> None:
    ledger = Ledger(runs)
    assert ledger.policy("m", "1", "a") == "" and not ledger.was_registered("m", "p")
    for source, policy in (("a", "p"), ("a", "p"), ("b", "q"), ("a", "s")):
        ledger.note_registered("m", "1", source, policy)
    ledger.note_registered("m", "2", "c", "r")
    ledger.note_registered("other", "1", "d", "t")
    notes = table(runs, "select version, number, source, policy from sacpo_weights where model = 'm' order by 1, 2")
    assert notes == [("1", 1, "a", "p"), ("1", 2, "b", "q"), ("1", 3, "a", "s"), ("2", 1, "c", "r")]
    assert recent(*table(runs, "select max(at) from sacpo_weights")[0])
    with ledger._engine.connect() as connection:  # whatever order the database would take
        connection.exec_driver_sql("PRAGMA reverse_unordered_selects = ON")
    assert [ledger.policy("m", "1", source) for source in ("a", "b", "elsewhere")] == ["s", "q", "s"]
    assert ledger.policy("m", "2", "a") == "r" and ledger.policy("m", "3", "a") == ""
    assert ledger.was_registered("m", "p") and ledger.was_registered("m", "r") and not ledger.was_registered("m", "t")


def test_of_one_address_the_last_note_counts(runs: Path) -> None:
    ledger = Ledger(runs)
    ledger.note_registered("m", "1", "a", "old")
    ledger.note_registered("m", "1", "a", "new")
    assert ledger.policy("m", "1", "a") == "new"


def test_who_notes_weights_in_the_same_moment_loses_no_note(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, read = Ledger(runs), Ledger._weights

    def late(*key: Any) -> list[tuple[str, str]]:
        found = read(*key)
        monkeypatch.setattr(Ledger, "_weights", read)
        ledger.note_registered("m", "1", "b", "q")  # another process, after we looked which number is free
        return found

    monkeypatch.setattr(Ledger, "_weights", late)
    ledger.note_registered("m", "1", "a", "p")
    assert read(ledger, "m", "1") == [("b", "q"), ("a", "p")]


def test_weights_that_were_logged_are_found_before_they_are_a_version(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = Ledger(runs)
    times = iter(["2026-01-01T00:00:01Z", "2026-01-01T00:00:02Z", "2026-01-01T00:00:03Z"])
    monkeypatch.setattr(ledgers, "now", lambda: next(times))
    ledger.note_registered("m", "1", "a", "earlier")
    ledger.note_logged("m", "a", "later")  # which the database has before the other
    ledger.note_logged("other", "b", "q")
    assert (
        ledger.logged_weights("m") == {"a": "later"}
        and ledger.logged_weights("other") == {"b": "q"}
        and not ledger.logged_weights("x")
    )
    assert table(runs, "select version, number, policy from sacpo_weights where model = 'other'") == [("", 1, "q")]
    assert not ledger.was_registered("other", "q")  # no version of it yet


@pytest.mark.parametrize(
    ("state", "who", "why", "text", "serves"),
    [
        ("pass", "", "", "pass", True),
        ("fail", "", "safety rate: 0.5", "fail: safety rate: 0.5", False),
        ("undecided", "", "no judge", "undecided: no judge", False),
        ("off", "", "", "off", False),
        ("waits for approval", "", "", "waits for approval", True),
        ("agreed", "Ada", "read the card", "agreed by Ada: read the card", True),
        ("refused", "", "", "refused by a person: no reason given", False),
    ],
)
def test_a_standing_says_what_it_is_and_whether_the_version_may_serve(
    state: str, who: str, why: str, text: str, serves: bool
) -> None:
    standing = Standing(state, who, why, "digest", "file:///a")
    assert str(standing) == text and standing.may_serve is serves


def test_the_first_note_of_an_attempt_stays(runs: Path) -> None:
    ledger = Ledger(runs)
    ledger.note_attempt("m", "x", "rejected")
    ledger.note_attempt("n", "x", "promoted")
    ledger.note_attempt("m", "y", "failed")
    first = ledger.last_decision("m", "x")
    assert first is not None and first.keys() == {"outcome", "at"}
    assert first["outcome"] == "rejected" and recent(first["at"])
    assert [ledger.last_decision(*key)["outcome"] for key in [("n", "x"), ("m", "y")]] == ["promoted", "failed"]  # type: ignore[index]
    assert ledger.last_decision("n", "y") is None
    ledger.note_attempt("m", "x", "promoted")
    assert ledger.last_decision("m", "x") == first


def test_a_ledger_lies_in_the_runs_folder_unless_a_database_is_named(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = runs / "of" / "a" / "team"
    Ledger(deep).note_attempt("m", "x", "rejected")
    assert (deep / "operations.db").is_file()
    monkeypatch.setenv("SACPO_DATABASE", f"sqlite:///{tmp_path / 'shared.db'}")
    assert Ledger(deep).last_decision("m", "x") is None
    Ledger(deep).note_attempt("m", "x", "promoted")
    assert Ledger(tmp_path / "nowhere").last_decision("m", "x")["outcome"] == "promoted"  # type: ignore[index]
    assert (tmp_path / "shared.db").is_file() and not (tmp_path / "nowhere").exists()


def test_who_writes_waits_for_who_is_writing(runs: Path) -> None:
    """Half a minute, before a locked file is an error."""
    with Ledger(runs)._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000


def test_a_connection_that_was_closed_meanwhile_is_opened_again(runs: Path) -> None:
    """As a team's server does over night."""
    ledger = Ledger(runs)
    with ledger._engine.connect() as connection:
        raw = connection.connection.dbapi_connection
    assert raw is not None
    raw.close()
    assert ledger.models() == []


def test_the_time_is_in_utc_wherever_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        time_now = ledgers.now()
    time.tzset()
    assert recent(time_now)


def test_tables_that_another_process_makes_in_the_same_moment_are_no_error(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, tries = ledger_tables._create_tables, []

    def late(engine: Any) -> None:
        tries.append(engine)
        if len(tries) == 1:
            raise OperationalError("create table", {}, Exception("table exists already"))
        make(engine)

    monkeypatch.setattr(ledger_tables, "_create_tables", late)
    assert Ledger(runs).models() == [] and len(tries) == 2


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("not an address", "not an address cannot be used; give postgresql+psycopg://user@host:port/name"),
        ("postgresql+nothing://me:secret@db/x", "db/x cannot be used; give postgresql+psycopg://user@host:port/name"),
        ("mysql://me:secret@db/x", "db/x cannot be used: No module named 'MySQLdb'"),
        (
            "postgresql+psycopg://me:secret@db:port/x",
            "db:port/x cannot be used; give postgresql+psycopg://user@host:port/name",
        ),
    ],
)
def test_a_database_that_cannot_be_opened_is_named_with_the_reason(
    address: str, sentence: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SACPO_DATABASE", address)
    with pytest.raises(BadPlace) as refused:
        Ledger(runs)
    assert str(refused.value) == f"SACPO_DATABASE at {sentence}"


@pytest.mark.parametrize(
    ("address", "holds"),
    [
        ("postgresql+psycopg://me@db/sacpo", False),
        ("http://127.0.0.1:5000", False),
        ("http://127.0.0.1:4200/api", False),
        ("sqlite:////a/operations.db", False),
        ("postgresql+psycopg://me:secret@db/sacpo", True),
        ("postgresql+psycopg://me:se#cret@db/sacpo", True),
        ("postgresql+psycopg://me:se/cret@db/sacpo", True),
        ("postgresql+psycopg://me:se[cret@db/sacpo", True),
        ("postgresql+psycopg://me@db/sacpo?password=secret", True),
        ("postgresql+psycopg://me@db/sacpo?sslpassword=secret", True),
        ("postgresql+psycopg://me@db/sacpo?password=a@secret", True),
        ("postgresql+psycopg://me:se?cret@db/sacpo", True),
        ("me:se?cret@db/sacpo", True),
        ("postgresql+psycopg:/me:se?cret@db/sacpo", True),
    ],
)
def test_an_address_with_a_password_is_never_shown(address: str, holds: bool) -> None:
    assert ledger_tables.holds_password(address) is holds
    shown = str(ledger_tables.unusable(address, ValueError()))
    assert not [part for part in ("secret", "se#", "se?", "se/", "se[", "cret") if part in shown]


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("postgresql+psycopg://me:se?cret@db/sacpo", "postgresql+psycopg://…"),
        ("postgresql://me:se?c://ret@db", "postgresql://…"),
        ("me:se?cret@db/sacpo", "…"),
    ],
)
def test_of_an_address_that_is_not_understood_no_more_is_shown_than_its_kind(address: str, place: str) -> None:
    shown = str(ledger_tables.unusable(address, ValueError()))
    assert shown.startswith(f"SACPO_DATABASE at {place} cannot be used; give ")


def test_a_runs_folder_that_is_a_file_is_a_bad_place(runs: Path) -> None:
    runs.write_text("")
    with pytest.raises(BadPlace, match=r"cannot be used: .*exists"):
        Ledger(runs)


def test_a_database_that_fails_later_is_named_in_one_line(runs: Path) -> None:
    ledger = Ledger(runs)
    with sqlite3.connect(runs / "operations.db") as connection:
        connection.execute("drop table sacpo_attempts")
    with pytest.raises(BadPlace) as refused:
        ledger.last_decision("m", "x")
    assert str(refused.value) == (
        f"SACPO_DATABASE at sqlite:///{runs}/operations.db cannot be used: (sqlite3.OperationalError) no such table: "
        "sacpo_attempts"
    )
