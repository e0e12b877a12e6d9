"""The method on single answers, each desirable or not: KTO (Ethayarajh et al. 2024)."""

from collections import Counter
from pathlib import Path

from models.alignment.batching import mismatched, stratified
from models.alignment.reference import card, described, histogram, named_row, refused_row, too_long
from models.alignment.trainer import Scored, adapter, arguments, finish, fit, start
from models.artifacts import Policy, Preferences, Reference
from models.data.dialogue import encode_each
from models.data.preferences import TRAIN, judged, refuse_one_kind
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy.logprobs import Row, logps
from models.policy.weights import load
from models.recipe import Compute, Data, Step, kl_weight
from models.stage import stage


@stage("reference.score_unpaired", version=3)
def score(
    out: Path, policy: Policy, preferences: Preferences, step: Step, seed: int, data: Data, compute: Compute
) -> Reference:
    """Write `train.jsonl` in the order of a KTO training, with the log-probs of this policy.

    Every row carries the answer of another prompt of its batch: KTO estimates KL(π‖π_reference) from such mismatched
    pairs (Ethayarajh et al. 2024, section 4.1), and both sides of that estimate need log-probs.

    Raises:
        BadData: no row fits into `data.max_tokens`, or all rows have one label.
    """
    model, tokenizer = load(policy, compute)
    answers = list(judged(preferences.path / "train.jsonl"))
    encoded = encode_each(tokenizer, [(row.prompt, [row.answer]) for row in answers])
    every: list[Row] = []
    rows: list[Row] = []
    left_out: list[Row] = []
    unwritable: list[Row] = []
    for line, (answer, tokens) in enumerate(zip(answers, encoded, strict=True), 1):
        if isinstance(tokens, BadPolicy):
            unwritable.append({"split": TRAIN[0], **refused_row(line, tokens, answer.prompt)})
            continue
        prompt, (completion,) = tokens
        every.append({"prompt_ids": prompt, "completion_ids": completion, "label": answer.desirable})
        size = len(prompt) + len(completion)
        if size <= data.max_tokens:
            rows.append(every[-1])
        else:
            left_out.append({"split": TRAIN[0]} | named_row(line, size, answer.prompt))
    labels = [bool(row["label"]) for row in rows]
    if unwritable and not every:
        raise BadPolicy(unwritable[0]["why"])
    if every and not rows:
        raise BadData(too_long(preferences.metric, "answer", data))
    refuse_one_kind(preferences, labels)
    pad = tokenizer.pad_token_id
    scored = [
        {**row, "ref_logps": logp}
        for row, logp in zip(
            rows, logps(model, [(r["prompt_ids"], r["completion_ids"]) for r in rows], pad), strict=True
        )
    ]
    places = stratified(labels, step, seed)
    # Within the micro-batch, since that is what TRL sees at once when it estimates the KL
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
    card(out, preferences, data, {"train": lengths}, left_out, unwritable)
    return described(policy, preferences, list(TRAIN), counts, out)


@stage("alignment.kto", version=1)
def train(
    out: Path,
    policy: Policy,
    reference: Reference,
    config: Step,
    lambda_: float,
    beta: float,
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

    class StepKTO(Scored, KTOTrainer):  # type: ignore[misc]
        """KTO on rows that already hold token ids and the reference's log-probs."""

    model, tokenizer, rows = start(policy, reference, config, compute)
    weight = kl_weight(beta, lambda_)
    desirable = sum(row["label"] for row in rows) / len(rows)
    curve = TrainingMonitor(out, config)
    trainer = StepKTO(
        model=model,
        args=KTOConfig(
            **arguments(config, len(rows), seed, compute, out),
            beta=weight,
            desirable_weight=max(1.0, (1 - desirable) / desirable),
            undesirable_weight=max(1.0, desirable / (1 - desirable)),
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[curve],
        peft_config=adapter(config),
    )
    fit(trainer, curve, compute, out)
    return finish(trainer.model, tokenizer, policy, config, lambda_, beta, rows, out)
