"""The tables that every printed figure follows from, of all candidates, beside the report: doubt us and recompute."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models import jsonl
from models.artifacts import Noun
from models.figures import Evidence

TABLES = {
    "answers": ("answers", "answers.jsonl"),
    "scores": ("verdicts", "scores.jsonl"),
    "comparisons": ("verdicts", "comparisons.jsonl"),
    "kl": ("distances", "kl.jsonl"),
    "margins": ("margins", "margins.jsonl"),
}
"""Name of the table → the noun of a candidate's evidence that holds it, and the file."""


def write(candidates: list[Evidence], tested: Evidence | None, folder: Path) -> None:
    """Write `folder/NAME.jsonl` for each of TABLES: the candidates' rows one after the other, with name and split.

    Args:
        candidates: all of them, on the prompts that chose.
        tested: the chosen one on the test prompts, if it was tested.
    """
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        noun, _ = TABLES[name]
        also = tested and all(getattr(tested, noun) != getattr(told, noun) for told in candidates)  # measured anew
        jsonl.write(folder / f"{name}.jsonl", _rows([*candidates, *([tested] if tested and also else [])], name))


def _rows(candidates: list[Evidence], name: str) -> Iterator[dict[str, Any]]:
    noun, file = TABLES[name]
    for told in candidates:
        held: Noun = getattr(told, noun)
        for row in jsonl.read(held.path / file):  # held-out pairs have a split of their own
            yield {"candidate": told.policy.name, "split": told.answers.split, **row}
