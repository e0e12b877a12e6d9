"""The tasks that tell: the report on disk, the pages of Prefect, the model card and the report in MLflow."""

import base64
from contextlib import suppress
from typing import Any, NamedTuple

from prefect import State
from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from models.artifacts import Noun
from models.errors import Undecided
from models.gate.gate import Choice, Verdict
from models.gate.promotion_log import Registered
from models.markdown import plain, unlinked
from models.metrics.candidate import Candidate
from models.recipe import GateMode, Recipe
from models.report import report, sentences, summary
from models.report.model_card import card
from models.report.tree import RegistryEntry, Report
from tasks.registry.champion import CHALLENGER, CHAMPION
from tasks.run import AnyRun, Run, close
from tasks.stages import Yardstick, calibrate, measure_tasks
from tasks.tracking.ledger import Ledger
from tasks.work.prefect_pages import task


class Findings(NamedTuple):
    """What a run has found."""

    candidates: list[Candidate]
    choice: Choice
    verdicts: list[Verdict]
    yardstick: Yardstick
    tested: Candidate | None = None


@task(cache_policy=NO_CACHE, task_run_name="report for the approval")
def show(run: Run[Recipe], found: Findings, registered: Registered) -> None:
    """Everything that `publish` tells, while a person still has to agree: nobody should answer unread."""
    _tell(run, found, registered, "Before the approval: ")


@task(cache_policy=NO_CACHE, task_run_name="report")
def publish(run: AnyRun, found: Findings, registered: Registered) -> dict[str, Any]:
    """The report and its tables; the table of candidates and the picture as Prefect artifacts; all of it in MLflow."""
    tree, made = _tell(run, found, registered)
    if registered.version:
        _link(run, registered)
    training, verdicts = isinstance(run.recipe, Recipe), found.verdicts
    served = registered.alias != CHALLENGER or not training
    proven = verdicts or not training  # who only asks for figures has them
    exit_code = 0 if served and proven and all(verdict.passes for verdict in verdicts) else Undecided.exit_code
    decision = sentences.decision(tree)
    told = close(run, made, exit_code, _state(registered, exit_code, training), decision)
    complete = (run.folder / "outcome.json").exists()  # else the next retraining sends what MLflow missed
    if (
        isinstance(run.recipe, Recipe)
        and complete
        and found.choice.decided
        and run.recipe.gate.mode is not GateMode.off
    ):
        Ledger(run.root).attempted(run.recipe.registered_name, run.digest, decision)
    return told


def ended(told: dict[str, Any]) -> State[dict[str, Any]]:
    """Return the state in which a flow ends that ran to its end: its name and message say what was decided."""
    return Completed(name=told["state"], message=unlinked(told["decision"]), data=told)


def _state(registered: Registered, exit_code: int, training: bool) -> str:
    """Name the end of a run, for the lists of Prefect and MLflow."""
    if registered.alias == CHAMPION:
        return "Promoted"
    if exit_code == 0:  # it only asked for figures, or a version of it served before
        return "Completed"
    return "NotPromoted" if training else "NotProven"


def _tell(run: AnyRun, found: Findings, registered: Registered, when: str = "") -> tuple[Report, list[Noun]]:
    """Write the report, the card and the artifacts; return the report, and what it is made of."""
    candidates, choice, verdicts, yardstick, tested = found
    calibration = calibrate(run, yardstick.sources)
    measured = measure_tasks(run, candidates, choice, yardstick.sources)
    registry: RegistryEntry | None = None
    if registered.version:
        registry = {"name": registered.name, "version": registered.version, "alias": registered.alias}
    findings = report.Findings(candidates, choice, verdicts, tested)
    tree = report.build(run.recipe, findings, yardstick.sources, calibration, measured, registry, run.seconds)
    run.folder.mkdir(parents=True, exist_ok=True)
    report.write(tree, findings, yardstick.pairs, run.folder)
    if registry:
        run.tracker.describe(registered, card(tree, registry), run.folder)
    text, picture = summary.markdown(tree), run.folder / "frontier.png"
    if picture.exists():
        address = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        with suppress(Exception):  # the report lies on disk, whoever cannot be told of it
            create_image_artifact(address, key="frontier", description=f"{when}Helpful against harmless")
        text = text.replace("![frontier](frontier.png)", f"![frontier]({address})")
    with suppress(Exception):
        create_markdown_artifact(text, key="candidates", description=f"{when}Candidates and decision")
    known = [*candidates, *([tested] if tested else [])]
    made = [
        yardstick.sources,
        yardstick.prompts,
        *([calibration] if calibration else []),
        *(noun for candidate in known for noun in candidate.nouns),
    ]
    return tree, [*made, *measured.values()]


def _link(run: AnyRun, registered: Registered) -> None:
    """Lead from the page of the flow run to MLflow, where there is a server to lead to."""
    with suppress(Exception):  # neither a server that died nor a page that cannot be told must fail what is registered
        for place, text in run.tracker.pages(registered):
            told = plain(text)
            create_link_artifact(place, link_text=told, description=told)  # a key would put a list of all runs between
