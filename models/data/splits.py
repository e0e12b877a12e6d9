"""What became of each row that was given, and the files of the splits that it went to."""

import hashlib
import heapq
import json
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TextIO, TypedDict

from models.data.dialogue import Message
from models.data.formats import JudgedAnswer, Pair

OVER = "over the limit"


class Quarantined(NamedTuple):
    """A line of `quarantine.jsonl`: a row that is not used."""

    file: str
    row: int
    """Its number in that file, from 1."""
    reason: str


class DataCard(TypedDict):
    """What `card.json` tells of a step's data. Units are rows of the file, but where it says pairs or answers."""

    source: str
    formats: dict[str, int]
    """Name of the format → rows."""
    metric: str
    rows: int
    rows_became: dict[str, int]
    """Split, or reason why a row is not used → rows; they add up to `rows`."""
    splits: dict[str, int]
    """Split → lines of its file."""
    splits_hold: dict[str, str]
    """Split → what a line is: pairs or answers."""
    over_the_limit: dict[str, int]
    """Split → lines that `data.heldout` or `steps.N.pairs` has left out."""
    quarantined: dict[str, int]
    """Reason → rows that are a sign of a broken file; `data.bad_rows` limits them."""
    duplicates: int
    near_a_heldout_prompt: int
    inside_a_suite: int
    columns_not_used: dict[str, int]
    """Column → rows that hold something there."""
    files_not_read: list[str]
    contradictions: int
    """Pairs or answers that came before with the other label."""
    scores_prefer_the_rejected: int
    answers_given: int
    answers_repeated: int
    answers_desirable: float | None
    """This and the shares below are None where there is nothing to take a share of."""
    multi_turn: float | None
    chosen_is_longer: float | None
    mean_characters: dict[str, float | None]
    """`chosen` and `rejected` → mean length of these answers."""
    helpful_and_harmless_disagree: float | None
    """Of the pairs with both labels of PKU-SafeRLHF."""
    both_answers_unsafe: float | None
    """Of the pairs that say of both answers whether they are safe."""
    content_sha256: str


class Fates:
    """Row → the split that it is used in, or the reason why it is not; every row has exactly one.

    Rows that are not used stand in `quarantine.jsonl` with file, number and reason; those over a limit of the recipe
    are counted only.
    """

    def __init__(self, out: Path, parts: Mapping[str, int]) -> None:
        """Write to `out`; `parts` tells of each file that was read how many rows came before it (`readers.rows`)."""
        self.parts = parts
        self._codes: dict[str, int] = {}
        # a number of 4 bytes per row, by row number from 1: memory must not grow with the texts of reasons
        self._code_of = array("I")
        self._file = (out / "quarantine.jsonl").open("w", encoding="utf-8")

    def take(self, row: int, fate: str) -> None:
        """Say what became of a row; the last word counts."""
        code = self._codes.setdefault(fate, len(self._codes))
        if row > len(self._code_of):
            self._code_of.append(code)
        self._code_of[row - 1] = code

    def drop(self, row: int, reason: str) -> None:
        """Say why a row is not used."""
        code = self._codes.get(reason)
        if row <= len(self._code_of) and self._code_of[row - 1] == code:
            return  # its other answer was dropped for the same reason
        self.take(row, reason)
        # rows are numbered over all files of a folder, but people look for them in one file
        file, before = next((name, start) for name, start in reversed([*self.parts.items()]) if start < row)
        write(self._file, Quarantined(file, row - before, reason))

    def counts(self) -> dict[str, int]:
        """Return how many rows met each fate; the sum is the number of rows."""
        names = list(self._codes)
        return {names[code]: count for code, count in sorted(Counter(self._code_of).items())}

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

    def add(self, line: Pair | JudgedAnswer, row: int, other: int = 0) -> None:
        """Write a pair, or an answer, that is made of one row, or of two."""
        write(self.file, line)
        self.rows.extend((row, other))

    def close(self) -> None:
        """Close the file; what was written can be read."""
        self.file.close()

    def sift(self, why_not: Callable[[bytes], str], fates: Fates) -> None:
        """Keep the lines for which `why_not` returns nothing; the rows of the others are not used for that reason."""
        self.close()
        new, rows = self.path.with_suffix(".new"), array("Q")
        with self.path.open("rb") as old, new.open("wb") as file:
            for i, line in enumerate(old):
                reason = why_not(line)
                numbers = self.rows[2 * i : 2 * i + 2]
                if not reason:
                    file.write(line)
                    rows.extend(numbers)
                    continue
                # a pair of two single answers drops both of its rows; rows over a limit are counted, not quarantined
                for row in filter(None, numbers):
                    (fates.take if reason.startswith(OVER) else fates.drop)(row, reason)
        new.rename(self.path)
        self.rows = rows

    def limit(self, most: int, key: str, fates: Fates) -> int:
        """Keep the `most` lines with the smallest hash (all, if 0), in their order; return the number of the others."""
        lines = len(self)
        if not most or lines <= most:
            return 0
        self.close()
        # by hash, not by place: the choice is the same in whatever order the rows come
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

    def meet(self, answer: JudgedAnswer, row: int) -> tuple[Pair, int] | None:
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
        # to the end, since reading a partner has moved the place
        place = self.file.seek(0, 2)
        self.file.write(json.dumps(answer.answer).encode() + b"\n")
        queue.append((answer.desirable, own, place, row))
        return None

    def unmatched(self) -> list[int]:
        """Return the rows that have no partner."""
        return sorted(row for queue in self.waiting.values() for *_, row in queue)

    def close(self) -> None:
        """Delete the file."""
        self.file.close()
        self.path.unlink(missing_ok=True)


def write(file: TextIO, record: Pair | JudgedAnswer | Quarantined) -> None:
    """Write one line of JSON; its keys are the fields of the record."""
    file.write(json.dumps(record._asdict(), ensure_ascii=False) + "\n")


def _digest(value: str | list[Message]) -> bytes:
    # half of it saves memory; with 128 bits no two different texts are expected to share one
    return hashlib.sha256(json.dumps(value).encode()).digest()[:16]
