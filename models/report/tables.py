"""The tables that every printed figure follows from, of all candidates, beside the report: doubt us and recompute."""

import json
from collections.abc import Iterator
from pathlib import Path

from models.artifacts import Noun
from models.metrics.figures import Candidate

TABLES = {
    "answers": ("answers", "answers.jsonl"),
    "scores": ("verdicts", "scores.jsonl"),
    "comparisons": ("verdicts", "comparisons.jsonl"),
    "kl": ("distances", "kl.jsonl"),
    "margins": ("margins", "margins.jsonl"),
}
"""Name of the table → the noun of a candidate's evidence that holds it, and the file."""


def write(candidates: list[Candidate], tested: Candidate | None, folder: Path) -> None:
    """Write `folder/NAME.jsonl` for each of TABLES: the candidates' rows one after the other, with name and split.

    Args:
        candidates: all of them, on the prompts that chose.
        tested: the chosen one on the test prompts, if it was tested.
    """
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        noun, _ = TABLES[name]
        also = tested and all(getattr(tested, noun) != getattr(told, noun) for told in candidates)  # measured anew
        with (folder / f"{name}.jsonl").open("wb") as file:
            file.writelines(_lines([*candidates, *([tested] if tested and also else [])], name))


def _lines(candidates: list[Candidate], name: str) -> Iterator[bytes]:
    """Yield the rows as they are written, with the columns that name the candidate before them."""
    noun, file = TABLES[name]
    for told in candidates:
        held: Noun = getattr(told, noun)
        own = {} if noun == "margins" else {"split": told.answers.split}  # held-out pairs have one of their own
        start = json.dumps({"candidate": told.policy.name, **own}, ensure_ascii=False).encode()[:-1]
        with (held.path / file).open("rb") as lines:
            for line in lines:
                yield start + b", " + line[1:]
