"""The rows of `answers.jsonl`, for those who write them and those who read them; imports no tensors."""

from collections.abc import Iterator
from typing import NotRequired, TypedDict, cast

from models.artifacts import Answers
from models.data.dialogue import Message
from models.files import jsonl

ANSWERS = "answers.jsonl"


class PromptRow(TypedDict):
    """One row of `prompts.jsonl`: what a policy is asked."""

    suite: str
    """Role of the suite, or `held-out METRIC` where there are no suites."""
    prompt: str | list[Message]
    """Text that a user writes, or a dialogue that ends with the user's turn."""
    category: str
    """Empty where the suite names none."""
    reference: NotRequired[str]
    """An answer that would be right, where the suite holds one."""


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
