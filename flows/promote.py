"""Who serves: promote a version, roll back to the one before, repair what was left half done."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact
from prefect.runtime import flow_run

from models.gate.promotion_log import Entry
from models.markdown import markdown_table, plain
from tasks.registry import champion
from tasks.run import repair
from tasks.work.prefect_pages import flow
from tasks.work.runs_folder import root


def _named() -> str:
    given = flow_run.parameters
    return f"{given['model']} {given.get('version') or 'challenger'}"


@flow(name="promote", flow_run_name=_named)
def promote(model: str, version: str = "", who: str = "", why: str = "", force: bool = False) -> dict[str, Any]:
    """Make a version the champion; it must have passed the gate.

    Args:
        model: name in the model registry.
        version: number of the version; empty means the challenger.
        who: your name; goes to the promotion log, beside the worker's user.
        why: goes to the promotion log.
        force: promote also a version that did not pass the gate; the log says so.
    """
    return _told(
        root(), model, champion.promote(root(), model, version, why or "promoted by hand", force=force, who=who)
    )


@flow(name="rollback", flow_run_name="{model}")
def rollback(model: str, who: str = "", why: str = "") -> dict[str, Any]:
    """Bring back the champion that served before this one.

    Args:
        model: name in the model registry.
        who: your name; goes to the promotion log, beside the worker's user.
        why: goes to the promotion log.
    """
    return _told(root(), model, champion.rollback(root(), model, why or "rolled back by hand", who))


@flow(name="reconcile", flow_run_name="repairs")
def reconcile() -> list[str]:
    """Repair what a killed process left: aliases that the promotion log contradicts, runs that are not running."""
    done = repair(root())
    _page("\n".join(f"- {plain(said)}" for said in done) or "Nothing to repair.", key="reconciled")
    return done


def _told(where: Path, model: str, entry: Entry) -> dict[str, Any]:
    """Show the promotion log on the page of the run."""
    page = log_page(champion.log(where, model))
    _page(page, key="promotions", description=f"Promotion log of {plain(model)}")
    return {"model": model, "champion": entry.version_to, "before": entry.version_from, "number": entry.number}


def log_page(entries: Sequence[Entry]) -> str:
    """Return a promotion log as Markdown, the newest line first."""
    rows = [
        [str(e.number), e.at, e.action, f"{e.version_from or '–'} → {e.version_to or '–'}", e.who, e.why]
        for e in reversed(entries)
    ]
    return "\n".join(markdown_table([["", "when", "what", "version", "who", "why"], *rows]))


def _page(text: str, **told: str) -> None:
    with suppress(Exception):  # what was moved stays moved, whether a page can be told of it or not
        create_markdown_artifact(text, **told)
