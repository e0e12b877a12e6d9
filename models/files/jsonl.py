"""Tables of our own, one JSON object per line."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> Iterator[Row]:
    """Yield the rows; lines end with a newline only, whatever else Unicode calls a line break."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield json.loads(line)


def whole(path: Path) -> Iterator[Row]:
    """Yield the rows of a table that a killed process, or a full disk, may have left with half a line."""
    try:
        with path.open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError:
        return


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write the rows."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
