"""No address in an error or a decision can be clicked on Prefect's pages: states and logs of flow and task runs."""

import ast
import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from models.markdown import JOINER, unlinked
from tasks import reporting
from tasks.work import prefect_pages

ROOT = Path(__file__).parent.parent
AWAY = "http://192.0.2.1/x"
HOSTILE = f"24 of 24 failed: BadRequestError: see {AWAY}, https://example.org, www.example.org or a@example.org"
LINKS = ("://1", "://e", "www.", "a@e")


def test_an_address_is_broken_once() -> None:
    assert not [link for link in LINKS if link in unlinked(HOSTILE)]
    assert unlinked(HOSTILE).replace(JOINER, "") == HOSTILE and unlinked(unlinked(HOSTILE)) == unlinked(HOSTILE)


def states(error: Exception) -> list[Any]:
    """What a flow run and a task run that end with an error tell Prefect."""
    from prefect import flow_engine, task_engine

    return [
        asyncio.run(flow_engine.exception_to_failed_state(error, message="Flow run encountered an exception:")),
        asyncio.run(flow_engine.exception_to_crashed_state(error)),
        task_engine.exception_to_failed_state_sync(error, message="Task run encountered an exception"),
        task_engine.exception_to_crashed_state_sync(error),
    ]


def test_the_state_of_a_failed_run_links_nowhere() -> None:
    for state in states(ValueError(HOSTILE)):
        assert "24 of 24 failed" in state.message and not [link for link in LINKS if link in state.message]


def test_the_log_of_a_failed_run_links_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.logging import handlers

    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(handlers, "emit_api_log", sent.append)
    logger = logging.Logger("prefect.flow_runs")
    logger.addHandler(handlers.APILogHandler())
    extra = {"flow_run_id": "0188f0f4-6d8b-7a4e-9d3f-0f0f0f0f0f0f"}
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("Encountered exception during execution: %r", ValueError(HOSTILE), extra=extra)
    (log,) = sent
    assert "Traceback" in log["message"] and not [link for link in LINKS if link in log["message"]]


def test_the_state_of_a_finished_run_links_nowhere() -> None:
    message = reporting.state_of({"state": "NotPromoted", "decision": HOSTILE}).message
    assert message == unlinked(HOSTILE)


@pytest.mark.parametrize("storey", ["flows", "tasks"])
def test_flows_and_tasks_are_those_whose_pages_link_nowhere(storey: str) -> None:
    for path in (ROOT / storey).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.ImportFrom)
                and node.module == "prefect"
                and path != Path(str(prefect_pages.__file__))
            ):
                assert not {"flow", "task"} & {alias.name for alias in node.names}, (
                    f"{path}: from tasks.work.prefect_pages import"
                )
