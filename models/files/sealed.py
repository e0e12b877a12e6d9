"""Small files of ours: one JSON object each, sealed by a digest of its content, written whole or not at all.

A disk that flips a bit and a kill that cuts a file leave something that no reader should trust, or die of. So there is
one reader: what is missing, cut, garbled, changed or of another shape is not there, and its owner makes it again.
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
        text = path.read_bytes()
        record = json.loads(text)
        if not isinstance(record, dict) or record.pop(SEAL, None) not in (None, content_digest(record)):
            return None
        found: T = _adapter(cast(Any, kind)).validate_json(json.dumps(record), strict=True)
        return found
    except (OSError, ValueError, RecursionError):  # pydantic's and Unicode's errors are ValueErrors
        return None


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write a small file with its seal."""
    plain = json.loads(json.dumps(record))  # the seal is over what a reader will find
    plain.pop(SEAL, None)
    write_text(path, json.dumps({**plain, SEAL: content_digest(plain)}, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old content or the new, never half of it."""
    new = path.with_name(path.name + ".new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if path.is_dir():
        aside(path)
    new.rename(path)


def aside(path: Path) -> Path:
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
