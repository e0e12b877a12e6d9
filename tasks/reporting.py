"""The tasks that tell: the report on disk, the pages of Prefect, the model card and the report in MLflow."""

import base64

from prefect import State
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from models.artifacts import Noun
from models.errors import Undecided
from models.gate.promotion_log import Registered
from models.markdown import plain, unlinked
from models.recipe import GateMode, Recipe
from models.report import report, sentences, summary
from models.report.model_card import card
from models.report.report import Findings
from models.report.tree import RegistryEntry
from tasks.best_effort import best_effort
from tasks.outcomes import Outcome, close
from tasks.registry.champion import CHALLENGER, CHAMPION
from tasks.run import AnyRun, Run
from tasks.stages import Yardstick, calibrate, measure_tasks
from tasks.tracking.ledger import Ledger
from tasks.work.prefect_pages import task


@task(cache_policy=NO_CACHE, task_run_name="report for the approval")
def show(run: Run[Recipe], findings: Findings, yardstick: Yardstick, registered: Registered) -> None:
    """The report and all that `publish` shows, before a person is asked: they can read it and then answer."""
    _write_and_show(run, findings, yardstick, registered, "Before the approval: ")


@task(cache_policy=NO_CACHE, task_run_name="report")
def publish(run: AnyRun, findings: Findings, yardstick: Yardstick, registered: Registered) -> Outcome:
    """The report and its tables; the table of candidates and the picture as Prefect artifacts; all of it in MLflow."""
    decision, nouns = _write_and_show(run, findings, yardstick, registered)
    if registered.version:
        _link_mlflow(run, registered)
    training, verdicts = isinstance(run.recipe, Recipe), findings.verdicts
    served = registered.alias != CHALLENGER or not training
    proven = verdicts or not training  # an evaluation that tests nothing was asked for figures only
    exit_code = 0 if served and proven and all(verdict.passes for verdict in verdicts) else Undecided.exit_code
    outcome = close(run, nouns, exit_code, _state(registered, exit_code, training), decision)
    # Only what MLflow has taken whole counts as decided: else `retrain` would end at once, and never send the rest.
    complete = (run.folder / "outcome.json").exists()
    if (
        isinstance(run.recipe, Recipe)
        and complete
        and findings.choice.decided
        and run.recipe.gate.mode is not GateMode.off
    ):
        Ledger(run.root).note_attempt(run.recipe.registered_name, run.digest, decision)
    return outcome


def state_of(outcome: Outcome) -> State[Outcome]:
    """Return the state in which a flow ends that ran to its end: its name and message say what was decided."""
    return Completed(name=outcome["state"], message=unlinked(outcome["decision"]), data=outcome)


def _state(registered: Registered, exit_code: int, training: bool) -> str:
    """Name the end of a run, for the lists of Prefect and MLflow."""
    if registered.alias == CHAMPION:
        return "Promoted"
    if exit_code == 0:  # an evaluation failed no test, or the version is a former champion
        return "Completed"
    return "NotPromoted" if training else "NotProven"


def _write_and_show(
    run: AnyRun, findings: Findings, yardstick: Yardstick, registered: Registered, when: str = ""
) -> tuple[str, list[Noun]]:
    """Write the report, the card and the artifacts; return the decision in sentences, and what the report rests on."""
    calibration = calibrate(run, yardstick.sources)
    measured = measure_tasks(run, findings.candidates, findings.choice, yardstick.sources)
    registry: RegistryEntry | None = None
    if registered.version:
        registry = {"name": registered.name, "version": registered.version, "alias": registered.alias}
    tree = report.build(run.recipe, findings, yardstick.sources, calibration, measured, registry, run.seconds)
    run.folder.mkdir(parents=True, exist_ok=True)
    report.write(tree, findings, yardstick.pairs, run.folder)
    if registry:
        run.tracker.describe(registered, card(tree, registry), run.folder)
    text, picture = summary.markdown(tree), run.folder / "frontier.png"
    if picture.exists():
        # Prefect's pages cannot read a file of ours, so the address holds the picture itself.
        address = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        with best_effort("show the picture of the frontier in Prefect"):
            create_image_artifact(address, key="frontier", description=f"{when}Helpful against harmless")
        text = text.replace("![frontier](frontier.png)", f"![frontier]({address})")
    with best_effort("show the table of candidates in Prefect"):
        create_markdown_artifact(text, key="candidates", description=f"{when}Candidates and decision")
    examined = [*findings.candidates, *([findings.tested] if findings.tested else [])]
    nouns = [yardstick.sources, yardstick.prompts, *([calibration] if calibration else []), *measured.values()]
    return sentences.decision(tree), [*nouns, *(noun for candidate in examined for noun in candidate.nouns)]


def _link_mlflow(run: AnyRun, registered: Registered) -> None:
    """Lead from the page of the flow run to MLflow, where there is a server to lead to."""
    with best_effort("link the pages of MLflow in Prefect"):
        for place, text in run.tracker.pages(registered):
            label = plain(text)
            # With a key, the page of the run would lead to a list of all runs first, and only from there to MLflow.
            create_link_artifact(place, link_text=label, description=label)
