"""The optional supervised step before the method: prompt and answer, with the loss on the answer only."""

from dataclasses import replace
from pathlib import Path

from models.alignment import guards
from models.alignment.batching import order
from models.alignment.checkpoints import clear
from models.alignment.trainer import PROBES, arguments, fit
from models.artifacts import Policy, Sources
from models.data import sft_corpus
from models.policy import weights as policies
from models.policy.logprobs import logps
from models.policy.weights import load, save
from models.recipe import Compute, Data, Training
from models.stage import stage


@stage("alignment.sft", version=3)
def train(
    out: Path, policy: Policy, sources: Sources, training: Training, data: Data, seed: int, compute: Compute
) -> Policy:
    """Fine-tune on prompt and answer, with the loss on the answer only; returns the new base.

    Rows that stand in a suite, or that the chat template refuses, are left out and named in `left_out.jsonl`. Resumes
    from the newest checkpoint in `out`.

    Raises:
        BadData: the corpus is missing or empty, a row cannot be used, or prompts stand in a suite.
        BadPolicy: the chat template refuses all rows.
        BrokenInvariant: loss or gradient is not finite.
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from models.alignment.curve import TrainingMonitor

    model, tokenizer = load(policy, compute)
    encoded = sft_corpus.tokenise(tokenizer, sources, data, out)
    guards.answers_are_seen((answer for _, answer in encoded), "sft")
    # the first step recognises its base by these, as a later step recognises the one before it
    probes = encoded[:PROBES]
    rows = [{"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in encoded]
    places = order([len(row["input_ids"]) for row in rows], training, seed)
    curve = TrainingMonitor(out, training)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(training, "sft", len(places), seed, compute, out), max_length=None, completion_only_loss=True
        ),
        train_dataset=Dataset.from_list([rows[i] for i in places]),
        processing_class=tokenizer,
        callbacks=[curve],
    )
    fit(trainer, curve, compute, out)
    guards.write_probe(probes, logps(trainer.model, probes, tokenizer.pad_token_id), out)
    save(trainer.model, tokenizer, out)
    clear(out)
    return policies.describe(out, replace(policy, parents=(policy.digest,), method="sft", rows=len(rows)))
