"""What must be counted once, whoever writes: promotions, decisions on test prompts, decided attempts.

Append-only tables behind SQLAlchemy: a sqlite file in the runs folder, or a team's database (`SACPO_DATABASE`).
Primary keys hold the numbers that a writer claims: of two who claim the same one, the second is refused.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from models.errors import BadPlace, Stale
from models.files.kept import Kept
from models.gate.promotion_log import Entry

if TYPE_CHECKING:
    from models.gate.gate import Verdict

_meta = MetaData()
_promotions = Table(
    "sacpo_promotions", _meta,
    Column("model", String(200), primary_key=True), Column("number", Integer, primary_key=True),
    Column("action", String(20), nullable=False), Column("version_from", String(20), nullable=False),
    Column("version_to", String(20), nullable=False), Column("who", String(200), nullable=False),
    Column("at", String(30), nullable=False), Column("why", Text, nullable=False),
)  # fmt: skip
_verdicts = Table(
    "sacpo_verdicts", _meta,
    Column("question", String(64), primary_key=True), Column("model", String(200), nullable=False),
    Column("verdict", Text, nullable=False), Column("at", String(30), nullable=False),
)  # fmt: skip
_charges = Table(
    "sacpo_charges", _meta,
    Column("prompt", String(64), primary_key=True), Column("number", Integer, primary_key=True),
    Column("question", String(64), nullable=False), Column("error", Float, nullable=False),
)  # fmt: skip
_standings = Table(
    "sacpo_standings", _meta,
    Column("model", String(200), primary_key=True), Column("version", String(20), primary_key=True),
    Column("number", Integer, primary_key=True), Column("state", String(30), nullable=False),
    Column("who", Text, nullable=False), Column("why", Text, nullable=False),
    Column("verdict", String(64), nullable=False), Column("source", Text, nullable=False),
    Column("at", String(30), nullable=False),
)  # fmt: skip
_weights = Table(
    "sacpo_weights", _meta,
    Column("model", String(200), primary_key=True), Column("version", String(20), primary_key=True),
    Column("number", Integer, primary_key=True), Column("source", Text, nullable=False),
    Column("policy", String(64), nullable=False), Column("at", String(30), nullable=False),
)  # fmt: skip
_attempts = Table(
    "sacpo_attempts", _meta,
    Column("model", String(200), primary_key=True), Column("digest", String(64), primary_key=True),
    Column("outcome", Text, nullable=False), Column("at", String(30), nullable=False),
)  # fmt: skip
_identity = Table(
    "sacpo_identity", _meta,
    Column("number", Integer, primary_key=True, autoincrement=False), Column("id", String(36), nullable=False),
)  # fmt: skip

AGREED, REFUSED = "agreed", "refused"
"""What a person may have said of a version."""
AT_ONCE = 500
"""Prompts asked about in one statement: databases limit its parameters."""


class Charges(NamedTuple):
    """What decisions have used of one prompt."""

    decisions: int = 0
    error: float = 0.0
    """Chance with which any of them may have been wrong."""


class Standing(NamedTuple):
    """What was decided about a model version: what the registry says of it can be edited, and this cannot."""

    state: str
    """`pass`, `fail`, `undecided` or `off`, by the gate; `waits for approval`, `agreed` or `refused`, by a person."""
    who: str
    """The person who answered, as they call themselves."""
    why: str
    """What the gate found wanting, or the person's reason."""
    verdict: str
    """Digest of the verdict that it rests on."""
    source: str
    """Where the version's weights lie, which the registry never changes."""

    def __str__(self) -> str:
        if self.state in (AGREED, REFUSED):
            return answered(self.state, self.who, self.why)
        return ": ".join(filter(None, [self.state, self.why]))

    @property
    def may_serve(self) -> bool:
        """The gate let it pass, and nobody who was asked has refused it."""
        return self.state in ("pass", "waits for approval", AGREED)


def answered(state: str, who: str, why: str) -> str:
    """Return in words what a person said of a version."""
    return f"{state} by {who or 'a person'}: {why or 'no reason given'}"


class Ledger:
    """The tables of one runs folder, or of a team."""

    def __init__(self, root: Path) -> None:
        self._engine = _engine(os.environ.get("SACPO_DATABASE") or f"sqlite:///{root / Kept.operations}")

    def identity(self) -> str:
        """Return what tells this ledger from every other one; a copy of its database is the same ledger."""
        with self._connected() as connection:
            told = connection.scalar(select(_identity.c.id))
        if told is None:
            with suppress(IntegrityError):  # another process has just named it
                self._insert(_identity, {"number": 1, "id": str(uuid4())})
            return self.identity()
        return str(told)

    def promotions(self, model: str) -> list[Entry]:
        """Return the promotion log of a registered model, oldest first."""
        columns = [column for column in _promotions.c if column.name != "model"]
        with self._connected() as connection:
            rows = connection.execute(
                select(*columns).where(_promotions.c.model == model).order_by(_promotions.c.number)
            )
            return [Entry(**row) for row in rows.mappings()]

    def models(self) -> list[str]:
        """Return the registered models that have a promotion log."""
        with self._connected() as connection:
            return list(connection.scalars(select(_promotions.c.model).distinct().order_by(_promotions.c.model)))

    def promote(self, model: str, *entries: Entry) -> None:
        """Append to the promotion log: all entries or none.

        Raises:
            Stale: another writer has taken a number.
        """
        try:
            with self._connected() as connection:
                connection.execute(insert(_promotions), [{"model": model, **asdict(entry)} for entry in entries])
        except IntegrityError as error:
            raise Stale(
                f"{model}: somebody else moved the champion meanwhile (entry {entries[0].number} of the promotion log "
                "is taken); look at `sacpo champion` and decide again"
            ) from error

    def charges(self, prompts: Iterable[str]) -> dict[str, Charges]:
        """Return what earlier decisions have used of each prompt, whichever model, suite or recipe they were about."""
        found = dict.fromkeys(sorted(prompts), Charges())
        keys, where = list(found), _charges.c.prompt
        columns = where, func.count(), func.sum(_charges.c.error)
        with self._connected() as connection:
            for first in range(0, len(keys), AT_ONCE):
                some = where.in_(keys[first : first + AT_ONCE])
                for prompt, decisions, error in connection.execute(select(*columns).where(some).group_by(where)):
                    found[prompt] = Charges(decisions, error)
        return found

    def verdict(self, question: str) -> "Verdict | None":
        """Return the verdict that was taken on the same question, if it was: asked again, it costs nothing."""
        with self._connected() as connection:
            told = connection.scalar(select(_verdicts.c.verdict).where(_verdicts.c.question == question))
        return _read(json.loads(told)) if told else None

    def decide(
        self, model: str, question: str, charges: Mapping[str, Charges], error: float, verdict: "Verdict"
    ) -> bool:
        """Write a verdict down and charge its prompts; false if any of them was charged since, or the question decided.

        Every charge of a prompt has a number that is taken once. So of two who decide on a common prompt in the same
        moment the second is refused whole, and looks again.

        Args:
            model: registered model that it is about, for who reads the table.
            question: digest of everything that the verdict follows from.
            charges: what had been used of each prompt when the verdict was taken.
            error: what this one uses of each.
        """
        taken = {"question": question, "model": model, "verdict": json.dumps(asdict(verdict)), "at": now()}
        rows = [
            {"prompt": prompt, "number": used.decisions + 1, "question": question, "error": error}
            for prompt, used in sorted(charges.items())  # in one order, or two writers would wait for each other
        ]
        try:
            with self._connected() as connection:
                connection.execute(insert(_verdicts), [taken])
                if rows:
                    connection.execute(insert(_charges), rows)
        except IntegrityError:
            return False
        return True

    def standings(self, model: str, version: str) -> list[Standing]:
        """Return what was decided about a version, oldest first; empty if this ledger does not know it."""
        columns = [_standings.c[name] for name in Standing._fields]
        mine = _standings.c.model == model, _standings.c.version == version
        with self._connected() as connection:
            rows = connection.execute(select(*columns).where(*mine).order_by(_standings.c.number))
            return [Standing(*row) for row in rows]

    def stand(self, model: str, version: str, standing: Standing) -> None:
        """Append what was decided about a version; of two in the same moment the second one's word is the last."""
        key = {"model": model, "version": version, "at": now()}
        while True:
            number = len(self.standings(model, version)) + 1
            try:
                return self._insert(_standings, key | {"number": number} | standing._asdict())
            except IntegrityError:
                continue

    def policy(self, model: str, version: str, source: str) -> str:
        """Return the digest of the policy that was registered as a version; empty if this ledger does not know it.

        Args:
            source: where the registry says that the weights lie. It tells a number that was given once more, after a
                model was deleted; weights that were never registered there must be the last ones that were.
        """
        known = self._registered(model, version)
        return next((policy for place, policy in reversed(known) if place == source), known[-1][1] if known else "")

    def registered(self, model: str, version: str, source: str, policy: str) -> None:
        """Note whose weights a version holds, unless the last note says the same."""
        while (source, policy) not in (known := self._registered(model, version))[-1:]:
            key = {"model": model, "version": version, "number": len(known) + 1}
            with suppress(IntegrityError):  # another process has just noted something
                self._insert(_weights, key | {"source": source, "policy": policy, "at": now()})

    def knows(self, model: str, policy: str) -> bool:
        """Return whether weights of a policy became a version of a model."""
        mine = _weights.c.model == model, _weights.c.policy == policy, _weights.c.version != ""
        with self._connected() as connection:
            return connection.scalar(select(_weights.c.version).where(*mine)) is not None

    def note_logged(self, model: str, source: str, policy: str) -> None:
        """Note whose weights lie where, before they become a version: whoever may write to MLflow can edit its tags."""
        self.registered(model, "", source, policy)

    def logged(self, model: str) -> dict[str, str]:
        """Return address → digest of the policies that were logged, to become versions of a model."""
        mine = _weights.c.model == model
        with self._connected() as connection:
            rows = connection.execute(select(_weights.c.source, _weights.c.policy).where(mine).order_by(_weights.c.at))
            return {row.source: row.policy for row in rows}

    def _registered(self, model: str, version: str) -> list[tuple[str, str]]:
        mine = _weights.c.model == model, _weights.c.version == version
        with self._connected() as connection:
            rows = connection.execute(
                select(_weights.c.source, _weights.c.policy).where(*mine).order_by(_weights.c.number)
            )
            return [(row.source, row.policy) for row in rows]

    def last_decision(self, model: str, digest: str) -> dict[str, str] | None:
        """Return when an attempt on the same data, recipe and base was decided, and how it ended."""
        with self._connected() as connection:
            row = connection.execute(
                select(_attempts.c.outcome, _attempts.c.at).where(
                    _attempts.c.model == model, _attempts.c.digest == digest
                )
            ).first()
        return {"outcome": row.outcome, "at": row.at} if row else None

    def attempted(self, model: str, digest: str, outcome: str) -> None:
        """Note that an attempt was decided; the first note stays."""
        with suppress(IntegrityError):
            self._insert(_attempts, {"model": model, "digest": digest, "outcome": outcome, "at": now()})

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """A transaction.

        Raises:
            BadPlace: the database does not answer, or does not let us in any more.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            if isinstance(error, IntegrityError):
                raise
            raise _unusable(self._engine.url.render_as_string(), error) from error

    def _insert(self, table: Table, row: Mapping[str, Any]) -> None:
        with self._connected() as connection:
            connection.execute(insert(table).values(**row))


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _read(tree: dict[str, Any]) -> "Verdict":
    from models.gate.gate import Check, Verdict  # scipy takes a second, and who asks who serves needs no verdict

    checks = tuple(Check(**check) for check in tree.pop("checks"))
    return Verdict(**tree | {"incidents": tuple(tree["incidents"]), "checks": checks})


@cache
def _engine(address: str) -> Engine:
    """Return the engine with its tables made.

    Raises:
        BadPlace: the database does not answer.
    """
    try:
        engine = create_engine(address, pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA busy_timeout = 30000"))
            Path(engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)
        try:
            _make(engine)
        except (OperationalError, IntegrityError):  # another process made them in the same moment
            _make(engine)
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        raise _unusable(address, error) from None  # the address may stand in the error, with its password
    return engine


def _make(engine: Engine) -> None:
    """Make the tables that are not there; asked and made in one statement, since others may do the same."""
    with engine.begin() as connection:
        for table in _meta.sorted_tables:
            connection.execute(CreateTable(table, if_not_exists=True))


def secret(address: str) -> bool:
    """Whether a password stands in an address of a database or a server; in one that cannot be read, it may."""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        return True
    return bool(url.password or any("password" in name.lower() for name in url.query))


def _unusable(address: str, error: Exception) -> BadPlace:
    user, _, place = address.rpartition("@")
    place = place.partition("?")[0]  # without user and password, which may stand in the query, and hold an @
    if "?" in user:
        scheme, mark, _ = address.partition("://")
        place = f"{scheme}{mark}…" if mark else "…"
    why = "" if isinstance(error, (ArgumentError, ValueError)) else f": {str(error).splitlines()[0]}"
    return BadPlace(
        f"SACPO_DATABASE at {place} cannot be used{why or '; give postgresql+psycopg://user@host:port/name'}"
    )
