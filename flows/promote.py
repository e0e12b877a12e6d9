"""Which version serves: promote one, roll back to the one before, repair what a killed process left half done."""

from collections.abc import Sequence

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run
from typing_extensions import TypedDict

from models.gate.promotion_log import Entry
from models.markdown import markdown_table, plain
from tasks.best_effort import best_effort
from tasks.registry import champion
from tasks.run import repair
from tasks.work.prefect_pages import flow
from tasks.work.runs_folder import root


class Moved(TypedDict):
    """What a flow that moves the champion returns."""

    model: str
    champion: str
    """The version that serves from now on."""
    before: str
    """The version that served before; empty if none did."""
    number: int
    """Of the line in the promotion log."""


def _run_name() -> str:
    parameters = flow_run.parameters
    return f"{parameters['model']} {parameters.get('version') or 'challenger'}"


@flow(name="promote", flow_run_name=_run_name)
def promote(model: str, version: str = "", who: str = "", why: str = "", force: bool = False) -> Moved:
    """Make a version the champion; it must have passed the gate.

    Args:
        model: name in the model registry.
        version: number of the version; empty means the challenger.
        who: your name; goes to the promotion log, beside the worker's user.
        why: goes to the promotion log.
        force: promote also a version that did not pass the gate; the log says so.
    """
    entry = champion.promote(root(), model, version, why or "promoted by hand", force=force, who=who)
    return _show(model, entry)


@flow(name="rollback", flow_run_name="{model}")
def rollback(model: str, who: str = "", why: str = "") -> Moved:
    """Bring back the champion that served before this one.

    Args:
        model: name in the model registry.
        who: your name; goes to the promotion log, beside the worker's user.
        why: goes to the promotion log.
    """
    return _show(model, champion.rollback(root(), model, why or "rolled back by hand", who))


@flow(name="reconcile", flow_run_name="repairs")
def reconcile() -> list[str]:
    """Repair what a killed process left: aliases that the promotion log contradicts, runs that are not running."""
    sentences = repair(root())
    with best_effort("show the repairs in Prefect"):
        text = "\n".join(f"- {plain(sentence)}" for sentence in sentences) or "Nothing to repair."
        create_markdown_artifact(text, key="reconciled")
    return sentences


def _show(model: str, entry: Entry) -> Moved:
    """Show the promotion log on the page of the run, and return what its new line says."""
    text = log_page(champion.log(root(), model))
    with best_effort("show the promotion log in Prefect"):
        create_markdown_artifact(text, key="promotions", description=f"Promotion log of {plain(model)}")
    return {"model": model, "champion": entry.version_to, "before": entry.version_from, "number": entry.number}


def log_page(entries: Sequence[Entry]) -> str:
    """Return a promotion log as Markdown, the newest line first."""
    rows = [
        [str(e.number), e.at, e.action, f"{e.version_from or '–'} → {e.version_to or '–'}", e.who, e.why]
        for e in reversed(entries)
    ]
    return "\n".join(markdown_table([["", "when", "what", "version", "who", "why"], *rows]))
