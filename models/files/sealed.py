"""Small files of ours: one JSON object each, sealed by a digest of its content, written whole or not at all.

A disk that flips a bit, or a kill that cuts a file, leaves something that no reader may trust or crash on. So there is
one reader, for which a file that is missing, cut, garbled, changed or of another shape is not there; the code that owns
the file makes it again.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter

from models.artifacts import content_digest

T = TypeVar("T")

SEAL = "seal"
"""Key of the digest over the other keys; a file of an older version has none, and is then taken as it is."""


def read(path: Path, kind: type[T]) -> T | None:
    """Return what a small file holds, or None where it cannot be trusted.

    Args:
        kind: a TypedDict or dataclass; a value of another type in the file makes it unreadable.
    """
    try:
        if not path.is_file():
            return None
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict) or record.pop(SEAL, None) not in (None, content_digest(record)):
            return None
        # As JSON, since pydantic's strict mode takes a list for a tuple there, and not from a Python value
        content: T = _adapter(cast(Any, kind)).validate_json(json.dumps(record), strict=True)
        return content
    except (OSError, ValueError, RecursionError):  # pydantic's and Unicode's errors are ValueErrors
        return None


def write(path: Path, record: Mapping[str, object]) -> None:
    """Write a small file with its seal."""
    plain = json.loads(json.dumps(record))  # the seal is over what a reader will see: lists for tuples, text keys
    plain.pop(SEAL, None)
    write_text(path, json.dumps({**plain, SEAL: content_digest(plain)}, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old content or the new, never half of it."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        # The content must be on the disk before the name is: after a power cut the rename alone may have survived
        file.flush()
        os.fsync(file.fileno())
    if path.is_dir():  # a rename replaces a file, never a folder
        set_aside(path)
    new.rename(path)


def set_aside(path: Path) -> Path:
    """Give what lies at a path another name, for a person to look at, and return it."""
    free = next(place for n in count(1) if not (place := path.with_name(f"{path.name}.damaged-{n}")).exists())
    path.rename(free)
    return free


def remove(path: Path) -> None:
    """Remove what lies at a path: a file, a folder, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
