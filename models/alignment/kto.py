"""The method on single answers, each desirable or not: KTO (Ethayarajh et al. 2024)."""

from collections import Counter
from pathlib import Path

from models.alignment.batching import mismatched, stratified
from models.alignment.reference import (
    LongRow,
    RefusedRow,
    card,
    described,
    histogram,
    long_row,
    refused_row,
    too_long,
)
from models.alignment.rows import ScoredAnswer, TokenAnswer, read
from models.alignment.trainer import adapter, arguments, finish, fit, start, with_stored_logps
from models.artifacts import Policy, Preferences, Reference
from models.data.dialogue import encode_each
from models.data.preferences import TRAIN, answers_of, refuse_one_kind
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy.logprobs import logps
from models.policy.weights import load
from models.recipe import Compute, Method, Objective, PreferenceTraining
from models.stage import stage

CURVE = {"loss": "loss", "chosen": "desirable answers (nats)", "rejected": "undesirable answers (nats)"}
"""Column of `progress.jsonl` → title of its panel. KTO has no margin of pairs: its rows are single answers."""


@stage("reference.score_unpaired", version=3)
def score(
    out: Path,
    policy: Policy,
    preferences: Preferences,
    training: PreferenceTraining,
    seed: int,
    max_tokens: int,
    compute: Compute,
) -> Reference:
    """Write `train.jsonl` in the order of a KTO training, with the log-probs of this policy.

    Every row carries the answer of another prompt of its batch: KTO estimates KL(π‖π_reference) from such mismatched
    pairs (Ethayarajh et al. 2024, section 4.1), and both sides of that estimate need log-probs.

    Raises:
        BadData: no row fits into `max_tokens`, or all rows have one label.
    """
    model, tokenizer = load(policy, compute)
    answers = list(answers_of(preferences.path / "train.jsonl"))
    encoded = encode_each(tokenizer, [(answer.prompt, [answer.answer]) for answer in answers])
    every: list[TokenAnswer] = []
    rows: list[TokenAnswer] = []
    left_out: list[LongRow] = []
    unwritable: list[RefusedRow] = []
    for line, (answer, ids) in enumerate(zip(answers, encoded, strict=True), 1):
        if isinstance(ids, BadPolicy):
            unwritable.append(refused_row(TRAIN[0], line, ids, answer.prompt))
            continue
        prompt, (completion,) = ids
        every.append({"prompt_ids": prompt, "completion_ids": completion, "label": answer.desirable})
        size = len(prompt) + len(completion)
        if size <= max_tokens:
            rows.append(every[-1])
        else:
            left_out.append(long_row(TRAIN[0], line, size, answer.prompt))
    labels = [row["label"] for row in rows]
    if unwritable and not every:
        raise BadPolicy(unwritable[0]["why"])
    if every and not rows:
        raise BadData(too_long(preferences.metric, "answer", max_tokens))
    refuse_one_kind(preferences, labels)
    pad = tokenizer.pad_token_id
    own = logps(model, [(row["prompt_ids"], row["completion_ids"]) for row in rows], pad)
    places = stratified(labels, training, seed)
    # partners come from one micro-batch, since that is what TRL sees at once when it estimates the KL
    other = mismatched([rows[i]["prompt_ids"] for i in places], training.micro_batch or training.batch)
    crossings = [(i, rows[places[j]]["completion_ids"]) for i, j in zip(places, other, strict=True)]
    crossed = logps(model, [(rows[i]["prompt_ids"], ids) for i, ids in crossings], pad)
    training_rows: list[ScoredAnswer] = [
        {**rows[i], "ref_logps": own[i], "KL_completion_ids": ids, "ref_KL_logps": logp}
        for (i, ids), logp in zip(crossings, crossed, strict=True)
    ]
    jsonl.write(out / "train.jsonl", training_rows)
    counts = Counter(train=len(rows), dropped=len(left_out) + len(unwritable), desirable=sum(labels))
    lengths = {
        "prompt": histogram(len(row["prompt_ids"]) for row in every),
        "completion": histogram(len(row["completion_ids"]) for row in every),
    }
    card(out, preferences, max_tokens, {"train": lengths}, left_out, unwritable)
    return described(policy, preferences, list(TRAIN), counts, out)


@stage("alignment.kto", version=1)
def train(
    out: Path,
    policy: Policy,
    reference: Reference,
    objective: Objective,
    training: PreferenceTraining,
    seed: int,
    compute: Compute,
) -> Policy:
    """Train one policy by KTO from, and against, the policy of the step before, on single answers.

    λ is a knob here, not the multiplier of Theorem 1: log Y(x) cancels in pairwise losses only. The rows come shuffled,
    unpaired and mismatched from `score`; the classes are balanced by weights, once.

    Args and Raises as in `dpo`.
    """
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from models.alignment.curve import TrainingMonitor

    rows = read(reference, ScoredAnswer)
    model, tokenizer = start(policy, reference, objective, rows, compute)
    desirable = sum(row["label"] for row in rows) / len(rows)
    curve = TrainingMonitor(out, training)
    trainer = with_stored_logps(KTOTrainer)(
        model=model,
        args=KTOConfig(
            **arguments(training, f"{objective.metric} step", len(rows), seed, compute, out),
            beta=objective.kl_weight,
            # the rarer kind weighs more, so that both kinds have the same total weight
            desirable_weight=max(1.0, (1 - desirable) / desirable),
            undesirable_weight=max(1.0, desirable / (1 - desirable)),
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[curve],
        peft_config=adapter(training),
    )
    fit(trainer, curve, compute, out)
    return finish(trainer, policy, objective, Method.kto, rows, out)
