"""What every training has in common, whatever its loss: how it starts, TRL's arguments, and how it ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.alignment import fused_head, guards
from models.alignment.batching import moves_nothing
from models.alignment.checkpoints import clear, newest
from models.alignment.rows import ScoredRow, scored_answers
from models.artifacts import Policy, Reference
from models.errors import BadData, BadPolicy
from models.policy import weights as policies
from models.policy.logprobs import Tokens, logps
from models.policy.weights import device_kind, load, save
from models.recipe import Compute, Method, Objective, PreferenceTraining, Training

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from models.alignment.curve import TrainingMonitor

PROBES = 4
"""Rows whose log-probs are stored with every policy, to show that what is loaded is what was saved."""


class _WithStoredLogps:
    """What a trainer does whose rows already hold token ids and the reference's log-probs: TRL prepares nothing."""

    def _prepare_dataset(self, dataset: "Dataset", *_: Any) -> "Dataset":
        return dataset

    def _precompute_ref_logps(self, dataset: "Dataset", *_: Any) -> "Dataset":
        return dataset


def with_stored_logps(trainer: type[Any]) -> type[Any]:
    """Return a trainer of TRL for rows that already hold token ids and the reference's log-probs."""
    return type(f"{trainer.__name__}WithStoredLogps", (_WithStoredLogps, trainer), {})


def start(
    policy: Policy, reference: Reference, objective: Objective, rows: Sequence[ScoredRow], compute: Compute
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the policy, and show that what is loaded is the policy of the step before, and can learn from its rows."""
    guards.same_policy(policy, reference, objective.metric)
    if not rows:
        raise BadData(f"{objective.metric} step: no row to train on")
    model, tokenizer = load(policy, compute)
    answers = (ids for row in rows for (_, ids), _ in scored_answers(row))
    guards.answers_are_seen(answers, f"{objective.metric} step")
    guards.answers_differ(rows, objective.metric)
    guards.reproduces_probe(policy, model, tokenizer.pad_token_id)
    guards.starts_at_reference(model, rows[:PROBES], tokenizer.pad_token_id)
    return model, tokenizer


def finish(
    trainer: Any, policy: Policy, objective: Objective, method: Method, rows: Sequence[ScoredRow], out: Path
) -> Policy:
    """Save the trained policy, with the log-probs by which the next step will recognise it."""
    tokenizer = trainer.processing_class
    probes = [sequence for row in rows[:PROBES] for sequence, _ in scored_answers(row)]
    model, probe_logps = _merged(trainer.model, probes, tokenizer.pad_token_id)
    guards.write_probe(probes, probe_logps, out)
    save(model, tokenizer, out)
    clear(out)
    aligned = policies.describe(
        out,
        Policy(
            path=out,
            digest="",
            name=_name(policy, objective),
            kind="step",
            step=policy.step + 1,
            metric=objective.metric,
            method=method.value,
            parents=(policy.digest,),
            beta=objective.beta,
            lambda_=objective.lambda_,
            beta_over_lambda=objective.kl_weight,
            rows=len(rows),
        ),
    )
    if aligned.vocabulary != policy.vocabulary:
        raise BadPolicy(f"{objective.metric} step: vocabulary or template changed during the step")
    return aligned


def _name(policy: Policy, objective: Objective) -> str:
    """Return `helpful`, `harmless λ=0.4`, …; a name is the same whatever else the grid holds."""
    plain = policy.step == 0 and objective.lambda_ == 1
    own = objective.metric if plain else f"{objective.metric} λ={objective.lambda_:g}"
    return f"{policy.name} · {own}" if "λ" in policy.name else own


def arguments(training: Training, title: str, places: int, seed: int, compute: Compute, out: Path) -> dict[str, Any]:
    """Return what every trainer is told, whatever its loss.

    Raises:
        BadData: a training of so many places would leave the weights as they are.
    """
    on_cpu = device_kind(compute.device) == "cpu"
    if why := moves_nothing(places // training.batch, training):
        raise BadData(f"{title}: {why}")
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": training.micro_batch or training.batch,
        "gradient_accumulation_steps": training.accumulate,
        "train_sampling_strategy": "sequential",  # the rows come in our order
        "max_steps": places // training.batch,
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": training.schedule.value,
        "warmup_steps": training.warmup,
        "max_grad_norm": training.max_grad_norm,
        "weight_decay": training.weight_decay,
        "seed": seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,  # float32 weights under bfloat16 autocast: small updates are not rounded away
        "activation_checkpointing": not on_cpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": training.save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
    }


def fit(trainer: Any, curve: "TrainingMonitor", compute: Compute, out: Path) -> None:
    """Train from the newest checkpoint, if a killed run left one."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # it prints each update to stdout, and `progress.jsonl` has them already
    if device_kind(compute.device) == "cpu":
        fused_head.add(inner(trainer.model))
    with curve.defer_sigterm():
        trainer.train(resume_from_checkpoint=newest(out))
    curve.finish()


def inner(model: Any) -> "PreTrainedModel":
    """Return the causal language model inside an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def adapter(training: PreferenceTraining) -> Any:
    """Return LoRA's settings for all linear layers, or none for full fine-tuning."""
    if not training.adapter_rank:
        return None
    from peft import LoraConfig

    alpha = training.adapter_alpha or 2 * training.adapter_rank
    return LoraConfig(r=training.adapter_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _merged(model: Any, probes: list[Tokens], pad: int) -> "tuple[PreTrainedModel, list[float]]":
    """Fold an adapter into the float32 weights, and return the probes' log-probs, which must stay as they were."""
    if not hasattr(model, "peft_config"):
        return model, logps(model, probes, pad)  # full fine-tuning has no adapter to merge
    before = logps(inner(model), probes, pad)
    merged: PreTrainedModel = model.merge_and_unload()
    after = logps(merged, probes, pad)
    guards.agree(after, before, "merging the adapter changed the policy")
    return merged, after
