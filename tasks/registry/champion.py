"""Which version serves. The promotion log (ledger.py) decides; the aliases in MLflow follow from it.

Aliases in MLflow are last-write-wins: two writers can leave any of their values. The log cannot: a number is taken
once. So every process that has appended a line, and `reconcile` at any time, moves the aliases to where the log says
they belong.
"""

import getpass
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from models.errors import BadInput, BadPlace, Stale
from models.gate.promotion_log import Entry, line_of_champions, rolled_back
from tasks.registry import events, model_registry
from tasks.tracking.connection import client, error_code, failures, shown_uri
from tasks.tracking.ledger import Ledger, now

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
LEDGER = "sacpo.ledger"
"""Tag of a registered model: the ledger that its aliases follow."""
MOST_MODELS = 1000
"""Registered models that are looked at; MLflow gives no more at once."""


class Serving(NamedTuple):
    """What serves under the name of a registered model."""

    version: str
    previous: str
    """The version that served before, which a rollback brings back; empty if there is none."""
    tags: dict[str, str]
    description: str
    """The model card, as Markdown."""
    run: str
    """Id of the MLflow run that registered it; empty for a version that was not made here."""
    aliases: dict[str, str]
    """Alias → version, as MLflow has them now."""
    log: list[Entry]
    """The promotion log, oldest first."""


def log(root: Path, model: str) -> list[Entry]:
    """Return the promotion log, oldest first; an alias that is older than the log becomes its first line.

    Raises:
        BadPlace: MLflow or the database does not answer.
    """
    ledger = Ledger(root)
    entries = ledger.promotions(model)
    if entries:
        return entries
    aliases = model_registry.aliases(root, model)
    if aliases:
        claim_aliases(root, model)
    older = [alias for alias in (PREVIOUS, CHAMPION) if alias in aliases]
    adopted = [
        _entry(
            number,
            "adopt",
            aliases.get(PREVIOUS, "") if alias == CHAMPION else "",
            aliases[alias],
            "set before the log",
        )
        for number, alias in enumerate(older, start=1)
    ]
    if adopted:
        with suppress(Stale):  # another process has just noted the same
            # both or neither: with the first alone the log would say that the previous champion serves
            ledger.promote(model, *adopted)
    return ledger.promotions(model)


def claim_aliases(root: Path, model: str) -> None:
    """Let this ledger be the one that moves the aliases of a model; the first one to ask is.

    Raises:
        BadPlace: another one is: two would move them to and fro, and neither would know of the other's decisions. Or
            the model is new, every other model of this server follows another ledger than ours, and no ledger was
            chosen (`SACPO_DATABASE`): what a team's decisions have spent of its prompts stands in the other one.
    """
    mlflow, identity = client(root), Ledger(root).identity()
    try:
        owner = mlflow.get_registered_model(model).tags.get(LEDGER, "")
        if not owner:
            with suppress(*failures()):  # MLflow refuses one of two processes that set a tag for the first time
                mlflow.set_registered_model_tag(model, LEDGER, identity)
            owner = mlflow.get_registered_model(model).tags.get(LEDGER, "")
    except failures() as error:
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return _refuse_foreign_server(root, model, identity)
        raise model_registry.no_answer(root, error) from error
    if owner != identity:
        raise BadPlace(
            f"{model}: its promotions are written down in another database than ours; set SACPO_DATABASE to that one, "
            f"as `sacpo up` prints it (or take the tag {LEDGER} from the registered model, if that database is lost)"
        )


def _refuse_foreign_server(root: Path, model: str, identity: str) -> None:
    """Refuse a ledger that was not chosen, for a new model on a server whose models all follow other ledgers."""
    if os.environ.get("SACPO_DATABASE"):
        return
    try:
        models = client(root).search_registered_models(max_results=MOST_MODELS)
    except failures() as error:
        raise model_registry.no_answer(root, error) from error
    owners = {registered.tags[LEDGER]: registered.name for registered in models if LEDGER in registered.tags}
    if owners and identity not in owners:
        raise BadPlace(
            f"{model}: MLflow at {shown_uri(root)} has models (as {min(owners.values())}) whose decisions are written "
            "down in another database than ours; set SACPO_DATABASE to that one, as `sacpo up` prints it, or, if this "
            "model has nothing to do with those, to one of its own (sqlite:////a/path/operations.db)"
        )


def promote(
    root: Path, model: str, version: str, why: str, seen: int | None = None, force: bool = False, who: str = ""
) -> Entry:
    """Make a version the champion, and return the line that the log has of it.

    Args:
        version: number, or empty for the challenger.
        seen: how many lines the log had when the decision was taken; none means now.
        force: also a version that did not pass the gate.
        who: the person who decided, where that is not the user of this process.

    Raises:
        BadInput: no such version, it serves already, it did not pass the gate, a person refused it, or the ledger does
            not know it. What the registry's tags say of it counts for nothing: everybody can edit them.
        BadPlace: MLflow or the database does not answer, or the model follows another ledger.
        Stale: somebody else moved the champion since `seen`, or a backup of the log was put back.
    """
    entries = log(root, model)
    version = version or challenger(root, model)
    if not version:
        raise BadInput(f"{model} has no challenger; say which version to promote")
    if not version.isdecimal():
        raise BadInput(f"{model} version {version!r}: give the number of a version")
    registered = model_registry.version(root, model, version)
    version = registered.number
    line = line_of_champions(entries)
    if line[-1:] == [version]:
        raise BadInput(f"{model} version {version} is the champion already")
    if not force:
        _refuse_unfit(root, model, registered)
    if seen is not None and seen != len(entries):
        what = "a backup was put back"  # true where the log is shorter than it was
        if seen < len(entries):
            what = f"entry {entries[seen].number} of the promotion log is taken"
        raise Stale(
            f"{model}: somebody else moved the champion meanwhile ({what}); look at `sacpo champion` and decide again"
        )
    old = line[-1] if line else ""
    entry = _entry(_next_number(entries), "promote", old, version, why + (" (forced)" if force else ""), who)
    return _append_and_move_aliases(root, model, entry)


def _refuse_unfit(root: Path, model: str, version: model_registry.Version) -> None:
    """Refuse a version of which the ledger does not say that it may serve."""
    standings = Ledger(root).standings(model, version.number)
    anyway = "to promote it all the same: --force"
    # another source means another version: MLflow gives a number once more after a model was deleted
    if not standings or standings[-1].source != version.source:
        raise BadInput(
            f"{model} version {version.number} is not known to our ledger: it was registered by hand, or by a run with "
            f"another SACPO_DATABASE; set that one, as `sacpo up` prints it; {anyway}"
        )
    if not standings[-1].may_serve:
        raise BadInput(f"{model} version {version.number} did not pass the gate ({standings[-1]}); {anyway}")


def source(root: Path, model: str, version: str) -> str:
    """Return where a version's weights lie; unlike its tags this cannot be edited.

    Raises:
        BadInput: there is no such version.
    """
    return model_registry.version(root, model, version).source


def challenge(root: Path, model: str, version: str) -> None:
    """Point the alias `challenger` to a version, unless it serves or once served.

    Raises:
        BadPlace: MLflow does not take it.
    """
    if version in (entry.version_to for entry in log(root, model)):
        return
    refusal = model_registry.set_alias(root, model, CHALLENGER, version)
    # a refusal counts only if the alias is elsewhere: another process may have set it to the same version
    if refusal and challenger(root, model) != version:
        raise BadPlace(f"{model}: MLflow at {shown_uri(root)} did not take the alias {CHALLENGER} ({refusal})")


def withdraw(root: Path, model: str, version: str) -> None:
    """Take the alias `challenger` from a version; where MLflow keeps it, the ledger still lets nothing be promoted."""
    if challenger(root, model) == version:
        model_registry.set_alias(root, model, CHALLENGER, "")


def rollback(root: Path, model: str, why: str, who: str = "") -> Entry:
    """Bring back the champion before this one; `who` is the person who decided, where that is not our user.

    Raises:
        BadInput: there is no earlier champion, or the registry has lost it.
        Stale: somebody else moved the champion in the same moment.
    """
    entries = log(root, model)
    try:
        champion, before = rolled_back(entries)
    except BadInput as error:
        raise BadInput(f"{model}: {error}") from error
    model_registry.version(root, model, before)  # raises where it was deleted: an alias cannot point to it
    return _append_and_move_aliases(root, model, _entry(_next_number(entries), "rollback", champion, before, why, who))


def move_aliases(root: Path, model: str) -> list[str]:
    """Move the aliases to where the log says they belong; return a sentence per alias that was elsewhere.

    Raises:
        BadPlace: MLflow does not answer, or the aliases do not stay where they are put.
    """
    moves: list[str] = []
    refusal = ""
    claim_aliases(root, model)
    for attempt in range(10):
        line = line_of_champions(log(root, model))
        expected = dict(zip((CHAMPION, PREVIOUS), reversed(line), strict=False))
        actual = model_registry.aliases(root, model)
        wrong = {
            alias: expected.get(alias, "")
            for alias in (CHAMPION, PREVIOUS)
            if actual.get(alias, "") != expected.get(alias, "")
        }
        if line and actual.get(CHALLENGER) == line[-1]:
            wrong[CHALLENGER] = ""  # the champion is no challenger any more
        if not wrong:
            return moves
        for alias, version in wrong.items():
            moves.append(f"{model}: {alias} {actual.get(alias) or 'nowhere'} → {version or 'nowhere'}")
            refusal = model_registry.set_alias(root, model, alias, version) or refusal
        # look again, each time a little later: a process that read an older log may set the aliases after us
        time.sleep(0.05 * attempt)
    why = f"MLflow at {shown_uri(root)} says: {refusal}" if refusal else "they do not stay where they are put"
    raise BadPlace(f"{model}: its aliases cannot follow the promotion log: {why}; try `sacpo reconcile` later")


def reconcile(root: Path) -> list[str]:
    """Repair the aliases of every model with a promotion log; return a sentence per repair, or per one that failed."""
    sentences: list[str] = []
    for model in Ledger(root).models():
        try:
            sentences += move_aliases(root, model)
        except BadInput as error:  # the other models are repaired all the same
            sentences.append(f"not repaired: {error}")
    return sentences


def serving(root: Path, model: str) -> Serving:
    """Return what serves.

    Raises:
        BadInput: nothing serves under this name.
    """
    entries = log(root, model)
    line = line_of_champions(entries)
    if not line:
        raise BadInput(f"{model} has no champion; `sacpo run` registers one when it passes the gate")
    version = model_registry.version(root, model, line[-1])
    return Serving(
        version=line[-1],
        previous=line[-2] if len(line) > 1 else "",
        tags=version.tags,
        description=version.description,
        run=version.tags.get("sacpo.run_id", ""),
        aliases=model_registry.aliases(root, model),
        log=entries,
    )


def policy(root: Path, model: str, version: str) -> str:
    """Return the digest of a version's policy; empty for one that was not made here.

    The ledger's word counts; the tag in MLflow, which everybody can edit, only for a version that it does not know.

    Raises:
        BadInput: there is no such version.
    """
    registered = model_registry.version(root, model, version)
    return Ledger(root).policy(model, version, registered.source) or registered.tags.get("sacpo.policy", "")


def challenger(root: Path, model: str) -> str:
    """Return the version that waits for a decision, or an empty string."""
    return model_registry.aliases(root, model).get(CHALLENGER, "")


def _append_and_move_aliases(root: Path, model: str, entry: Entry) -> Entry:
    """Append to the log, let the aliases follow, and emit an event."""
    claim_aliases(root, model)
    Ledger(root).promote(model, entry)
    try:
        move_aliases(root, model)
    finally:
        # also where MLflow has died meanwhile: the log has the line, and the aliases follow with the next command
        events.champion_changed(model, entry)
    return entry


def _next_number(entries: list[Entry]) -> int:
    """Return the number after the last one; not their count: a backup that was put back may lack some in between."""
    return 1 + (entries[-1].number if entries else 0)


def _entry(number: int, action: str, old: str, new: str, why: str, who: str = "") -> Entry:
    """Return a line of the promotion log, with the time and the user of this process."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        user = str(os.getuid())
    place = f"{user}@{socket.gethostname()}"[:100]
    # 90 and 100 characters, a space and two parentheses fit into the 200 characters of the column
    return Entry(number, action, old, new, f"{who[:90]} ({place})" if who else place, now(), why)
