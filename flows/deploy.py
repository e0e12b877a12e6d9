"""What Prefect can start: the deployments of `prefect.yaml`, whose parameters come from the shipped recipes.

`prefect deploy --all` runs the build steps below and registers them for a worker; `serve` runs the same list from one
process, without a worker.
"""

import os
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml

from models.recipe_file import assessment, read

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
    """Return the entries of `prefect.yaml`, with the parameters that their build steps make."""
    told = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text("utf-8"))["deployments"]
    return [{**entry, "parameters": _filled(entry)} for entry in told]


def _filled(entry: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for step in entry.get("build") or []:
        for name, given in step.items():
            inputs = {key: value for key, value in (given or {}).items() if key != "id"}
            made |= resolve_name(name.replace("flows.deploy.", "flows.deploy:"))(**inputs)
    return {key: made.get(key, value) for key, value in (entry.get("parameters") or {}).items()}


def serve_all(limit: int) -> None:
    """Serve every deployment from this process until it is interrupted; at most `limit` runs at a time."""
    from prefect import serve
    from prefect.schedules import Cron

    os.chdir(CHECKOUT)
    served = []
    for entry in deployments():
        file, flow = entry["entrypoint"].split(":")
        schedules = [
            Cron(s["cron"], timezone=s.get("timezone", "UTC"), active=s.get("active", True))
            for s in entry.get("schedules") or []
        ]
        served.append(
            resolve_name(f"{file.removesuffix('.py').replace('/', '.')}:{flow}").to_deployment(
                entry["name"],
                parameters=entry["parameters"],
                schedules=schedules,
                description=entry["description"],
                tags=entry.get("tags"),
                concurrency_limit=(entry.get("concurrency_limit") or {}).get("limit"),
                enforce_parameter_schema=True,
            )
        )
    serve(*served, limit=limit, pause_on_shutdown=False)
