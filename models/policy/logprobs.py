"""Log-probs of answers under one policy, in nats: for references, for held-out pairs, and to prove what was saved."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from models.policy.shared_prompt import Group, states, tokens
from models.policy.weights import frozen, project

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

AT_ONCE = 8192
"""Tokens in one forward pass without gradients; at a vocabulary of 49,152 the logits of that many take 1.6 GB."""

Tokens = tuple[list[int], list[int]]
"""(prompt ids, answer ids)."""


class TokenPair(TypedDict):
    """Two answers to one prompt, as token ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def pair_logps(model: "PreTrainedModel", rows: Sequence[TokenPair], pad: int) -> list[tuple[float, float]]:
    """Return (log π(chosen|prompt), log π(rejected|prompt)) per row, in nats, in the order of the rows."""
    values = _logps(model, [(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows], pad)
    return [(chosen, rejected) for chosen, rejected in values]


def logps(model: "PreTrainedModel", sequences: Sequence[Tokens], pad: int) -> list[float]:
    """Return log π(answer|prompt) of each sequence, in nats, in their order.

    Where two that follow each other answer the same prompt, it is computed once for both.
    """
    groups: list[Group] = []
    for prompt, answer in sequences:
        if groups and groups[-1][0] == prompt and len(groups[-1][1]) == 1:
            groups[-1][1].append(answer)
        else:
            groups.append((prompt, [answer]))
    return [value for values in _logps(model, groups, pad) for value in values]


def _logps(model: "PreTrainedModel", groups: Sequence[Group], pad: int) -> list[list[float]]:
    """Return the log-probs of the answers of each group, in the order of the groups.

    Groups of similar length share a forward pass, so that little is padded.
    """
    lengths = [tokens(*group) for group in groups]
    values: list[list[float]] = [[] for _ in groups]
    with frozen(model):
        for block in _blocks(sorted(range(len(groups)), key=lengths.__getitem__), lengths):
            block_values = iter(answer_logps(model, [groups[i] for i in block], pad).tolist())
            for i in block:
                values[i] = [next(block_values) for _ in groups[i][1]]
    return values


def answer_logps(model: "PreTrainedModel", groups: Sequence[Group], pad: int) -> "torch.Tensor":
    """Return Σ_t log π(y_t | x, y_<t) over the tokens, EOS included, of each answer of each group. Shape (n,), nats.

    Only the answers' positions are projected onto the vocabulary.
    """
    import torch
    from torch.nn.functional import cross_entropy

    predicting = states(model, groups, pad)
    nats = cross_entropy(project(model, predicting.hidden), predicting.targets, reduction="none").neg()
    # float64: in float32 the order of 500 summands alone moves a log-prob by a thousandth of a nat
    nats = nats.double()
    count = sum(len(answers) for _, answers in groups)
    return torch.zeros(count, dtype=nats.dtype, device=nats.device).index_add(0, predicting.owner, nats)


def _blocks(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Cut sequences sorted by length into blocks of at most AT_ONCE tokens, padding included."""
    start = 0
    while start < len(order):
        size = 1
        while start + size < len(order) and (size + 1) * lengths[order[start + size]] <= AT_ONCE:
            size += 1
        yield order[start : start + size]
        start += size
