"""Align again when there is something new; otherwise end in seconds."""

from prefect import State
from prefect.states import Completed

from flows.align import align
from models.markdown import unlinked
from models.recipe import Recipe
from tasks import leases, schedule
from tasks.leases import gives_lease_back
from tasks.outcomes import Outcome
from tasks.run import digest, last_decision, open_question
from tasks.work.prefect_pages import flow
from tasks.work.runs_folder import root


@gives_lease_back
@flow(name="retrain", flow_run_name="{recipe.name}")
def retrain(recipe: Recipe) -> State[Outcome]:
    """Align from the base if data, recipe or base changed since the last decided attempt, and ask the gate.

    A challenger that was rejected is not trained again. A run that comes late, when the next one is due already, ends
    as superseded instead of piling up.

    Args:
        recipe: every choice of the experiment.
    """
    leases.take(root(), recipe.name)
    newer = schedule.superseded()
    if newer:
        return Completed(name="Superseded", message=newer)
    before = last_decision(recipe)
    if before:
        return Completed(name="NothingNew", message=unlinked(f"nothing new since {before['at']}: {before['outcome']}"))
    question = open_question(recipe, digest(recipe))
    if question:
        return Completed(name="WaitsForApproval", message=question)
    # `align.fn` runs in this flow run: a flow run of its own could not pause this one, which would keep its slot.
    return align.fn(recipe)
