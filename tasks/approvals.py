"""A person agrees before a version becomes the champion, where the recipe asks for it: whether, how, and the answer."""

from uuid import uuid4

from prefect import pause_flow_run
from prefect.exceptions import FlowPauseTimeout
from prefect.runtime import flow_run

from models.gate.gate import Verdict
from models.gate.promotion_log import Registered
from models.recipe import Recipe
from tasks.access.temporary_server import lasting_server
from tasks.best_effort import best_effort
from tasks.decisions import Rivals, may_be_promoted
from tasks.registry import champion as registry
from tasks.registry.approval import Approval, question
from tasks.run import Run, question_is_open
from tasks.tracking.ledger import AGREED, REFUSED, Ledger
from tasks.work import terminal, workers

APPROVAL_TIMEOUT = 7 * 24 * 3600
"""Seconds that a run waits for a person."""
POLL_SECONDS = 2
"""Seconds between two looks at whether a person has answered; Prefect's default is 10."""


def needs_approval(run: Run[Recipe], registered: Registered, verdict: Verdict | None) -> bool:
    """Whether a person has to agree: the recipe says so, the gate let the version pass, and it never served yet."""
    if not (run.recipe.gate.approval and registered.version and may_be_promoted(run, verdict)):
        return False
    return registered.version not in (entry.version_to for entry in registry.log(run.root, registered.name))


def approve(
    run: Run[Recipe], registered: Registered, verdict: Verdict | None, rivals: Rivals | None
) -> Approval | None:
    """Wait on the flow run's page for a person, and return the answer, which is in the ledger already.

    None if another version serves since the test: a person need not read a comparison of the past, and `promote` finds
    it out. Without a Prefect server that stays, a person could not answer: the version then waits for `sacpo promote`.
    """
    version, ledger = registered.version, Ledger(run.root)
    if rivals is None or len(registry.log(run.root, registered.name)) != rivals.seen:
        return None
    last = ledger.standings(registered.name, version)[-1]
    # An earlier attempt died after it got this answer. It still counts: a new verdict would have come after it.
    if last.state in (AGREED, REFUSED):
        return _show_answer(run, registered, Approval(agreed=last.state == AGREED, by=last.who, why=last.why))
    ledger.note_standing(registered.name, version, last._replace(state="waits for approval", why=""))
    run.tracker.tag(registered.name, version, {"gate": "waits for approval"})
    by_hand = f"sacpo promote {registered.name} {version} --why …"
    if not lasting_server():
        terminal.say(f"waits for approval: {by_hand}")
        return Approval(agreed=False)
    terminal.say(f"{registered.name} version {version} waits for approval on the page of this run")
    answer = _answer(run, registered, verdict)
    if answer is None:
        terminal.say(f"nobody answered in {APPROVAL_TIMEOUT // 86400} days; it waits: {by_hand}")
        return Approval(agreed=False)
    # The ledger is told first: a death, or an MLflow that does not answer, then loses no refusal.
    ledger.note_standing(registered.name, version, last._replace(state=answer.state, who=answer.by, why=answer.why))
    return _show_answer(run, registered, answer)


def _answer(run: Run[Recipe], registered: Registered, verdict: Verdict | None) -> Approval | None:
    """Pause the flow run until a person answers; none if `APPROVAL_TIMEOUT` is over."""
    pages: list[tuple[str, str]] = []
    with best_effort("name the pages of MLflow in the question to a person"):
        pages = run.tracker.pages(registered)
    # The answer may take days, in which the workers would keep their memory and the GPU.
    workers.pause()
    form = Approval.with_initial_data(description=question(registered, verdict, pages))
    # Prefect asks once under each key. With a fixed one, the answer to an earlier question would stand for this one.
    key = f"approval-{uuid4()}"
    elsewhere = f"{run.recipe.name}: this run waits already for an approval; answer it at {flow_run.ui_url}"
    try:
        with question_is_open(run, elsewhere):
            return pause_flow_run(wait_for_input=form, timeout=APPROVAL_TIMEOUT, poll_interval=POLL_SECONDS, key=key)
    except FlowPauseTimeout:
        return None


def _show_answer(run: Run[Recipe], registered: Registered, answer: Approval) -> Approval:
    """Show a person's answer in the registry and in the terminal, and return it."""
    run.tracker.tag(registered.name, registered.version, {"gate": "pass" if answer.agreed else str(answer)})
    terminal.say(str(answer))
    return answer
