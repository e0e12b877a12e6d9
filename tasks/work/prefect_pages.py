"""Prefect's flows and tasks, on whose pages nothing that others wrote can be clicked.

Its pages make a link of every address in the message of a state and in a log, also of one in a judge's reply that
became an error. So what Prefect makes of errors and logs gets its addresses broken, as Markdown does. Whoever writes a
flow or a task takes `flow` and `task` from here.
"""

import logging
import sys
from typing import Any

import prefect.states
from prefect import flow as flow
from prefect import task as task
from prefect.logging.handlers import APILogHandler

from models.markdown import unlinked

_formatted_error, _formatted_record = prefect.states.format_exception, APILogHandler.format


def _format_exception(*values: Any, **named: Any) -> str:
    return unlinked(_formatted_error(*values, **named))


def _format(handler: APILogHandler, record: logging.LogRecord) -> str:
    return unlinked(_formatted_record(handler, record))


for _name, _module in list(sys.modules.items()):  # each of Prefect's engines may have imported it
    if _name.startswith("prefect.") and getattr(_module, "format_exception", None) is _formatted_error:
        _module.format_exception = _format_exception  # type: ignore[attr-defined]
APILogHandler.format = _format  # type: ignore[method-assign,assignment]
