"""Tokenised pairs with the log-probs of the reference policy: computed once, used for every λ of the grid."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.artifacts import Policy, Preferences, Reference, content_digest, file_digest
from models.errors import BadData
from models.policy import frozen, load
from models.preferences import pairs
from models.recipe import Compute, Data
from models.tokens import encode

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS = 8192
"""Tokens in one forward pass without gradients: enough to keep two cores busy, about 100 MB at 135 M parameters."""

Row = dict[str, Any]
"""prompt_ids, chosen_ids, rejected_ids; ref_chosen_logps, ref_rejected_logps (nats, summed over the answer)."""


def score(
    policy: Policy, preferences: Preferences, splits: list[str], data: Data, compute: Compute, out: Path
) -> Reference:
    """Tokenise these splits for this policy, add its log-probs, and write one JSONL per split.

    Raises:
        BadData: no pair fits into `data.max_tokens`.
    """
    model, tokenizer = load(policy, compute)
    counts: Counter[str] = Counter()
    for split in splits:
        rows, dropped = tokenise(tokenizer, preferences.path / f"{split}.jsonl", data.max_tokens)
        counts["dropped"] += dropped
        counts[split] = len(rows)
        logps = pair_logps(model, rows, tokenizer.pad_token_id)
        with (out / f"{split}.jsonl").open("w") as file:
            for row, (chosen, rejected) in zip(rows, logps, strict=True):
                file.write(json.dumps({**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}) + "\n")
    if not any(counts[split] for split in splits):
        raise BadData(f"no pair of {preferences.metric} fits into data.max_tokens = {data.max_tokens}")
    return Reference(
        path=out,
        digest=content_digest({split: file_digest(out / f"{split}.jsonl") for split in splits}),
        policy=policy.digest,
        preferences=preferences.digest,
        counts=dict(counts),
    )


def tokenise(tokenizer: "PreTrainedTokenizerBase", path: Path, max_tokens: int) -> tuple[list[Row], int]:
    """Return the token ids of a split, and how many pairs were longer than `max_tokens` and dropped.

    A cut answer would lose its EOS, a cut prompt its question; so a long pair is dropped whole, and counted.
    """
    found = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs(path)]
    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, (chosen, rejected) in encode(tokenizer, found)
        if len(prompt) + max(len(chosen), len(rejected)) <= max_tokens
    ]
    return rows, len(found) - len(rows)


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of one split file."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)


def pair_logps(model: "PreTrainedModel", rows: list[Row], pad: int) -> list[tuple[float, float]]:
    """Return (log π(chosen|prompt), log π(rejected|prompt)) per row, in nats, in the order of the rows.

    Batches hold rows of similar length, so that little is padded, and at most TOKENS tokens.
    """
    order = sorted(range(len(rows)), key=lambda i: max(_lengths(rows[i])))
    logps: list[tuple[float, float]] = [(0.0, 0.0)] * len(rows)
    with frozen(model):
        for block in _blocks(order, [max(_lengths(row)) for row in rows]):
            sequences = [
                (rows[i]["prompt_ids"], rows[i][side]) for side in ("chosen_ids", "rejected_ids") for i in block
            ]
            values = answer_logps(model, sequences, pad).tolist()
            for place, i in enumerate(block):
                logps[i] = (values[place], values[place + len(block)])
    return logps


def _lengths(row: Row) -> tuple[int, int]:
    prompt = len(row["prompt_ids"])
    return prompt + len(row["chosen_ids"]), prompt + len(row["rejected_ids"])


def _blocks(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Cut rows sorted by length into blocks of two sequences per row and at most TOKENS tokens, padding included."""
    start = 0
    while start < len(order):
        size = 1
        while start + size < len(order) and 2 * (size + 1) * lengths[order[start + size]] <= TOKENS:
            size += 1
        yield order[start : start + size]
        start += size


def answer_logps(
    model: "PreTrainedModel", sequences: Iterable[tuple[list[int], list[int]]], pad: int
) -> "torch.Tensor":
    """Return Σ_t log π(y_t | x, y_<t) over the answer tokens, EOS included, of each (prompt, answer). Shape (n,), nats.

    Only the answer's positions are projected onto the vocabulary.
    """
    import torch
    from torch.nn.functional import cross_entropy

    batch = list(sequences)
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.full((len(batch), width), pad)
    attended = torch.zeros((len(batch), width), dtype=torch.long)
    answered = torch.zeros((len(batch), width), dtype=torch.bool)
    for i, (prompt, answer) in enumerate(batch):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        attended[i, :end] = 1
        answered[i, len(prompt) : end] = True
    ids, attended, answered = (t.to(model.device) for t in (ids, attended, answered))
    hidden = model.base_model(input_ids=ids, attention_mask=attended, use_cache=False).last_hidden_state
    predicts = answered[:, 1:]
    logits = model.get_output_embeddings()(hidden[:, :-1][predicts]).float()
    tokens = cross_entropy(logits, ids[:, 1:][predicts], reduction="none").neg()
    sums = torch.zeros(len(batch), dtype=tokens.dtype, device=tokens.device)
    return sums.index_add(0, predicts.nonzero()[:, 0], tokens)
