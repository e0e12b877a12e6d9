"""What libraries do with files and programs of others may fail in any way: one sentence, and a traceback in the log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import SacpoError
from models.words import first_line

log = logging.getLogger(__name__)


@contextmanager
def refuse_if_it_fails(kind: type[Exception], sentence: str, remedy: str = "") -> Iterator[None]:
    """Run a block in which a library reads a file, or runs a template or a task, that somebody else wrote.

    Args:
        kind: the error that is raised instead.
        sentence: names the file and what cannot be done with it; the first line of the library's error is appended.
        remedy: what the user can do, appended behind a semicolon.

    Raises:
        SacpoError: raised in the block: it has a sentence of its own.
    """
    try:
        yield
    except SacpoError:
        raise
    except Exception as error:
        # Really any: tokenizers raises plain Exception, a config with wrong types fails in whatever line of the
        # architecture uses them first, a template may divide by zero, and a limit on memory raises MemoryError.
        # At level INFO, since the sentence is all that a user needs, and it is printed by the code that catches it.
        log.info("%s", sentence, exc_info=True)
        raise kind(f"{sentence}: {first_line(error)}{f'; {remedy}' if remedy else ''}") from error
