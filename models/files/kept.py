"""What the runs folder keeps beside the reports of each recipe; no recipe may take one of these names."""

import re
from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator


class RunsFolderEntry(StrEnum):
    """Names of files and folders in the runs folder. Nothing else is made there beside the reports of each recipe."""

    store = "store"
    registered = "registered"
    leases = "leases"
    logs = "logs"
    artifacts = "artifacts"
    prefect = "prefect"
    mlflow = "mlflow.db"
    users = "mlflow-users.db"
    auth = "mlflow-auth.ini"
    operations = "operations.db"
    answers = "answers.db"
    verdicts = "verdicts.db"
    password = "password"
    servers = "servers.json"
    starting = "servers.lock"
    writable = ".writable"


_OF_ONE_RUN = re.compile(r".*\.(lock|question|new)")


def reserved(name: str) -> bool:
    """Return whether a recipe of this name would write over what the runs folder keeps, or be taken for it.

    A database has files of its own beside it (`mlflow.db-wal`), a run has a lock and perhaps a question.
    """
    # Only names with a dot have such files: a recipe may well be called `store-2`
    beside_a_file = any(name.startswith((f"{entry}-", f"{entry}.")) for entry in RunsFolderEntry if "." in entry)
    return name in {*RunsFolderEntry} or beside_a_file or _OF_ONE_RUN.fullmatch(name) is not None


def _own(name: str) -> str:
    if reserved(name):
        raise ValueError(f"{name!r} is what the runs folder calls something of its own; take another name")
    return name


RunName = Annotated[str, AfterValidator(_own)]
"""The name of a recipe: its reports lie in a folder of this name in the runs folder."""
