"""The corpus of the optional supervised step: prompt and answer, without the prompts of any suite."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from models.artifacts import Sources
from models.data import readers
from models.data.dialogue import Message, encode_each
from models.data.fields import Fields
from models.data.formats import taught
from models.data.preferences import INSIDE, refuse_contamination, suite_prompts
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = "left_out.jsonl"
"""The rows of the corpus that are not trained on: `row`, `why`, and the start of the last turn before the answer."""


class Example(NamedTuple):
    """A row that may be trained on."""

    row: int
    """Its number in the file, from 1."""
    prompt: list[Message]
    answer: str

    def left_out(self, why: str) -> dict[str, Any]:
        """Return what `left_out.jsonl` says of it."""
        return {"row": self.row, "why": why, "prompt": self.prompt[-1]["content"][:200]}


def examples(sources: Sources, config: Data) -> tuple[list[Example], list[dict[str, Any]]]:
    """Return the rows that may be trained on, and what to say of each of the others.

    Raises:
        BadData: the corpus is missing or empty, a row cannot be used, or prompts stand in a suite.
    """
    path = sources.file("sft")
    suites = suite_prompts(sources, config)
    kept: list[Example] = []
    left_out: list[dict[str, Any]] = []
    for example in _read(path):
        if suites.asks(example.prompt):
            left_out.append(example.left_out(INSIDE))
        else:
            kept.append(example)
    refuse_contamination(path, len(left_out), left_out[0]["prompt"] if left_out else "", config)
    if not kept:
        raise BadData(f"{path}: every prompt of the corpus stands in an evaluation suite; nothing is left to train on")
    return kept, left_out


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", sources: Sources, config: Data, out: Path
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of prompt and answer of each row to train on; `left_out.jsonl` in `out` names the others.

    Raises:
        BadData: as `examples` does.
        BadPolicy: the chat template refuses all rows.
    """
    kept, left_out = examples(sources, config)
    encoded: list[tuple[list[int], list[int]]] = []
    refused: list[BadPolicy] = []
    whole = encode_each(tokenizer, [(example.prompt, [example.answer]) for example in kept])
    for example, one in zip(kept, whole, strict=True):
        if isinstance(one, BadPolicy):
            refused.append(one)
            left_out.append(example.left_out(str(one)))
        else:
            prompt, (answer,) = one
            encoded.append((prompt, answer))
    if not encoded:
        raise refused[0]
    left_out.sort(key=lambda line: int(line["row"]))
    jsonl.write(out / LEFT_OUT, left_out)
    return encoded


def _read(path: Path) -> Iterator[Example]:
    for number, row in readers.every(path):
        try:
            yield Example(number, *taught(Fields(row, {}, "", "")))
        except readers.Unusable as error:
            raise BadData(f"{path}: row {number}: {error}") from error
