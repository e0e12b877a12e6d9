"""The rows that a training reads: token ids with the log-probs of the reference, which are nats over whole answers."""

from collections.abc import Iterator

from typing_extensions import TypedDict

from models.artifacts import Reference
from models.files import jsonl
from models.policy.logprobs import TokenPair


class ScoredPair(TokenPair):
    """Two answers to one prompt, for losses that compare; written by `reference.score`, read by `dpo.train`."""

    ref_chosen_logps: float
    ref_rejected_logps: float


class TokenAnswer(TypedDict):
    """One answer to a prompt, good or bad, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool
    """Whether the answer is desirable."""


class ScoredAnswer(TokenAnswer):
    """One answer for KTO, and the answer of another prompt of its batch; written by `kto.score`, read by `kto.train`.

    TRL names the columns.
    """

    ref_logps: float
    KL_completion_ids: list[int]
    ref_KL_logps: float


def pairs(reference: Reference, split: str) -> list[ScoredPair]:
    """Return the scored pairs of one split."""
    return [_pair(row) for row in jsonl.read(reference.path / f"{split}.jsonl")]


def answers(reference: Reference) -> list[ScoredAnswer]:
    """Return the scored answers of a KTO training, in its order."""
    return [_answer(row) for row in jsonl.read(reference.path / "train.jsonl")]
