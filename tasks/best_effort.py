"""What is only shown may fail: the run goes on, and a line in the log says what is missing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from models.words import first_line

logger = logging.getLogger(__name__)


@contextmanager
def best_effort(purpose: str, level: int = logging.WARNING) -> Iterator[None]:
    """Go on after any error in the block, with a line in the log.

    Args:
        purpose: completes the sentence "could not …", as in `show the table of candidates in Prefect`.
        level: of the line in the log.
    """
    try:
        yield
    except Exception as error:
        # anything may come: errors of Prefect, of MLflow, of their databases, of HTTP and of a proxy between
        logger.log(level, "could not %s (%s: %s)", purpose, type(error).__name__, first_line(error))
