"""A library that fails on files of others, in whatever way: one sentence for the user, the traceback for the log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import BadPolicy
from models.words import first_line

LOG = logging.getLogger(__name__)


@contextmanager
def bad_policy_if_it_fails(sentence: str, remedy: str = "") -> Iterator[None]:
    """Run a block that lets transformers, tokenizers or gguf read files that may be damaged.

    Args:
        sentence: names the file and what cannot be done with it; the first line of the error is appended.
        remedy: what the user can do, appended behind a semicolon.

    Raises:
        BadPolicy: the block failed.
    """
    try:
        yield
    except Exception as error:
        # Really any: tokenizers raises plain Exception, a config with wrong types fails in whatever line of the
        # architecture uses them first, and the limit on memory raises MemoryError in between.
        # At level INFO, since the sentence is all that a user needs, and it is printed by who catches it
        LOG.info("%s", sentence, exc_info=True)
        raise BadPolicy(f"{sentence}: {first_line(error)}{f'; {remedy}' if remedy else ''}") from error
