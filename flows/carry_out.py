"""A flow, run from the command line: the servers and workers it needs, what it found, and the exit code."""

import logging
import os
from collections.abc import Callable
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NoReturn

import typer

from flows import signals
from models.errors import BadPlace, SacpoError

if TYPE_CHECKING:
    from models.recipe import Assessment, Recipe
    from tasks.outcomes import Outcome


def carry_out(chosen: "Recipe | Assessment", flow: str, retry: bool) -> NoReturn:
    """Run a flow unless nothing is left to do, show what it found, and exit as it says."""
    from flows.console import print_outcome
    from tasks.outcomes import finished, forget_failed
    from tasks.run import refuse_unusable

    if retry:
        typer.echo(f"{forget_failed(chosen)} failed verdicts are asked for again")
    outcome = finished(chosen)
    if outcome is None:
        refuse_unusable(chosen)
        outcome = _run(chosen, flow)
    print_outcome(outcome)
    raise typer.Exit(outcome["exit_code"])


def _run(chosen: "Recipe | Assessment", flow: str) -> "Outcome":
    """Start Prefect and the workers side by side, run a flow, and return how it ended."""
    from tasks.access.temporary_server import temporary_server
    from tasks.servers.environment import configure_clients, refuse_hidden_server
    from tasks.work.runs_folder import root
    from tasks.work.workers import workers

    signals.bound()
    configure_clients()
    servers = "" if os.environ.get("PREFECT_API_URL") else "Prefect and "
    typer.echo(f"{chosen.name}: starting {servers}the workers; everything goes to {root()}")
    with temporary_server(root()) as ready, workers(chosen.compute, root()):
        try:
            # Importing Prefect takes two seconds, in which the server and the workers start.
            run_flow: Callable[[Recipe | Assessment], Outcome] = resolve_name(f"flows.{flow}:{flow}")
            refuse_hidden_server()
            ready()
            return run_flow(chosen)
        except SacpoError:
            raise
        except Exception as error:
            # Prefect may raise anything when its server dies; our own mistakes arrive here as well.
            return _outcome_despite(error, chosen, ready)


def _outcome_despite(error: Exception, chosen: "Recipe | Assessment", ready: Callable[[], None]) -> "Outcome":
    """Return the outcome if the run was complete before an error came; else raise what the user needs to know.

    Raises:
        BadPlace: a server has died. Where all of them answer, the error itself is raised.
    """
    import httpx

    from tasks.outcomes import finished
    from tasks.servers.environment import configure_clients

    outcome = finished(chosen)
    if outcome is not None:
        logging.getLogger(__name__).warning("the run was complete when an error came: %r", error)
        return outcome
    try:
        ready()
        configure_clients()
    except BadPlace as silent:
        raise BadPlace(f"{silent}; the same command goes on") from silent
    if isinstance(error, httpx.TransportError):
        raise BadPlace(f"Prefect does not answer ({error}); the same command goes on") from error
    raise error
