"""Tokenised rows with the log-probs of the reference policy: computed once, used for every λ of the grid."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from models.alignment.rows import ScoredPair
from models.artifacts import Policy, Preferences, Reference, content_digest, file_digest
from models.data.dialogue import Message, encode_each
from models.data.preferences import pairs_of
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy.logprobs import TokenPair, pair_logps
from models.policy.weights import load
from models.recipe import Compute
from models.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LongRow(TypedDict):
    """By what a user finds a row that is too long: a row of `too_long.jsonl`."""

    split: str
    line: int
    """In the split's file."""
    tokens: int
    prompt: str
    """The beginning of the question."""


class RefusedRow(TypedDict):
    """By what a user finds a row that the chat template refuses: a row of `unwritable.jsonl`."""

    split: str
    line: int
    why: str
    prompt: str


@stage("reference.score", version=3)
def score(
    out: Path, policy: Policy, preferences: Preferences, splits: list[str], max_tokens: int, compute: Compute
) -> Reference:
    """Tokenise the pairs of these splits for this policy, add its log-probs, and write one JSONL per split.

    `card.json` says how many tokens the rows have, `too_long.jsonl` which were too long, and `unwritable.jsonl` which
    the chat template refuses.

    Args:
        max_tokens: of the longest pair that is used; the recipe's `data.max_tokens`.

    Raises:
        BadPolicy: the chat template refuses all rows.
        BadData: no pair fits into `max_tokens`; held-out pairs are scored first, before anything is trained.
    """
    model, tokenizer = load(policy, compute)
    counts: Counter[str] = Counter()
    lengths = {}
    left_out: list[LongRow] = []
    unwritable: list[RefusedRow] = []
    for split in splits:
        rows, long, refused = tokenise(tokenizer, preferences.path / f"{split}.jsonl", max_tokens)
        every = rows + [row for row, _ in long]
        unwritable += refused
        left_out += [name for _, name in long]
        counts[split] = len(rows)
        lengths[split] = {
            "prompt": histogram(len(row["prompt_ids"]) for row in every),
            "chosen": histogram(len(row["chosen_ids"]) for row in every),
            "rejected": histogram(len(row["rejected_ids"]) for row in every),
        }
        logps = pair_logps(model, rows, tokenizer.pad_token_id)
        scored: list[ScoredPair] = [
            {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for row, (chosen, rejected) in zip(rows, logps, strict=True)
        ]
        jsonl.write(out / f"{split}.jsonl", scored)
    if unwritable and not left_out and not sum(counts.values()):
        raise BadPolicy(unwritable[0]["why"])
    if left_out and not sum(counts.values()):
        raise BadData(too_long(preferences.metric, "pair", max_tokens))
    counts["dropped"] = len(left_out) + len(unwritable)
    card(out, preferences, max_tokens, lengths, left_out, unwritable)
    return described(policy, preferences, splits, counts, out)


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", path: Path, max_tokens: int
) -> tuple[list[TokenPair], list[tuple[TokenPair, LongRow]], list[RefusedRow]]:
    """Return the token ids of the pairs that are used, and of those longer than `max_tokens`, and what is refused.

    A cut answer would lose its EOS, a cut prompt its question; so a long pair is dropped whole, and named.
    """
    dialogues = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs_of(path)]
    short: list[TokenPair] = []
    long: list[tuple[TokenPair, LongRow]] = []
    refused: list[RefusedRow] = []
    for line, ids in enumerate(encode_each(tokenizer, dialogues), 1):
        messages = dialogues[line - 1][0]
        if isinstance(ids, BadPolicy):
            refused.append(refused_row(path.stem, line, ids, messages))
            continue
        prompt, (chosen, rejected) = ids
        row: TokenPair = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        # a pair is as long as its longer side: both sides are trained on, or neither
        size = len(prompt) + max(len(chosen), len(rejected))
        if size <= max_tokens:
            short.append(row)
        else:
            long.append((row, long_row(path.stem, line, size, messages)))
    return short, long, refused


def histogram(lengths: Iterable[int]) -> dict[str, int]:
    """Return how many lengths, in tokens, lie between powers of two: `{"17–32": 5, "33–64": 12}`."""
    bins = Counter(max(0, length - 1).bit_length() for length in lengths)  # 17 to 32, less 1, have bit length 5
    return {f"{2 ** (bits - 1) + 1 if bits else 0}–{2**bits}": bins[bits] for bits in sorted(bins)}


def too_long(metric: str, unit: str, max_tokens: int) -> str:
    """Say that no row is left of those that were to be scored."""
    return f"no {unit} of {metric} fits into data.max_tokens = {max_tokens}; raise it, or give shorter rows"


def long_row(split: str, line: int, size: int, prompt: list[Message]) -> LongRow:
    """Return by what a user finds a row that is too long."""
    return {"split": split, "line": line, "tokens": size, "prompt": prompt[-1]["content"][:200]}


def refused_row(split: str, line: int, why: BadPolicy, prompt: list[Message]) -> RefusedRow:
    """Return by what a user finds a row that the chat template refuses, and why."""
    return {"split": split, "line": line, "why": str(why), "prompt": prompt[-1]["content"][:200]}


def card(
    out: Path,
    preferences: Preferences,
    max_tokens: int,
    lengths: dict[str, dict[str, dict[str, int]]],
    left_out: list[LongRow],
    unwritable: list[RefusedRow],
) -> None:
    """Write how many tokens the rows have, and which were left out."""
    card = {"metric": preferences.metric, "max_tokens": max_tokens, "tokens": lengths}
    dropped = {"dropped_as_too_long": len(left_out), "dropped_as_unwritable": len(unwritable)}
    (out / "card.json").write_text(json.dumps(card | dropped, indent=1))
    jsonl.write(out / "too_long.jsonl", left_out)
    jsonl.write(out / "unwritable.jsonl", unwritable)


def described(
    policy: Policy, preferences: Preferences, splits: list[str], counts: Counter[str], out: Path
) -> Reference:
    """Return the noun of what was written to `out`."""
    return Reference(
        path=out,
        digest=content_digest({split: file_digest(out / f"{split}.jsonl") for split in splits}),
        policy=policy.digest,
        preferences=preferences.digest,
        counts=dict(counts),
    )
