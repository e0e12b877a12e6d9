"""One step of SACPO: move a policy along one preference, anchored to the policy of the step before.

    reward step   π_r       = dpo(reference = base, KL weight β,   comparisons by helpfulness)
    safety step   π_{r+λg}  = dpo(reference = π_r,  KL weight β/λ, comparisons by harmlessness)      (eq. 11)

TRL trains. What is ours: the reference is exactly the saved weights of the step before, its log-probs are computed
once for the whole λ grid, and a run that breaks either stops with a sentence.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.alignment import fused_head, guards
from models.alignment.batching import moves_nothing, order
from models.alignment.checkpoints import clear, newest
from models.artifacts import Policy, Reference, Sources
from models.data import sft_corpus
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy import weights as policies
from models.policy.logprobs import Row, Tokens, logps
from models.policy.shared_prompt import tokens
from models.policy.weights import device_kind, load, save
from models.recipe import Compute, Data, Sft, Step, Training, kl_weight
from models.stage import stage

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from models.alignment.curve import TrainingMonitor

PROBES = 4
"""Rows whose log-probs are stored with every policy, to show that what is loaded is what was saved."""


@stage("alignment.sft", version=3)
def sft(out: Path, policy: Policy, sources: Sources, config: Sft, data: Data, seed: int, compute: Compute) -> Policy:
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
    probes = encoded[:PROBES]
    rows = [{"input_ids": p + a, "completion_mask": [0] * len(p) + [1] * len(a)} for p, a in encoded]
    places = order([len(row["input_ids"]) for row in rows], config, seed)
    curve = TrainingMonitor(out, config)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **_arguments(config, len(places), seed, compute, out), max_length=None, completion_only_loss=True
        ),
        train_dataset=Dataset.from_list([rows[i] for i in places]),
        processing_class=tokenizer,
        callbacks=[curve],
    )
    _train(trainer, curve, compute, out)
    guards.write_probe(probes, logps(trainer.model, probes, tokenizer.pad_token_id), out)
    save(trainer.model, tokenizer, out)
    clear(out)
    return policies.describe(out, replace(policy, parents=(policy.digest,), method="sft", rows=len(rows)))


@stage("alignment.dpo", version=2)
def dpo(
    out: Path,
    policy: Policy,
    reference: Reference,
    config: Step,
    lambda_: float,
    beta: float,
    seed: int,
    compute: Compute,
) -> Policy:
    """Train one policy by DPO from, and against, the policy of the step before (SACPO Algorithm 1).

    Args:
        policy: where training starts; must be the very policy that `reference` was computed with.
        reference: tokenised pairs with log π_reference of both answers.
        lambda_: the step's multiplier; the KL weight handed to DPO is β/λ.
        out: gets weights, tokenizer, `progress.jsonl` and `probe.json`.

    Raises:
        BrokenInvariant: the reference is not the policy of the step before; log-probs moved on disk; NaN.
        BadData: no pair to train on.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from models.alignment.curve import TrainingMonitor

    class StepDPO(_Scored, DPOTrainer):  # type: ignore[misc]
        """DPO on rows that already hold token ids and the reference's log-probs."""

    model, tokenizer, rows = _start(policy, reference, config, compute)
    weight = kl_weight(beta, lambda_)
    places = order([tokens(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows], config, seed)
    curve = TrainingMonitor(out, config)
    trainer = StepDPO(
        model=model,
        args=DPOConfig(
            **_arguments(config, len(places), seed, compute, out),
            beta=weight,
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list([rows[i] for i in places]),
        processing_class=tokenizer,
        callbacks=[curve],
        peft_config=_adapter(config),
    )
    _train(trainer, curve, compute, out)
    return _end(trainer.model, tokenizer, policy, config, lambda_, beta, rows, out)


@stage("alignment.kto", version=1)
def kto(
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
    unpaired and mismatched from `reference.score_unpaired`; the classes are balanced by weights, once.

    Args and Raises as in `dpo`.
    """
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    from models.alignment.curve import TrainingMonitor

    class StepKTO(_Scored, KTOTrainer):  # type: ignore[misc]
        """KTO on rows that already hold token ids and the reference's log-probs."""

    model, tokenizer, rows = _start(policy, reference, config, compute)
    weight = kl_weight(beta, lambda_)
    desirable = sum(row["label"] for row in rows) / len(rows)
    curve = TrainingMonitor(out, config)
    trainer = StepKTO(
        model=model,
        args=KTOConfig(
            **_arguments(config, len(rows), seed, compute, out),
            beta=weight,
            desirable_weight=max(1.0, (1 - desirable) / desirable),
            undesirable_weight=max(1.0, desirable / (1 - desirable)),
            max_length=None,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[curve],
        peft_config=_adapter(config),
    )
    _train(trainer, curve, compute, out)
    return _end(trainer.model, tokenizer, policy, config, lambda_, beta, rows, out)


class _Scored:
    """A trainer whose rows already hold token ids and the reference's log-probs: TRL has nothing to prepare."""

    def _prepare_dataset(self, dataset: "Dataset", *_: Any) -> "Dataset":
        return dataset

    def _precompute_ref_logps(self, dataset: "Dataset", *_: Any) -> "Dataset":
        return dataset


def _start(
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


def _end(
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


def _arguments(config: Training, places: int, seed: int, compute: Compute, out: Path) -> dict[str, Any]:
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


def _train(trainer: Any, curve: "TrainingMonitor", compute: Compute, out: Path) -> None:
    """Train from the newest checkpoint, if a killed run left one."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    if device_kind(compute.device) == "cpu":
        fused_head.add(_inner(trainer.model))
    with curve.defer_sigterm():
        trainer.train(resume_from_checkpoint=newest(out))
    curve.finish()


def _inner(model: Any) -> "PreTrainedModel":
    """Return the causal language model inside an adapter."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _adapter(config: Step) -> Any:
    """Return LoRA's settings for all linear layers, or none for full fine-tuning."""
    if not config.adapter_rank:
        return None
    from peft import LoraConfig

    alpha = config.adapter_alpha or 2 * config.adapter_rank
    return LoraConfig(r=config.adapter_rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _merged(model: Any, probes: list[Tokens], pad: int) -> "tuple[PreTrainedModel, list[float]]":
    """Fold an adapter into the float32 weights, and return the probes' log-probs, which must stay what they were."""
    if not hasattr(model, "peft_config"):
        return model, logps(model, probes, pad)  # full fine-tuning
    before = logps(_inner(model), probes, pad)
    merged: PreTrainedModel = model.merge_and_unload()
    after = logps(merged, probes, pad)
    guards.agree(after, before, "merging the adapter changed the policy")
    return merged, after
