"""What MLflow's model registry says of versions and aliases, and how one alias is moved."""

from pathlib import Path
from typing import NamedTuple

from models.errors import BadInput, BadPlace
from models.words import first_line
from tasks.tracking.connection import client, error_code, failures, shown_uri


class Version(NamedTuple):
    """What the registry says of a model version."""

    number: str
    source: str
    """Address of its weights; unlike tags it cannot be edited."""
    tags: dict[str, str]
    description: str
    """The model card, as Markdown; empty for a version that was registered by hand."""


def version(root: Path, model: str, number: str) -> Version:
    """Return what the registry says of a version.

    Raises:
        BadInput: there is no such version.
        BadPlace: MLflow does not answer.
    """
    try:
        registered = client(root).get_model_version(model, number)
    except failures() as error:
        if error_code(error) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            why = f"MLflow at {shown_uri(root)} does not know it ({first_line(error)})"
            raise BadInput(f"{model} version {number}: {why}") from error
        raise no_answer(root, error) from error
    return Version(
        number=str(registered.version),  # as MLflow writes it: it finds version 2 under 02, too
        source=str(registered.source),
        tags=dict(registered.tags),
        description=registered.description or "",
    )


def aliases(root: Path, model: str) -> dict[str, str]:
    """Return alias → version; empty for a model that does not exist yet."""
    try:
        return {alias: str(version) for alias, version in client(root).get_registered_model(model).aliases.items()}
    except failures() as error:
        if error_code(error) == "RESOURCE_DOES_NOT_EXIST":
            return {}
        raise no_answer(root, error) from error


def set_alias(root: Path, model: str, alias: str, version: str) -> str:
    """Point one alias to a version, or take it away if `version` is empty; return what MLflow said against it.

    Of two processes that set an alias for the first time MLflow refuses one, so a refusal is no error: the caller looks
    again where the alias is.
    """
    mlflow = client(root)
    try:
        if version:
            mlflow.set_registered_model_alias(model, alias, version)
        else:
            mlflow.delete_registered_model_alias(model, alias)
    except failures() as error:
        return first_line(error)
    return ""


def no_answer(root: Path, error: Exception) -> BadPlace:
    """Return the error that says that MLflow does not answer."""
    return BadPlace(f"MLflow at {shown_uri(root)} does not answer ({first_line(error)}); start it")
