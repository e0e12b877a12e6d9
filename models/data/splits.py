"""What became of each row that was given, and the files of the splits that it went to."""

import hashlib
import heapq
import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models.data.formats import Judged, Pair

OVER = "over the limit"


class Fates:
    """Row → the split that it is used in, or the reason why it is not; every row has exactly one.

    Rows that are not used stand in `quarantine.jsonl` with file, number and reason; those over a limit of the recipe
    are counted only.
    """

    def __init__(self, out: Path, parts: Mapping[str, int]) -> None:
        """Write to `out`; `parts` tells of each file that was read how many rows came before it (`readers.rows`)."""
        self.parts = parts
        self._codes: dict[str, int] = {}
        self._of = array("I")  # by row number, from 1
        self._file = (out / "quarantine.jsonl").open("w", encoding="utf-8")

    def take(self, row: int, fate: str) -> None:
        """Say what became of a row; the last word counts."""
        code = self._codes.setdefault(fate, len(self._codes))
        if row > len(self._of):
            self._of.append(code)
        self._of[row - 1] = code

    def drop(self, row: int, reason: str) -> None:
        """Say why a row is not used."""
        code = self._codes.get(reason)
        if row <= len(self._of) and self._of[row - 1] == code:
            return  # its other answer was dropped for the same reason
        self.take(row, reason)
        file, before = next((name, start) for name, start in reversed([*self.parts.items()]) if start < row)
        write(self._file, {"file": file, "row": row - before, "reason": reason})

    def counts(self) -> dict[str, int]:
        """Return how many rows met each fate; the sum is the number of rows."""
        names = list(self._codes)
        return {names[code]: count for code, count in sorted(Counter(self._of).items())}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Split:
    """One split being written: its file, and which rows each of its lines is made of."""

    def __init__(self, out: Path, name: str) -> None:
        """Begin an empty file."""
        self.name, self.path = name, out / f"{name}.jsonl"
        self.file = self.path.open("w", encoding="utf-8")
        self.rows = array("Q")  # two numbers per line; 0 for none

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self.rows) // 2

    def add(self, line: Pair | Judged, row: int, other: int = 0) -> None:
        """Write a pair, or an answer, that is made of one row, or of two."""
        write(self.file, line._asdict())
        self.rows.extend((row, other))

    def close(self) -> None:
        """Close the file; what was written can be read."""
        self.file.close()

    def sift(self, why_not: Callable[[bytes], str], fates: Fates) -> None:
        """Keep the lines for which `why_not` returns nothing; the rows of the others are not used for that reason."""
        self.close()
        new, kept = self.path.with_suffix(".new"), array("Q")
        with self.path.open("rb") as old, new.open("wb") as file:
            for i, line in enumerate(old):
                reason = why_not(line)
                numbers = self.rows[2 * i : 2 * i + 2]
                if not reason:
                    file.write(line)
                    kept.extend(numbers)
                    continue
                for row in filter(None, numbers):
                    (fates.take if reason.startswith(OVER) else fates.drop)(row, reason)
        new.rename(self.path)
        self.rows = kept

    def limit(self, most: int, key: str, fates: Fates) -> int:
        """Keep the `most` lines with the smallest hash (all, if 0), in their order; return the number of the others."""
        lines = len(self)
        if not most or lines <= most:
            return 0
        self.close()
        with self.path.open("rb") as file:
            smallest = set(heapq.nsmallest(most, (hashlib.sha256(line).digest() for line in file)))
        reason = f"{OVER} {key}"
        self.sift(lambda line: "" if hashlib.sha256(line).digest() in smallest else reason, fates)
        return lines - len(self)

    def settle(self, fates: Fates) -> None:
        """Say of every row that is left that it is used here."""
        self.close()
        for row in filter(None, self.rows):
            fates.take(row, self.name)


class Partners:
    """Held-out answers that wait for one of the other kind to the same prompt; their texts wait on disk."""

    def __init__(self, path: Path) -> None:
        """Use a file that is deleted in the end."""
        self.path, self.file = path, path.open("w+b")
        self.waiting: dict[bytes, list[tuple[bool, bytes, int, int]]] = {}
        """Digest of the prompt → desirable or not, digest of the answer, place in the file, and number of the row."""

    def meet(self, answer: Judged, row: int) -> tuple[Pair, int] | None:
        """Return a pair and the partner's row, if an answer of the other kind waits; else let this one wait."""
        prompt, own = _digest(answer.prompt), _digest(answer.answer)
        queue = self.waiting.setdefault(prompt, [])
        for i, (desirable, other, place, partner) in enumerate(queue):
            if desirable != answer.desirable and other != own:
                del queue[i]
                self.file.seek(place)
                text = json.loads(self.file.readline())
                both = (answer.answer, text) if answer.desirable else (text, answer.answer)
                return Pair(answer.prompt, *both), partner
        place = self.file.seek(0, 2)
        self.file.write(json.dumps(answer.answer).encode() + b"\n")
        queue.append((answer.desirable, own, place, row))
        return None

    def left(self) -> list[int]:
        """Return the rows that found no partner."""
        return sorted(row for queue in self.waiting.values() for *_, row in queue)

    def close(self) -> None:
        """Delete the file."""
        self.file.close()
        self.path.unlink(missing_ok=True)


def write(file: Any, row: dict[str, Any]) -> None:
    """Write one line of JSON."""
    file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _digest(value: Any) -> bytes:
    return hashlib.sha256(json.dumps(value).encode()).digest()[:16]
