"""The corpus of the optional supervised step: prompt and answer, without the prompts of any suite."""

from pathlib import Path

from models import readers
from models.artifacts import Sources
from models.errors import BadData
from models.fields import Fields
from models.formats import taught
from models.preferences import refuse_contamination, suite_prompts
from models.recipe import Data
from models.tokens import Message


def dialogues(sources: Sources, config: Data) -> list[tuple[list[Message], list[str]]]:
    """Return (prompt, [answer]) of every row that may be trained on.

    Raises:
        BadData: the corpus is missing or empty, a row cannot be used, or prompts stand in a suite.
    """
    path = sources.file("sft")
    found = [_taught(path, number, row) for number, row in readers.every(path)]
    suites = suite_prompts(sources, config)
    inside = [suites.asks(prompt) for prompt, _ in found]
    kept = [one for one, held in zip(found, inside, strict=True) if not held]
    first = next((prompt[-1]["content"] for (prompt, _), held in zip(found, inside, strict=True) if held), "")
    refuse_contamination(len(found) - len(kept), first, config)
    if not kept:
        raise BadData(f"{path}: every prompt of the corpus stands in an evaluation suite; nothing is left to train on")
    return kept


def _taught(path: Path, number: int, row: readers.Row) -> tuple[list[Message], list[str]]:
    """Return prompt and answer of one row."""
    try:
        prompt, answer = taught(Fields(row, {}, "", ""))
    except readers.Unusable as error:
        raise BadData(f"{path}: row {number}: {error}") from error
    return prompt, [answer]
