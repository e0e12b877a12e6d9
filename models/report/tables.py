"""Writes the rows behind every figure of the report, so that each can be recomputed."""

import json
from collections.abc import Iterator
from pathlib import Path

from models.artifacts import Noun
from models.metrics.candidate import Candidate

TABLES = {
    "answers": ("answers", "answers.jsonl"),
    "scores": ("scores", "scores.jsonl"),
    "comparisons": ("scores", "comparisons.jsonl"),
    "kl": ("distances", "kl.jsonl"),
    "margins": ("margins", "margins.jsonl"),
}
"""Name of the table → the field of a candidate that holds it, and the file."""


def write(candidates: list[Candidate], tested: Candidate | None, folder: Path) -> None:
    """Write `folder/NAME.jsonl` for each of TABLES: the candidates' rows one after the other, with name and split.

    Args:
        candidates: all of them, on the prompts that chose.
        tested: the chosen one on the test prompts, if it was tested.
    """
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        field, _ = TABLES[name]
        # margins are not measured again for the test, so the rows of the tested one are there already
        also = tested and all(getattr(tested, field) != getattr(candidate, field) for candidate in candidates)
        with (folder / f"{name}.jsonl").open("wb") as file:
            file.writelines(_lines([*candidates, *([tested] if tested and also else [])], name))


def _lines(candidates: list[Candidate], name: str) -> Iterator[bytes]:
    """Yield the rows as they are written, with the columns that name the candidate before them."""
    field, file = TABLES[name]
    for candidate in candidates:
        noun: Noun = getattr(candidate, field)
        split = {} if field == "margins" else {"split": candidate.answers.split}  # held-out pairs name their own
        start = json.dumps({"candidate": candidate.policy.name, **split}, ensure_ascii=False).encode()[:-1]
        with (noun.path / file).open("rb") as lines:
            for line in lines:
                yield start + b", " + line[1:]
