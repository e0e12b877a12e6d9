"""What every training has in common, whatever its loss: how it starts, TRL's arguments, and how it ends."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.alignment import fused_head, guards
from models.alignment.batching import moves_nothing
from models.alignment.checkpoints import clear, newest
from models.artifacts import Policy, Reference
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy import weights as policies
from models.policy.logprobs import Row, Tokens, logps
from models.policy.weights import device_kind, load, save
from models.recipe import Compute, Step, Training, kl_weight

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from models.alignment.curve import TrainingMonitor

PROBES = 4
"""Rows whose log-probs are stored with every policy, to show that what is loaded is what was saved."""


class Scored:
    """A trainer whose rows already hold token ids and the reference's log-probs: TRL has nothing to prepare."""

    def _prepare_dataset(self, dataset: "Dataset", *_: Any) -> "Dataset":
        return dataset

    def _precompute_ref_logps(self, dataset: "Dataset", *_: Any) -> "Dataset":
        return dataset


def start(
    policy: Policy, reference: Reference, config: Step, compute: Compute
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase, list[Row]]":
    """Load the policy and its rows, and show that what is loaded is the policy of the step before."""
    guards.same_policy(policy, reference, config.metric)
    model, tokenizer = load(policy, compute)
    rows = list(jsonl.read(reference.path / "train.jsonl"))
    if not rows:
        raise BadData(f"{config.metric} step: no row to train on")
    guards.answers_are_seen((ids for row in rows for (_, ids), _ in guards.scored(row)), f"{config.metric} step")
    guards.answers_differ(rows, config.metric)
    guards.reproduces_probe(policy, model, tokenizer.pad_token_id)
    guards.starts_at_reference(model, rows[:PROBES], tokenizer.pad_token_id)
    return model, tokenizer, rows


def finish(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    policy: Policy,
    config: Step,
    lambda_: float,
    beta: float,
    rows: list[Row],
    out: Path,
) -> Policy:
    """Save the trained policy, with the log-probs by which the next step will recognise it."""
    probes = [sequence for row in rows[:PROBES] for sequence, _ in guards.scored(row)]
    model, found = _merged(model, probes, tokenizer.pad_token_id)
    guards.write_probe(probes, found, out)
    save(model, tokenizer, out)
    clear(out)
    aligned = policies.describe(
        out,
        Policy(
            path=out,
            digest="",
            name=_name(policy, config, lambda_),
            kind="step",
            step=policy.step + 1,
            metric=config.metric,
            method=config.method.value,
            parents=(policy.digest,),
            beta=beta,
            lambda_=lambda_,
            beta_over_lambda=kl_weight(beta, lambda_),
            rows=len(rows),
        ),
    )
    if aligned.vocabulary != policy.vocabulary:
        raise BadPolicy(f"{config.metric} step: vocabulary or template changed during the step")
    return aligned


def _name(policy: Policy, config: Step, lambda_: float) -> str:
    """Return `helpful`, `harmless λ=0.4`, …; a name is the same whatever else the grid holds."""
    own = config.metric if policy.step == 0 and lambda_ == 1 else f"{config.metric} λ={lambda_:g}"
    return f"{policy.name} · {own}" if "λ" in policy.name else own


def arguments(config: Training, places: int, seed: int, compute: Compute, out: Path) -> dict[str, Any]:
    """Return what every trainer is told, whatever its loss."""
    on_cpu = device_kind(compute.device) == "cpu"
    if why := moves_nothing(places // config.batch, config):
        raise BadData(f"{config.metric} step: {why}" if isinstance(config, Step) else f"sft: {why}")
    return {
        "output_dir": str(out),
        "per_device_train_batch_size": config.micro_batch or config.batch,
        "gradient_accumulation_steps": config.accumulate,
        "train_sampling_strategy": "sequential",  # the rows come in our order
        "max_steps": places // config.batch,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.schedule.value,
        "warmup_steps": config.warmup,
        "max_grad_norm": config.max_grad_norm,
        "weight_decay": config.weight_decay,
        "seed": seed,
        "use_cpu": on_cpu,
        "bf16": not on_cpu,  # float32 weights under bfloat16 autocast: small updates are not rounded away
        "activation_checkpointing": not on_cpu,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
    }


def fit(trainer: Any, curve: "TrainingMonitor", compute: Compute, out: Path) -> None:
    """Train from the newest checkpoint, if a killed run left one."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # prints each update to stdout, where `progress.jsonl` has it already
    if device_kind(compute.device) == "cpu":
        fused_head.add(inner(trainer.model))
    with curve.defer_sigterm():
        trainer.train(resume_from_checkpoint=newest(out))
    curve.finish()


def inner(model: Any) -> "PreTrainedModel":
    """Return the causal language model inside an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def adapter(config: Step) -> Any:
    """Return LoRA's settings for all linear layers, or none for full fine-tuning."""
    if not config.adapter_rank:
        return None
    from peft import LoraConfig

    alpha = config.adapter_alpha or 2 * config.adapter_rank
    return LoraConfig(r=config.adapter_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _merged(model: Any, probes: list[Tokens], pad: int) -> "tuple[PreTrainedModel, list[float]]":
    """Fold an adapter into the float32 weights, and return the probes' log-probs, which must stay as they were."""
    if not hasattr(model, "peft_config"):
        return model, logps(model, probes, pad)  # full fine-tuning
    before = logps(inner(model), probes, pad)
    merged: PreTrainedModel = model.merge_and_unload()
    after = logps(merged, probes, pad)
    guards.agree(after, before, "merging the adapter changed the policy")
    return merged, after
