"""What Prefect can start: the deployments of `prefect.yaml`, whose parameters come from the shipped recipes.

`prefect deploy --all` runs the build steps below and registers them for a worker; `serve` runs the same list from one
process, without a worker.
"""

import os
import signal
from contextlib import chdir
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from models.errors import BadInput, BadPlace, SacpoError
from models.recipe.toml import assessment, read
from tasks.leases import sweep
from tasks.servers.environment import configure_clients, no_hidden_server
from tasks.work.runs_folder import root

CHECKOUT = Path(__file__).parent.parent


def recipe(name: str) -> dict[str, Any]:
    """Build step: return a shipped recipe, whole, as the value of a parameter of that name."""
    return {"recipe": read(name).model_dump(mode="json", by_alias=True)}


def judged(policy: str, like: str) -> dict[str, Any]:
    """Build step: return an assessment of one policy with the suites, judges and bound of a recipe."""
    return {"assessment": assessment([policy], like, []).model_dump(mode="json", by_alias=True)}


def place() -> dict[str, str]:
    """Build step: return where this checkout lies, for the worker to start in."""
    return {"checkout": str(CHECKOUT)}


def deployments() -> list[dict[str, Any]]:
    """Return the entries of `prefect.yaml`, with the parameters that their build steps make; none without that file.

    Raises:
        BadInput: the file is no YAML or lists no deployments, or a build step fails, as of a recipe that is not there.
    """
    file = CHECKOUT / "prefect.yaml"
    if not file.exists():
        return []
    try:
        told = yaml.safe_load(file.read_text("utf-8"))["deployments"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f": line {mark.line + 1}" if mark else ""
        raise BadInput(f"{file}{where}: no YAML ({getattr(error, 'problem', None) or error})") from error
    except (KeyError, TypeError) as error:
        raise BadInput(f"{file}: has no list `deployments`") from error
    with chdir(CHECKOUT):  # where `prefect deploy` looks for a recipe
        return [{**entry, "parameters": _filled(entry, file)} for entry in told]


def _filled(entry: dict[str, Any], file: Path) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for step in entry.get("build") or []:
        for name, given in step.items():
            inputs = {key: value for key, value in (given or {}).items() if key != "id"}
            try:
                made |= resolve_name(name.replace("flows.deploy.", "flows.deploy:"))(**inputs)
            except (SacpoError, AttributeError, ImportError, TypeError) as error:
                raise BadInput(f"{file}: deployment {entry.get('name')!r}, {name}: {error}") from error
    return {key: made.get(key, value) for key, value in (entry.get("parameters") or {}).items()}


def serve_all(limit: int) -> None:
    """Serve every deployment from this process until it is interrupted; at most `limit` runs at a time.

    Raises:
        BadPlace: no Prefect server is named, or it does not answer.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    configure_clients()
    no_hidden_server()
    os.environ["SACPO_RUNS"] = str(root())  # from here on we are in the checkout
    os.chdir(CHECKOUT)
    from prefect import Flow, serve
    from prefect.schedules import Cron
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise BadPlace(
            "sacpo serve needs a Prefect server, whose pages start the runs: start one in another terminal with "
            "`sacpo up --no-worker`, and export what it prints"
        )
    served = []
    for entry in deployments():
        schedules = [
            Cron(s["cron"], timezone=s["timezone"], active=s["active"], slug=s["slug"])
            for s in entry.get("schedules") or []
        ]
        # from a source, so that one that `sacpo up` has registered is told where its code lies now
        flow: Any = Flow.from_source(str(CHECKOUT), entry["entrypoint"])
        served.append(
            flow.to_deployment(
                entry["name"],
                parameters=entry["parameters"],
                schedules=schedules,
                triggers=entry.get("triggers"),
                description=entry["description"],
                tags=entry["tags"],
                concurrency_limit=(entry.get("concurrency_limit") or {}).get("limit"),
                enforce_parameter_schema=True,
            )
        )
    try:
        serve(*served, limit=limit, pause_on_shutdown=False)
    finally:
        sweep(root())  # Prefect ends what runs, and leaves it Running
