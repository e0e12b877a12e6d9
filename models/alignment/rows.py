"""The rows that a training reads: token ids, and the reference's log-probs of whole answers in nats."""

from typing import TypeVar, cast, final

from typing_extensions import TypedDict

from models.artifacts import Reference
from models.files import jsonl
from models.policy.logprobs import TokenPair, Tokens


@final  # so that a type checker tells the two apart by their columns
class ScoredPair(TokenPair):
    """Two answers to one prompt, for losses that compare; written by `reference.score`, read by `dpo.train`."""

    ref_chosen_logps: float
    ref_rejected_logps: float


class TokenAnswer(TypedDict):
    """One answer to a prompt, as token ids."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool
    """Whether the answer is desirable."""


@final
class ScoredAnswer(TokenAnswer):
    """One answer, and the answer of another prompt of its batch; written by `kto.score`, read by `kto.train`."""

    ref_logps: float
    KL_completion_ids: list[int]
    """Of the other prompt; TRL names the columns."""
    ref_KL_logps: float


ScoredRow = ScoredPair | ScoredAnswer
S = TypeVar("S", ScoredPair, ScoredAnswer)


def read(reference: Reference, kind: type[S], split: str = "train") -> list[S]:
    """Return the rows of one split; the reference's maker says of which kind they are."""
    return [cast(S, row) for row in jsonl.read(reference.path / f"{split}.jsonl")]


def scored_answers(row: ScoredRow) -> list[tuple[Tokens, float]]:
    """Return the answers of a row with the reference's log-probs of them."""
    if "completion_ids" in row:
        return [((row["prompt_ids"], row["completion_ids"]), row["ref_logps"])]
    return [
        ((row["prompt_ids"], row["chosen_ids"]), row["ref_chosen_logps"]),
        ((row["prompt_ids"], row["rejected_ids"]), row["ref_rejected_logps"]),
    ]
