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
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from sqlalchemy import Connection, Table, func, insert, select
from sqlalchemy.exc import DBAPIError, IntegrityError

from models.errors import Stale
from models.files.kept import RunsFolderEntry
from models.gate.promotion_log import Entry
from tasks.tracking import ledger_tables
from tasks.tracking.ledger_tables import ATTEMPTS, CHARGES, IDENTITY, PROMOTIONS, STANDINGS, VERDICTS, WEIGHTS

if TYPE_CHECKING:
    from models.gate.gate import Verdict

AGREED, REFUSED = "agreed", "refused"
"""The two answers of a person who is asked whether a version may serve."""
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
            return answer_in_words(self.state, self.who, self.why)
        return ": ".join(filter(None, [self.state, self.why]))

    @property
    def may_serve(self) -> bool:
        """Whether the gate let it pass, and no person who was asked has refused it."""
        return self.state in ("pass", "waits for approval", AGREED)


def answer_in_words(state: str, who: str, why: str) -> str:
    """Return in words what a person said of a version."""
    return f"{state} by {who or 'a person'}: {why or 'no reason given'}"


class Ledger:
    """The tables of one runs folder, or of a team.

    Every method raises `BadPlace` where the database does not answer.
    """

    def __init__(self, root: Path) -> None:
        self._engine = ledger_tables.engine(
            os.environ.get("SACPO_DATABASE") or f"sqlite:///{root / RunsFolderEntry.operations}"
        )

    def identity(self) -> str:
        """Return what tells this ledger from every other one; a copy of its database is the same ledger."""
        with self._connected() as connection:
            identity = connection.scalar(select(IDENTITY.c.id))
        if identity is None:
            with suppress(IntegrityError):  # another process has named it since the line above; its name counts
                self._insert(IDENTITY, {"number": 1, "id": str(uuid4())})
            return self.identity()
        return str(identity)

    def promotions(self, model: str) -> list[Entry]:
        """Return the promotion log of a registered model, oldest first."""
        columns = [column for column in PROMOTIONS.c if column.name != "model"]
        with self._connected() as connection:
            rows = connection.execute(select(*columns).where(PROMOTIONS.c.model == model).order_by(PROMOTIONS.c.number))
            return [Entry(**row) for row in rows.mappings()]

    def models(self) -> list[str]:
        """Return the registered models that have a promotion log."""
        with self._connected() as connection:
            return list(connection.scalars(select(PROMOTIONS.c.model).distinct().order_by(PROMOTIONS.c.model)))

    def promote(self, model: str, *entries: Entry) -> None:
        """Append to the promotion log: all entries or none.

        Raises:
            Stale: another writer has taken a number.
        """
        try:
            with self._connected() as connection:
                connection.execute(insert(PROMOTIONS), [{"model": model, **asdict(entry)} for entry in entries])
        except IntegrityError as error:
            raise Stale(
                f"{model}: somebody else moved the champion meanwhile (entry {entries[0].number} of the promotion log "
                "is taken); look at `sacpo champion` and decide again"
            ) from error

    def charges(self, prompts: Iterable[str]) -> dict[str, Charges]:
        """Return what earlier decisions have used of each prompt, whichever model, suite or recipe they were about.

        Args:
            prompts: digests of prompts.
        """
        charges = dict.fromkeys(sorted(prompts), Charges())
        digests, column = list(charges), CHARGES.c.prompt
        columns = column, func.count(), func.sum(CHARGES.c.error)
        with self._connected() as connection:
            for first in range(0, len(digests), AT_ONCE):
                among = column.in_(digests[first : first + AT_ONCE])
                for prompt, decisions, error in connection.execute(select(*columns).where(among).group_by(column)):
                    charges[prompt] = Charges(decisions, error)
        return charges

    def verdict(self, question: str) -> "Verdict | None":
        """Return the verdict that was taken on the same question, if it was: asked again, it costs nothing."""
        with self._connected() as connection:
            text = connection.scalar(select(VERDICTS.c.verdict).where(VERDICTS.c.question == question))
        return _verdict(text) if text else None

    def decide(
        self, model: str, question: str, charges: Mapping[str, Charges], error: float, verdict: "Verdict"
    ) -> bool:
        """Write a verdict down and charge its prompts; false if any of them was charged since, or the question decided.

        Every charge of a prompt has a number that is taken once. So of two who decide on a common prompt in the same
        moment the second is refused whole, and looks again.

        Args:
            model: registered model that it is about, for people who read the table.
            question: digest of everything that the verdict follows from.
            charges: what had been used of each prompt when the verdict was taken.
            error: what this one uses of each.
        """
        decision = {"question": question, "model": model, "verdict": json.dumps(asdict(verdict)), "at": now()}
        rows = [
            {"prompt": prompt, "number": used.decisions + 1, "question": question, "error": error}
            # in one order for every writer: two that lock common rows in different orders would wait for each other
            for prompt, used in sorted(charges.items())
        ]
        try:
            with self._connected() as connection:
                connection.execute(insert(VERDICTS), [decision])
                if rows:
                    connection.execute(insert(CHARGES), rows)
        except IntegrityError:
            return False
        return True

    def standings(self, model: str, version: str) -> list[Standing]:
        """Return what was decided about a version, oldest first; empty if this ledger does not know it."""
        columns = [STANDINGS.c[name] for name in Standing._fields]
        of_version = STANDINGS.c.model == model, STANDINGS.c.version == version
        with self._connected() as connection:
            rows = connection.execute(select(*columns).where(*of_version).order_by(STANDINGS.c.number))
            return [Standing(*row) for row in rows]

    def note_standing(self, model: str, version: str, standing: Standing) -> None:
        """Append what was decided about a version; of two in the same moment the second one's word is the last."""
        row: dict[str, str | int] = {"model": model, "version": version, "at": now(), **standing._asdict()}
        while True:
            row["number"] = len(self.standings(model, version)) + 1
            try:
                return self._insert(STANDINGS, row)
            except IntegrityError:
                continue  # another process has taken this number since we looked; ours comes after it

    def policy(self, model: str, version: str, source: str) -> str:
        """Return the digest of the policy that was registered as a version; empty if this ledger does not know it.

        Args:
            source: where the registry says that the weights lie. It tells a number that was given once more, after a
                model was deleted; weights that were never registered there must be the last ones that were.
        """
        notes = self._weights(model, version)
        return next((policy for place, policy in reversed(notes) if place == source), notes[-1][1] if notes else "")

    def note_registered(self, model: str, version: str, source: str, policy: str) -> None:
        """Note whose weights a version holds, unless the last note says the same."""
        while (source, policy) not in (notes := self._weights(model, version))[-1:]:
            row: dict[str, str | int] = {"model": model, "version": version, "number": len(notes) + 1}
            row |= {"source": source, "policy": policy, "at": now()}
            # where another process has taken this number since we looked, the loop looks again
            with suppress(IntegrityError):
                self._insert(WEIGHTS, row)

    def was_registered(self, model: str, policy: str) -> bool:
        """Return whether weights of a policy became a version of a model."""
        of_policy = WEIGHTS.c.model == model, WEIGHTS.c.policy == policy, WEIGHTS.c.version != ""
        with self._connected() as connection:
            return connection.scalar(select(WEIGHTS.c.version).where(*of_policy)) is not None

    def note_logged(self, model: str, source: str, policy: str) -> None:
        """Note where a policy's weights lie before they become a version.

        A tag in MLflow says so too, but everyone who may write to MLflow can edit it.
        """
        self.note_registered(model, "", source, policy)

    def logged_weights(self, model: str) -> dict[str, str]:
        """Return address → digest of the policies that were logged, to become versions of a model."""
        of_model = WEIGHTS.c.model == model
        with self._connected() as connection:
            # oldest first: where an address was noted twice, the last note stays in the dict
            rows = connection.execute(select(WEIGHTS.c.source, WEIGHTS.c.policy).where(of_model).order_by(WEIGHTS.c.at))
            return {row.source: row.policy for row in rows}

    def _weights(self, model: str, version: str) -> list[tuple[str, str]]:
        """Return (address, digest of the policy) of every note about a version, oldest first."""
        of_version = WEIGHTS.c.model == model, WEIGHTS.c.version == version
        with self._connected() as connection:
            rows = connection.execute(
                select(WEIGHTS.c.source, WEIGHTS.c.policy).where(*of_version).order_by(WEIGHTS.c.number)
            )
            return [(row.source, row.policy) for row in rows]

    def last_decision(self, model: str, digest: str) -> dict[str, str] | None:
        """Return when an attempt on the same data, recipe and base was decided (`at`), and how it ended (`outcome`)."""
        with self._connected() as connection:
            row = connection.execute(
                select(ATTEMPTS.c.outcome, ATTEMPTS.c.at).where(ATTEMPTS.c.model == model, ATTEMPTS.c.digest == digest)
            ).first()
        return {"outcome": row.outcome, "at": row.at} if row else None

    def note_attempt(self, model: str, digest: str, outcome: str) -> None:
        """Note that an attempt was decided; the first note stays."""
        with suppress(IntegrityError):
            self._insert(ATTEMPTS, {"model": model, "digest": digest, "outcome": outcome, "at": now()})

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
            if isinstance(error, IntegrityError):  # a number was taken: the methods above know what follows from that
                raise
            raise ledger_tables.unusable(self._engine.url.render_as_string(), error) from error

    def _insert(self, table: Table, row: Mapping[str, str | int]) -> None:
        with self._connected() as connection:
            connection.execute(insert(table).values(**row))


def now() -> str:
    """Return the time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _verdict(text: str) -> "Verdict":
    """Return the verdict that `decide` wrote as JSON."""
    # imported here: it loads scipy, which takes a second, and most commands read no verdict
    from models.gate.gate import Check, Verdict

    fields = json.loads(text)
    checks = tuple(Check(**check) for check in fields.pop("checks"))
    return Verdict(**fields | {"incidents": tuple(fields["incidents"]), "checks": checks})
