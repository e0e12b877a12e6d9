"""The rows of `answers.jsonl`, for those who write them and those who read them; imports no tensors."""

from collections.abc import Iterator
from typing import cast

from models.artifacts import Answers
from models.data.prompts import PromptRow
from models.files import jsonl

ANSWERS = "answers.jsonl"


class AnswerRow(PromptRow):
    """One answer of a policy, beside what it was asked."""

    sample: int
    """Which of the answers to this prompt, from 0."""
    answer: str
    tokens: int
    """Tokens that were generated, that of the end included where the policy ended by itself."""
    tie: int
    """First token at which the two largest logits nearly tied, so that rounding decides; −1 if none."""


def answer_rows(answers: Answers) -> Iterator[AnswerRow]:
    """Yield the answers of a policy, in the order of the prompts and then of the samples."""
    return cast(Iterator[AnswerRow], jsonl.read(answers.path / ANSWERS))
