"""KL divergence from one policy to others, over answers that it samples."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, cast

from typing_extensions import TypedDict

from models.artifacts import Distances, Memory, Policy, Prompts, file_digest
from models.data.dialogue import messages, prompt_texts
from models.data.prompts import KL as ASKED
from models.files import jsonl
from models.policy.answers import answers_to, own_model
from models.policy.weights import frozen, load, project
from models.recipe import Compute, Decoding
from models.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class DistanceRow(TypedDict):
    """How far a policy is from others along one answer that it sampled, in nats: a row of `kl.jsonl`."""

    suite: str
    prompt: Any
    """A text, or a list of messages."""
    tokens: int
    base: NotRequired[float]
    reference: NotRequired[float]


@stage("distance.measure", version=4)
def measure(
    out: Path,
    policy: Policy,
    others: dict[str, Policy],
    prompts: Prompts,
    decoding: Decoding,
    compute: Compute,
    memory: Memory,
) -> Distances:
    """Estimate the KL to each of `others` (by name: `base`, `reference`), on the prompts for it.

    Writes `kl.jsonl`: suite and prompt as in `answers.jsonl`, tokens, and nats
    per answer to each of `others` that speaks in the same tokens; between policies of different vocabularies there is
    no KL.

    Args:
        decoding: `Decoding.sampled`, or this is no KL.
    """
    rows = list(jsonl.read(prompts.path / f"{ASKED}.jsonl"))
    turns = [messages(row["prompt"]) for row in rows]
    # vLLM loads the weights by itself and needs all the memory: ours are then loaded after it has answered
    own = own_model(policy, decoding, compute)
    sampled = answers_to(policy, own, [(prompt, 0) for prompt in turns], decoding, compute, memory, out)
    model, tokenizer = own or load(policy, compute)
    texts = prompt_texts(tokenizer, turns)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    sequences = [(prompt, answer.ids) for prompt, answer in zip(ids, sampled, strict=True)]
    others = {name: other for name, other in others.items() if _words(other) == _words(policy)}
    to = {policy.digest: [0.0] * len(sequences)}  # by digest: the first step's reference is the base
    for other in others.values():
        if other.digest not in to:
            to[other.digest] = kl(model, load(other, compute)[0], sequences)
    jsonl.write(
        out / "kl.jsonl",
        (
            {"suite": row["suite"], "prompt": row["prompt"], "tokens": len(ids)}
            | {name: to[o.digest][i] for name, o in others.items()}
            for i, (row, (_, ids)) in enumerate(zip(rows, sequences, strict=True))
        ),
    )
    return Distances(path=out, digest=file_digest(out / "kl.jsonl"), policy=policy.digest)


def table(distances: Distances) -> list[DistanceRow]:
    """Return the rows of `kl.jsonl`."""
    return [cast(DistanceRow, row) for row in jsonl.read(distances.path / "kl.jsonl")]


def kl(
    policy: "PreTrainedModel", other: "PreTrainedModel", sequences: list[tuple[list[int], list[int]]]
) -> list[float]:
    """Return Σ_t KL(π(·|x,y_<t) ‖ π'(·|x,y_<t)) in nats for each (prompt ids, answer ids) that π sampled.

    The whole vocabulary is summed at every position, so the only noise left is which answers were drawn.
    """
    import torch

    sums = []
    with frozen(policy), frozen(other):
        for prompt, answer in sequences:
            ids = torch.tensor([prompt + answer], device=policy.device)
            hidden = [
                model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
                for model in (policy, other)
            ]
            logits = [project(model, states) for model, states in zip((policy, other), hidden, strict=True)]
            words = min(scores.shape[-1] for scores in logits)  # one vocabulary may be padded further than the other
            own, others = (scores[:, :words].double().log_softmax(-1) for scores in logits)
            sums.append(float((own.exp() * (own - others)).sum()))
    return sums


def _words(policy: Policy) -> str:
    """Return what names the vocabulary of a policy; its template may differ."""
    file = policy.path / "tokenizer.json"
    return file_digest(file) if file.exists() else policy.vocabulary
