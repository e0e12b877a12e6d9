"""The tables of the ledger, and the database that holds them: made when missing, and named without its password."""

from functools import cache
from pathlib import Path

from sqlalchemy import (
    Column,
    Engine,
    Float,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from models.errors import BadPlace

# Every `number` is part of a primary key and says which line of a list a row is. A writer claims the number after the
# last one that it has read, so the database itself refuses the second of two writers who read the same list.
_meta = MetaData()
PROMOTIONS = Table(
    "sacpo_promotions", _meta,
    Column("model", String(200), primary_key=True), Column("number", Integer, primary_key=True),
    Column("action", String(20), nullable=False), Column("version_from", String(20), nullable=False),
    Column("version_to", String(20), nullable=False), Column("who", String(200), nullable=False),
    Column("at", String(30), nullable=False), Column("why", Text, nullable=False),
)  # fmt: skip
"""The promotion log of each registered model: the fields of `models.gate.promotion_log.Entry`."""
VERDICTS = Table(
    "sacpo_verdicts", _meta,
    Column("question", String(64), primary_key=True), Column("model", String(200), nullable=False),
    Column("verdict", Text, nullable=False), Column("at", String(30), nullable=False),
)  # fmt: skip
"""Verdicts of the gate, as JSON, by the digest of everything that they follow from."""
CHARGES = Table(
    "sacpo_charges", _meta,
    Column("prompt", String(64), primary_key=True), Column("number", Integer, primary_key=True),
    Column("question", String(64), nullable=False), Column("error", Float, nullable=False),
)  # fmt: skip
"""What each decision has used of the error of a test prompt (docs/registry.md, the budget of test prompts)."""
STANDINGS = Table(
    "sacpo_standings", _meta,
    Column("model", String(200), primary_key=True), Column("version", String(20), primary_key=True),
    Column("number", Integer, primary_key=True), Column("state", String(30), nullable=False),
    Column("who", Text, nullable=False), Column("why", Text, nullable=False),
    Column("verdict", String(64), nullable=False), Column("source", Text, nullable=False),
    Column("at", String(30), nullable=False),
)  # fmt: skip
"""What the gate and people decided about a model version; the last row of a version counts."""
WEIGHTS = Table(
    "sacpo_weights", _meta,
    Column("model", String(200), primary_key=True), Column("version", String(20), primary_key=True),
    Column("number", Integer, primary_key=True), Column("source", Text, nullable=False),
    Column("policy", String(64), nullable=False), Column("at", String(30), nullable=False),
)  # fmt: skip
"""Digest of the policy whose weights lie at an address; `version` is empty until they become a model version."""
ATTEMPTS = Table(
    "sacpo_attempts", _meta,
    Column("model", String(200), primary_key=True), Column("digest", String(64), primary_key=True),
    Column("outcome", Text, nullable=False), Column("at", String(30), nullable=False),
)  # fmt: skip
"""How the first decided attempt on the same data, recipe and base ended; retraining asks for it."""
IDENTITY = Table(
    "sacpo_identity", _meta,
    Column("number", Integer, primary_key=True, autoincrement=False), Column("id", String(36), nullable=False),
)  # fmt: skip
"""One row, number 1: the name of this ledger."""


@cache
def engine(address: str) -> Engine:
    """Return the engine of a database, with the tables made in it.

    Raises:
        BadPlace: the address is none of a database, or the database does not answer.
    """
    try:
        engine = create_engine(address, pool_pre_ping=True)
        if engine.dialect.name == "sqlite":
            # a second process waits for half a minute for the lock of the file before it is refused
            event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA busy_timeout = 30000"))
            Path(engine.url.database or "").parent.mkdir(parents=True, exist_ok=True)
        try:
            _create_tables(engine)
        except (OperationalError, IntegrityError):
            # PostgreSQL refuses in spite of IF NOT EXISTS if another process creates the same table at the same moment.
            # The second try finds the table.
            _create_tables(engine)
    except (SQLAlchemyError, ImportError, OSError, ValueError) as error:
        raise unusable(address, error) from None  # no cause: its text may hold the address with the password
    return engine


def _create_tables(engine: Engine) -> None:
    """Create the tables that are missing."""
    with engine.begin() as connection:
        for table in _meta.sorted_tables:
            # IF NOT EXISTS asks and creates in one statement; `MetaData.create_all` asks first, and another process
            # may create the table before the second statement
            connection.execute(CreateTable(table, if_not_exists=True))


def holds_password(address: str) -> bool:
    """Return whether the address of a database or a server holds a password; one that cannot be read may hold one."""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        return True
    return bool(url.password or any("password" in name.lower() for name in url.query))


def unusable(address: str, error: Exception) -> BadPlace:
    """Return the error that names a database, without user and password, and why it cannot be used."""
    # The password may hold an @, so the place begins after the last one; it may also stand in the query, which is cut.
    user, _, place = address.rpartition("@")
    place = place.partition("?")[0]
    if "?" in user:
        # an @ in the query, or a ? in the password: what follows the @ may be a part of the password, so only the
        # kind of database is shown
        scheme, mark, _ = address.partition("://")
        place = f"{scheme}{mark}…" if mark else "…"
    # the texts of these two may hold the address, or a part of it
    why = "" if isinstance(error, (ArgumentError, ValueError)) else f": {str(error).splitlines()[0]}"
    return BadPlace(
        f"SACPO_DATABASE at {place} cannot be used{why or '; give postgresql+psycopg://user@host:port/name'}"
    )
