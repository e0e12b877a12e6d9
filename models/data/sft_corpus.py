"""The corpus of the optional supervised step: prompt and answer, without the prompts of any suite."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from models.artifacts import Sources
from models.data import readers
from models.data.dialogue import Message, encode_each
from models.data.fields import Fields
from models.data.formats import demonstration
from models.data.preferences import INSIDE, refuse_contamination, suite_prompts
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.files.raw_rows import Unusable, bad_row
from models.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEFT_OUT = "left_out.jsonl"
"""The rows of the corpus that are not trained on, as `LeftOut`."""


class LeftOut(TypedDict):
    """A line of `left_out.jsonl`."""

    row: int
    """Its number in the file, from 1."""
    why: str
    prompt: str
    """The start of the last turn before the answer."""


class Demonstration(NamedTuple):
    """A row that may be trained on."""

    row: int
    """Its number in the file, from 1."""
    prompt: list[Message]
    answer: str

    def left_out(self, why: str) -> LeftOut:
        """Return what `left_out.jsonl` says of it."""
        return LeftOut(row=self.row, why=why, prompt=self.prompt[-1]["content"][:200])


def examples(sources: Sources, config: Data) -> tuple[list[Demonstration], list[LeftOut]]:
    """Return the rows that may be trained on, and what to say of each of the others.

    Raises:
        BadData: the corpus is missing or empty, a row cannot be used, or prompts stand in a suite.
    """
    path = sources.file("sft")
    suites = suite_prompts(sources, config)
    usable: list[Demonstration] = []
    left_out: list[LeftOut] = []
    for example in _read(path):
        if suites.asks(example.prompt):
            left_out.append(example.left_out(INSIDE))
        else:
            usable.append(example)
    refuse_contamination(path, len(left_out), left_out[0]["prompt"] if left_out else "", config)
    if not usable:
        raise BadData(f"{path}: every prompt of the corpus stands in an evaluation suite; nothing is left to train on")
    return usable, left_out


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", sources: Sources, config: Data, out: Path
) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of prompt and answer of each row to train on; `left_out.jsonl` in `out` names the others.

    Raises:
        BadData: as `examples` does.
        BadPolicy: the chat template refuses all rows.
    """
    usable, left_out = examples(sources, config)
    encoded: list[tuple[list[int], list[int]]] = []
    refused: list[BadPolicy] = []
    results = encode_each(tokenizer, [(example.prompt, [example.answer]) for example in usable])
    for example, result in zip(usable, results, strict=True):
        if isinstance(result, BadPolicy):
            refused.append(result)
            left_out.append(example.left_out(str(result)))
        else:
            (answer,) = result.answers
            encoded.append((result.prompt, answer))
    # a template that refuses some rows may be right about them; one that refuses all does not fit the data
    if not encoded:
        raise refused[0]
    # in the order of the corpus: those that stand in a suite were found before those that the template refuses
    jsonl.write(out / LEFT_OUT, sorted(left_out, key=lambda line: line["row"]))
    return encoded


def _read(path: Path) -> Iterator[Demonstration]:
    for number, row in readers.usable_rows(path):
        try:
            yield Demonstration(number, *demonstration(Fields(row)))
        except Unusable as error:
            raise bad_row(path, number, error) from error
