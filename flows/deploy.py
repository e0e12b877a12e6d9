"""What Prefect can start: the deployments of `prefect.yaml`, whose parameters come from the shipped recipes.

`prefect deploy --all` runs the build steps below and registers them for a worker; `serve` runs the same list from one
process, without a worker.
"""

import os
import signal
from contextlib import chdir
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NotRequired

import yaml
from pydantic import JsonValue
from typing_extensions import TypedDict

from models.errors import BadInput, BadPlace, SacpoError
from models.recipe.toml import assessment, read
from tasks.leases import sweep
from tasks.servers.environment import configure_clients, refuse_hidden_server
from tasks.work.runs_folder import root

CHECKOUT = Path(__file__).parent.parent
Parameters = dict[str, JsonValue]
"""Of a flow, by name, as Prefect keeps them."""


class Schedule(TypedDict):
    """When a deployment runs by itself."""

    cron: str
    timezone: str
    active: bool
    slug: str
    """Its name, by which Prefect finds it again."""


class ConcurrencyLimit(TypedDict):
    """How many runs of a deployment there may be at a time."""

    limit: int


class Deployment(TypedDict):
    """An entry of `prefect.yaml`, as far as it is used here."""

    name: str
    entrypoint: str
    """`flows/align.py:align`."""
    description: str
    tags: list[str]
    parameters: Parameters
    build: NotRequired[list[dict[str, dict[str, str]]]]
    """Function of this file → its arguments, beside the `id` by which templates name what it returns."""
    schedules: NotRequired[list[Schedule]]
    triggers: NotRequired[list[JsonValue]]
    concurrency_limit: NotRequired[ConcurrencyLimit]


def recipe(name: str) -> Parameters:
    """Build step: return a shipped recipe, whole, as the value of a parameter of that name."""
    return {"recipe": read(name).model_dump(mode="json", by_alias=True)}


def judged(policy: str, like: str) -> Parameters:
    """Build step: return an assessment of one policy with the suites, judges and bound of a recipe."""
    return {"assessment": assessment([policy], like, []).model_dump(mode="json", by_alias=True)}


def place() -> dict[str, str]:
    """Build step: return where this checkout lies, for the worker to start in."""
    return {"checkout": str(CHECKOUT)}


def deployments() -> list[Deployment]:
    """Return the entries of `prefect.yaml`, with the parameters that their build steps make; none without that file.

    Raises:
        BadInput: the file is no YAML or lists no deployments, or a build step fails, as of a recipe that is not there.
    """
    file = CHECKOUT / "prefect.yaml"
    if not file.exists():
        return []
    try:
        entries: list[Deployment] = yaml.safe_load(file.read_text("utf-8"))["deployments"]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f": line {mark.line + 1}" if mark else ""
        raise BadInput(f"{file}{where}: no YAML ({getattr(error, 'problem', None) or error})") from error
    except (KeyError, TypeError) as error:
        raise BadInput(f"{file}: has no list `deployments`") from error
    with chdir(CHECKOUT):  # `prefect deploy` looks for a recipe there, too
        return [{**entry, "parameters": _parameters(entry, file)} for entry in entries]


def _parameters(entry: Deployment, file: Path) -> Parameters:
    """Return the parameters of an entry; those that a build step makes take the place of their templates."""
    values: Parameters = {}
    for step in entry.get("build") or []:
        for name, arguments in step.items():
            inputs = {key: value for key, value in (arguments or {}).items() if key != "id"}
            try:
                values |= resolve_name(name.replace("flows.deploy.", "flows.deploy:"))(**inputs)
            except (SacpoError, AttributeError, ImportError, TypeError) as error:
                raise BadInput(f"{file}: deployment {entry.get('name')!r}, {name}: {error}") from error
    return {key: values.get(key, value) for key, value in (entry.get("parameters") or {}).items()}


def serve_all(limit: int) -> None:
    """Serve every deployment from this process until it is interrupted; at most `limit` runs at a time.

    Raises:
        BadPlace: no Prefect server is named, or it does not answer.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    configure_clients()
    refuse_hidden_server()
    os.environ["SACPO_RUNS"] = str(root())  # absolute, since the next line changes the folder
    os.chdir(CHECKOUT)
    from prefect import Flow, serve
    from prefect.schedules import Cron
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        raise BadPlace(
            "sacpo serve needs a Prefect server, whose pages start the runs: start one in another terminal with "
            "`sacpo up --no-worker`, and export what it prints"
        )
    runners = []
    for entry in deployments():
        schedules = [
            Cron(s["cron"], timezone=s["timezone"], active=s["active"], slug=s["slug"])
            for s in entry.get("schedules") or []
        ]
        concurrency = entry.get("concurrency_limit")
        # `from_source` names this checkout: a deployment that `sacpo up` has registered may name another one.
        flow: Any = Flow.from_source(str(CHECKOUT), entry["entrypoint"])
        runners.append(
            flow.to_deployment(
                entry["name"],
                parameters=entry["parameters"],
                schedules=schedules,
                triggers=entry.get("triggers"),
                description=entry["description"],
                tags=entry["tags"],
                concurrency_limit=concurrency.get("limit") if concurrency else None,
                enforce_parameter_schema=True,
            )
        )
    try:
        serve(*runners, limit=limit, pause_on_shutdown=False)
    finally:
        sweep(root())  # Prefect ends the processes of its runs, but leaves the runs in the state Running
