"""Tables of our own, one JSON object per line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]
"""A row as JSON gives it. What the keys of a table are is known where the table is written, not here."""


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a table that was written whole.

    Raises:
        OSError: there is no such file.
        ValueError: a line is no JSON.
    """
    # Only a newline ends a row; without this argument Python also ends a line at a carriage return
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def whole_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table that a killed process, or a full disk, may have left with half a line."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # half a line, after which whole ones may follow: a later attempt appends
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the rows in the order in which they come."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
