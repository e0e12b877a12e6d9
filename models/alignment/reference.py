"""Tokenised rows with the log-probs of the reference policy: computed once, used for every λ of the grid."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from models.alignment.batching import mismatched, stratified
from models.artifacts import Policy, Preferences, Reference, content_digest, file_digest
from models.data.dialogue import Message, encode_each
from models.data.preferences import TRAIN, judged, pairs, refuse_one_kind
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy.logprobs import Row, logps, pair_logps
from models.policy.weights import load
from models.recipe import Compute, Data, Step
from models.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED = ("line", "tokens", "prompt")
"""Of a row in `too_long.jsonl`, beside its split."""


@stage("reference.score", version=3)
def score(
    out: Path, policy: Policy, preferences: Preferences, splits: list[str], data: Data, compute: Compute
) -> Reference:
    """Tokenise the pairs of these splits for this policy, add its log-probs, and write one JSONL per split.

    `card.json` says how many tokens the rows have, `too_long.jsonl` which were too long, and `unwritable.jsonl` which
    the chat template refuses.

    Raises:
        BadPolicy: the chat template refuses all rows.
        BadData: no pair fits into `data.max_tokens`; held-out pairs are scored first, before anything is trained.
    """
    model, tokenizer = load(policy, compute)
    counts: Counter[str] = Counter()
    lengths = {}
    left_out: list[Row] = []
    unwritable: list[Row] = []
    for split in splits:
        rows, long, refused = tokenise(tokenizer, preferences.path / f"{split}.jsonl", data.max_tokens)
        unwritable += [{"split": split, **row} for row in refused]
        left_out += [{"split": split} | {key: row[key] for key in NAMED} for row in long]
        counts[split] = len(rows)
        lengths[split] = {
            side: histogram(len(row[f"{side}_ids"]) for row in rows + long) for side in ("prompt", "chosen", "rejected")
        }
        logps = pair_logps(model, rows, tokenizer.pad_token_id)
        scored = [
            {**row, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
            for row, (chosen, rejected) in zip(rows, logps, strict=True)
        ]
        jsonl.write(out / f"{split}.jsonl", scored)
    if unwritable and not left_out and not sum(counts.values()):
        raise BadPolicy(unwritable[0]["why"])
    if left_out and not sum(counts.values()):
        raise BadData(_too_long(preferences.metric, "pair", data))
    counts["dropped"] = len(left_out) + len(unwritable)
    _card(out, preferences, data, lengths, left_out, unwritable)
    return _described(policy, preferences, splits, counts, out)


@stage("reference.score_unpaired", version=3)
def score_unpaired(
    out: Path, policy: Policy, preferences: Preferences, step: Step, seed: int, data: Data, compute: Compute
) -> Reference:
    """Write `train.jsonl` in the order of a KTO training, with the log-probs of this policy.

    Every row carries the answer of another prompt of its batch: KTO estimates KL(π‖π_reference) from such mismatched
    pairs (Ethayarajh et al. 2024, section 4.1), and both sides of that estimate need log-probs.

    Raises:
        BadData: no row fits into `data.max_tokens`, or all rows have one label.
    """
    model, tokenizer = load(policy, compute)
    found = list(judged(preferences.path / "train.jsonl"))
    encoded = encode_each(tokenizer, [(row.prompt, [row.answer]) for row in found])
    every: list[Row] = []
    rows: list[Row] = []
    left_out: list[Row] = []
    unwritable: list[Row] = []
    for line, (answer, one) in enumerate(zip(found, encoded, strict=True), 1):
        if isinstance(one, BadPolicy):
            unwritable.append({"split": TRAIN[0], **_refused(line, one, answer.prompt)})
            continue
        prompt, (completion,) = one
        every.append({"prompt_ids": prompt, "completion_ids": completion, "label": answer.desirable})
        size = len(prompt) + len(completion)
        if size <= data.max_tokens:
            rows.append(every[-1])
        else:
            left_out.append({"split": TRAIN[0]} | _named(line, size, answer.prompt))
    labels = [bool(row["label"]) for row in rows]
    if unwritable and not every:
        raise BadPolicy(unwritable[0]["why"])
    if every and not rows:
        raise BadData(_too_long(preferences.metric, "answer", data))
    refuse_one_kind(preferences, labels)
    pad = tokenizer.pad_token_id
    scored = [
        {**row, "ref_logps": logp}
        for row, logp in zip(
            rows, logps(model, [(r["prompt_ids"], r["completion_ids"]) for r in rows], pad), strict=True
        )
    ]
    places = stratified(labels, step, seed)
    other = mismatched([rows[i]["prompt_ids"] for i in places], step.micro_batch or step.batch)
    ordered = [
        {**scored[i], "KL_completion_ids": rows[places[j]]["completion_ids"]}
        for i, j in zip(places, other, strict=True)
    ]
    crossed = logps(model, [(row["prompt_ids"], row["KL_completion_ids"]) for row in ordered], pad)
    jsonl.write(
        out / "train.jsonl", [{**row, "ref_KL_logps": logp} for row, logp in zip(ordered, crossed, strict=True)]
    )
    counts = Counter(train=len(rows), dropped=len(left_out) + len(unwritable), desirable=sum(labels))
    lengths = {side: histogram(len(row[f"{side}_ids"]) for row in every) for side in ("prompt", "completion")}
    _card(out, preferences, data, {"train": lengths}, left_out, unwritable)
    return _described(policy, preferences, list(TRAIN), counts, out)


def tokenise(
    tokenizer: "PreTrainedTokenizerBase", path: Path, max_tokens: int
) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the token ids of the pairs that are used, and of those longer than `max_tokens`, and what is refused.

    A cut answer would lose its EOS, a cut prompt its question; so a long pair is dropped whole, and named.
    """
    found = [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs(path)]
    fit: list[Row] = []
    long: list[Row] = []
    refused: list[Row] = []
    for line, one in enumerate(encode_each(tokenizer, found), 1):
        if isinstance(one, BadPolicy):
            refused.append(_refused(line, one, found[line - 1][0]))
            continue
        prompt, (chosen, rejected) = one
        row = {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        size = len(prompt) + max(len(chosen), len(rejected))
        if size <= max_tokens:
            fit.append(row)
        else:
            long.append(row | _named(line, size, found[line - 1][0]))
    return fit, long, refused


def histogram(lengths: Iterable[int]) -> dict[str, int]:
    """Return how many lengths, in tokens, lie between powers of two: `{"17–32": 5, "33–64": 12}`."""
    bins = Counter(max(0, length - 1).bit_length() for length in lengths)  # 17 to 32 have bit length 5
    return {f"{2 ** (bits - 1) + 1 if bits else 0}–{2**bits}": bins[bits] for bits in sorted(bins)}


def _too_long(metric: str, unit: str, data: Data) -> str:
    return f"no {unit} of {metric} fits into data.max_tokens = {data.max_tokens}; raise it, or give shorter rows"


def _named(line: int, size: int, prompt: list[Message]) -> Row:
    """Return by what a user finds a row that is too long: its line in the split's file, its tokens, its question."""
    return dict(zip(NAMED, (line, size, prompt[-1]["content"][:200]), strict=True))


def _refused(line: int, why: BadPolicy, prompt: list[Message]) -> Row:
    return {"line": line, "why": str(why), "prompt": prompt[-1]["content"][:200]}


def _card(
    out: Path,
    preferences: Preferences,
    data: Data,
    lengths: dict[str, dict[str, dict[str, int]]],
    left_out: list[Row],
    unwritable: list[Row],
) -> None:
    card = {"metric": preferences.metric, "max_tokens": data.max_tokens, "tokens": lengths}
    dropped = {"dropped_as_too_long": len(left_out), "dropped_as_unwritable": len(unwritable)}
    (out / "card.json").write_text(json.dumps(card | dropped, indent=1))
    jsonl.write(out / "too_long.jsonl", left_out)
    jsonl.write(out / "unwritable.jsonl", unwritable)


def _described(
    policy: Policy, preferences: Preferences, splits: list[str], counts: Counter[str], out: Path
) -> Reference:
    return Reference(
        path=out,
        digest=content_digest({split: file_digest(out / f"{split}.jsonl") for split in splits}),
        policy=policy.digest,
        preferences=preferences.digest,
        counts=dict(counts),
    )
