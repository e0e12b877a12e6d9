"""Which version serves. The promotion log (ledger.py) decides; the aliases in MLflow follow from it.

Aliases in MLflow are last-write-wins: two writers can leave any of their values. The log cannot: a number is taken
once. So whoever appended a line, and `reconcile` at any time, moves the aliases to where the log says they belong.
"""

import getpass
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.errors import BadInput, BadPlace, Stale
from models.gate.promotion_log import Entry, line_of_champions, rolled_back
from models.words import first_line
from tasks.registry import events
from tasks.tracking.ledger import Ledger, now
from tasks.tracking.tracker import client, failures, shown

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
LEDGER = "sacpo.ledger"
"""Tag of a registered model: the ledger that its aliases follow."""
MOST = 1000
"""Registered models that are looked at; MLflow gives no more at once."""


def log(root: Path, model: str) -> list[Entry]:
    """Return the promotion log; an alias that is older than the log becomes its first line.

    Raises:
        BadPlace: MLflow or the database does not answer.
    """
    ledger = Ledger(root)
    told = ledger.promotions(model)
    if told:
        return told
    before = _aliases(root, model)
    if before:
        claim(root, model)
    adopted = [
        _entry(
            number, "adopt", before.get(PREVIOUS, "") if alias == CHAMPION else "", before[alias], "set before the log"
        )
        for number, alias in enumerate([alias for alias in (PREVIOUS, CHAMPION) if alias in before], start=1)
    ]
    if adopted:
        with suppress(Stale):  # another process has just noted the same
            ledger.promote(model, *adopted)  # both or neither: with one of them the log would say that it serves
    return ledger.promotions(model)


def claim(root: Path, model: str) -> None:
    """Let this ledger be the one that moves the aliases of a model; the first one to ask is.

    Raises:
        BadPlace: another one is: two would move them to and fro, and neither would know of the other's decisions. Or
            the model is new, and every other one of this server follows another ledger than ours, which is nobody's
            choice: what a team's decisions have spent of its prompts stands in there.
    """
    mlflow, mine = client(root), Ledger(root).identity()
    try:
        theirs = mlflow.get_registered_model(model).tags.get(LEDGER, "")
        if not theirs:
            with suppress(*failures()):  # of two in the same moment MLflow refuses one
                mlflow.set_registered_model_tag(model, LEDGER, mine)
            theirs = mlflow.get_registered_model(model).tags.get(LEDGER, "")
    except failures() as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return _no_stranger(root, model, mine)
        raise _silent(root, error) from error
    if theirs != mine:
        raise BadPlace(
            f"{model}: its promotions are written down in another database than ours; set SACPO_DATABASE to that one, "
            f"as `sacpo up` prints it (or take the tag {LEDGER} from the registered model, if that database is lost)"
        )


def _no_stranger(root: Path, model: str, mine: str) -> None:
    """Refuse a ledger that nobody chose on a server whose models all follow other ones."""
    if os.environ.get("SACPO_DATABASE"):
        return
    try:
        held = client(root).search_registered_models(max_results=MOST)
    except failures() as error:
        raise _silent(root, error) from error
    theirs = {found.tags[LEDGER]: found.name for found in held if LEDGER in found.tags}
    if theirs and mine not in theirs:
        raise BadPlace(
            f"{model}: MLflow at {shown(root)} has models (as {min(theirs.values())}) whose decisions are written down "
            "in another database than ours; set SACPO_DATABASE to that one, as `sacpo up` prints it, or, if this model "
            "has nothing to do with those, to one of its own (sqlite:////a/path/operations.db)"
        )


def promote(
    root: Path, model: str, version: str, why: str, seen: int | None = None, force: bool = False, who: str = ""
) -> Entry:
    """Make a version the champion.

    Args:
        version: number, or empty for the challenger.
        seen: how many lines the log had when the decision was taken; none means now.
        force: also a version that did not pass the gate.
        who: the person who decided, where that is not the user of this process.

    Raises:
        BadInput: no such version, it serves already, it did not pass the gate, a person refused it, or the ledger does
            not know it. What the registry's tags say of it counts for nothing: everybody can edit them.
        Stale: somebody else moved the champion since `seen`, or a backup of the log was put back.
    """
    told = log(root, model)
    version = version or challenger(root, model)
    if not version:
        raise BadInput(f"{model} has no challenger; say which version to promote")
    if not version.isdecimal():
        raise BadInput(f"{model} version {version!r}: give the number of a version")
    held = _version(root, model, version)
    version, lies = str(held.version), str(held.source)  # MLflow finds 2 under 02, too
    line = line_of_champions(told)
    if line[-1:] == [version]:
        raise BadInput(f"{model} version {version} is the champion already")
    if not force:
        _may_serve(root, model, version, lies)
    if seen is not None and seen != len(told):
        taken = "a backup was put back"
        if seen < len(told):
            taken = f"entry {told[seen].number} of the promotion log is taken"
        raise Stale(
            f"{model}: somebody else moved the champion meanwhile ({taken}); look at `sacpo champion` and decide again"
        )
    old = line[-1] if line else ""
    entry = _entry(_next(told), "promote", old, version, why + (" (forced)" if force else ""), who)
    return _moved(root, model, entry)


def _may_serve(root: Path, model: str, version: str, lies: str) -> None:
    """Refuse a version of which the ledger does not say that it may serve."""
    standings = Ledger(root).standings(model, version)
    anyway = "to promote it all the same: --force"
    if not standings or standings[-1].source != lies:
        raise BadInput(
            f"{model} version {version} is not known to our ledger: it was registered by hand, or by a run with "
            f"another SACPO_DATABASE; set that one, as `sacpo up` prints it; {anyway}"
        )
    if not standings[-1].may_serve:
        raise BadInput(f"{model} version {version} did not pass the gate ({standings[-1]}); {anyway}")


def source(root: Path, model: str, version: str) -> str:
    """Return where a version's weights lie; unlike its tags nobody can edit it."""
    return str(_version(root, model, version).source)


def challenge(root: Path, model: str, version: str) -> None:
    """Point the alias `challenger` to a version, unless it serves or once served.

    Raises:
        BadPlace: MLflow does not take it.
    """
    if version in (entry.version_to for entry in log(root, model)):
        return
    refused = _point(root, model, CHALLENGER, version)
    if refused and challenger(root, model) != version:
        raise BadPlace(f"{model}: MLflow at {shown(root)} did not take the alias {CHALLENGER} ({refused})")


def withdraw(root: Path, model: str, version: str) -> None:
    """Take the alias `challenger` from a version; an alias that MLflow keeps promotes nothing."""
    if challenger(root, model) == version:
        _point(root, model, CHALLENGER, "")


def rollback(root: Path, model: str, why: str, who: str = "") -> Entry:
    """Bring back the champion before this one; `who` is the person who decided, where that is not our user.

    Raises:
        BadInput: there is no earlier champion.
        Stale: somebody else moved the champion in the same moment.
    """
    told = log(root, model)
    try:
        serves, before = rolled_back(told)
    except BadInput as error:
        raise BadInput(f"{model}: {error}") from error
    _version(root, model, before)  # it must still be there
    return _moved(root, model, _entry(_next(told), "rollback", serves, before, why, who))


def follow(root: Path, model: str) -> list[str]:
    """Move the aliases to where the log says they belong; return a sentence per alias that was elsewhere.

    Raises:
        BadPlace: MLflow does not answer, or the aliases do not stay where they are put.
    """
    moved: list[str] = []
    refused = ""
    claim(root, model)
    for attempt in range(10):
        line = line_of_champions(log(root, model))
        wanted = dict(zip((CHAMPION, PREVIOUS), reversed(line), strict=False))
        there = _aliases(root, model)
        wrong = {a: wanted.get(a, "") for a in (CHAMPION, PREVIOUS) if there.get(a, "") != wanted.get(a, "")}
        if line and there.get(CHALLENGER) == line[-1]:
            wrong[CHALLENGER] = ""  # it has won
        if not wrong:
            return moved
        for alias, version in wrong.items():
            moved.append(f"{model}: {alias} {there.get(alias) or 'nowhere'} → {version or 'nowhere'}")
            refused = _point(root, model, alias, version) or refused
        time.sleep(0.05 * attempt)  # another writer may have read an older log
    why = f"MLflow at {shown(root)} says: {refused}" if refused else "they do not stay where they are put"
    raise BadPlace(f"{model}: its aliases cannot follow the promotion log: {why}; try `sacpo reconcile` later")


def reconcile(root: Path) -> list[str]:
    """Repair the aliases of every model with a promotion log; return a sentence per repair, or per one that failed."""
    told: list[str] = []
    for model in Ledger(root).models():
        try:
            told += follow(root, model)
        except BadInput as error:  # the other models are repaired all the same
            told.append(f"not repaired: {error}")
    return told


def serving(root: Path, model: str) -> dict[str, Any]:
    """Return what serves: version, the one before it, tags, description, aliases and the log.

    Raises:
        BadInput: nothing serves under this name.
    """
    told = log(root, model)
    line = line_of_champions(told)
    if not line:
        raise BadInput(f"{model} has no champion; `sacpo run` registers one when it passes the gate")
    version = _version(root, model, line[-1])
    return {
        "version": line[-1],
        "tags": dict(version.tags),
        "description": version.description or "",
        "run": version.tags.get("sacpo.run_id", ""),
        "aliases": _aliases(root, model),
        "previous": line[-2] if len(line) > 1 else "",
        "log": told,
    }


def policy(root: Path, model: str, version: str) -> str:
    """Return the digest of a version's policy; empty for one that was not made here.

    The ledger's word counts; the tag in MLflow, which everybody can edit, only for a version that it does not know.
    """
    held = _version(root, model, version)
    return Ledger(root).policy(model, version, str(held.source)) or str(held.tags.get("sacpo.policy", ""))


def challenger(root: Path, model: str) -> str:
    """Return the version that waits for a decision, or an empty string."""
    return _aliases(root, model).get(CHALLENGER, "")


def _moved(root: Path, model: str, entry: Entry) -> Entry:
    """Append to the log, let the aliases follow, and tell who listens, also where MLflow has died meanwhile."""
    claim(root, model)
    Ledger(root).promote(model, entry)
    try:
        follow(root, model)
    finally:
        events.champion(model, entry)
    return entry


def _version(root: Path, model: str, version: str) -> Any:
    try:
        return client(root).get_model_version(model, version)
    except failures() as error:
        if getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            why = f"MLflow at {shown(root)} does not know it ({first_line(error)})"
            raise BadInput(f"{model} version {version}: {why}") from error
        raise _silent(root, error) from error


def _aliases(root: Path, model: str) -> dict[str, str]:
    """Return alias → version; empty for a model that does not exist yet."""
    try:
        return {alias: str(version) for alias, version in client(root).get_registered_model(model).aliases.items()}
    except failures() as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise _silent(root, error) from error


def _point(root: Path, model: str, alias: str, version: str) -> str:
    """Set or take away one alias, and return what MLflow said against it.

    Of two who set it for the first time MLflow refuses one, which then looks again.
    """
    mlflow = client(root)
    try:
        if version:
            mlflow.set_registered_model_alias(model, alias, version)
        else:
            mlflow.delete_registered_model_alias(model, alias)
    except failures() as error:
        return first_line(error)
    return ""


def _silent(root: Path, error: Exception) -> BadPlace:
    return BadPlace(f"MLflow at {shown(root)} does not answer ({first_line(error)}); start it")


def _next(told: list[Entry]) -> int:
    """Return the number after the last one; not their count: a backup that was put back may lack some in between."""
    return 1 + (told[-1].number if told else 0)


def _entry(number: int, action: str, old: str, new: str, why: str, who: str = "") -> Entry:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    place = f"{user}@{socket.gethostname()}"[:100]
    return Entry(number, action, old, new, f"{who[:90]} ({place})" if who else place, now(), why)  # a column of 200
