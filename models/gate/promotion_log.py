"""What the promotion log means: which version serves, and which one a rollback brings back.

The log is append-only and numbered without a gap. `promote` puts a version on top, `rollback` takes the top away,
`adopt` notes what an alias pointed to before there was a log. The aliases of the registry follow from it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from models.errors import BadInput


class Registered(NamedTuple):
    """A model version, or three empty strings."""

    name: str
    version: str
    alias: str


NOT_REGISTERED = Registered("", "", "")


@dataclass(frozen=True)
class Entry:
    """One line of the promotion log of one registered model."""

    number: int
    """1, 2, 3 …: who writes states the number that follows the one they saw."""
    action: str
    """`adopt`, `promote` or `rollback`."""
    version_from: str
    """The version that served before; empty if none did."""
    version_to: str
    """The version that serves from now on; empty if none does."""
    who: str
    at: str
    """UTC, ISO 8601."""
    why: str


def line_of_champions(log: Iterable[Entry]) -> list[str]:
    """Return the versions from the oldest to the one that serves; a rollback has taken the later ones away."""
    line: list[str] = []
    for entry in log:
        if entry.action == "rollback":
            line.pop()  # not an append of the version before: a second rollback must go one further back
        else:
            line.append(entry.version_to)
    return line


def rolled_back(log: Iterable[Entry]) -> tuple[str, str]:
    """Return (version that serves, version that a rollback brings back).

    Raises:
        BadInput: there is no earlier champion.
    """
    line = line_of_champions(log)
    if len(line) < 2:
        serves = f"version {line[-1]} is the first champion" if line else "nothing serves"
        raise BadInput(f"{serves}, so there is nothing to roll back to; promote another version instead")
    return line[-1], line[-2]
