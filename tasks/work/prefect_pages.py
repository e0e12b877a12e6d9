"""Prefect's flows and tasks, on whose pages nothing that others wrote can be clicked.

Prefect's pages make a link of every address in the message of a state and in a log, also of one in a judge's reply that
became part of an error. So the addresses in what Prefect makes of errors and logs are broken here, as they are in
Markdown. Modules with a flow or a task import `flow` and `task` from here, and so never run without this.

Prefect 3.8 has no hook that changes the message of a state. For logs a formatter in its `logging.yml` would do, but a
user may have a file of their own in its place. So two functions of Prefect's are replaced.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import prefect.states
from prefect import flow as flow
from prefect import task as task
from prefect.logging.handlers import APILogHandler

from models.markdown import unlinked

P = ParamSpec("P")


def _unlinking(format_text: Callable[P, str]) -> Callable[P, str]:
    """Return a function that breaks the addresses in what another one returns."""

    @wraps(format_text)
    def unlinked_text(*args: P.args, **kwargs: P.kwargs) -> str:
        return unlinked(format_text(*args, **kwargs))

    return unlinked_text


_format_exception = prefect.states.format_exception
# Prefect's engines have imported the function by name, so it is replaced in every module that has it.
for _name, _module in list(sys.modules.items()):
    if _name.startswith("prefect.") and getattr(_module, "format_exception", None) is _format_exception:
        setattr(_module, "format_exception", _unlinking(_format_exception))  # noqa: B010
# setattr, since mypy allows no assignment to a method
setattr(APILogHandler, "format", _unlinking(APILogHandler.format))  # noqa: B010
