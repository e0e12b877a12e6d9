"""One DPO step on the same tokenised pairs, by sacpo and by plain TRL, with the same stopwatch on both trainers.

    ours      models.alignment.reference and models.alignment.dpo, as a worker runs them
    shared    ours with `models.alignment.fused_head` on CUDA too, where sacpo leaves the head to TRL
    plain     TRL's DPOTrainer with its defaults: live reference, activation checkpointing, random order
    best      the best of plain TRL: precomputed reference, no checkpointing, rows of similar length together
    same      plain TRL on the batches of `ours`, three updates: the losses must be equal

What an arm costs comes in three parts: `reference` and `training` grow with the pairs, `fixed` is the rest (loading and
hashing the weights, guards, making the trainer, saving). Imports are not counted.
"""

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from models.alignment import dpo, fused_head, reference
from models.alignment.batching import order
from models.alignment.trainer import adapter, inner
from models.artifacts import Policy, Preferences
from models.policy import weights
from models.policy.shared_prompt import tokens
from models.policy.weights import device_kind
from models.recipe import Compute, Data, Step

ARMS = ("ours", "shared", "plain", "best", "same")
BETA = 0.1
GIB = 2**30


@dataclass(frozen=True)
class Task:
    """What every arm is given."""

    base: Policy
    pairs: Preferences
    config: Step
    compute: Compute
    data: Data


@dataclass
class Spent:
    """Seconds and context switches of this process between two moments; children are not counted."""

    wall: float = 0.0
    user: float = 0.0
    system: float = 0.0
    waited: int = 0
    """Voluntary switches: a thread went to sleep, at a barrier for instance."""
    preempted: int = 0
    """Involuntary switches: another process was given the core."""

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


def now() -> Spent:
    """Return what this process has spent until now, its work on an accelerator done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    use = resource.getrusage(resource.RUSAGE_SELF)
    return Spent(time.perf_counter(), use.ru_utime, use.ru_stime, use.ru_nvcsw, use.ru_nivcsw)


@dataclass
class Stopwatch(TrainerCallback):  # type: ignore[misc]
    """Notes when training begins and when each update ends, and ends the training after `most` updates if given."""

    most: int = 0
    marks: list[Spent] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    before: float = 0.0
    """Peak GiB on the accelerator before training."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.before = peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.marks.append(now())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One update is done."""
        self.marks.append(now())
        control.should_training_stop |= state.global_step == self.most

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep the loss, which has no more digits than TRL logs."""
        self.losses += [logs["loss"]] if "loss" in logs else []


def peak() -> float:
    """Return the most GiB that tensors have taken on the accelerator; 0 on CPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def resident() -> float:
    """Return the most GiB that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run(name: str, task: Task, folder: Path) -> dict[str, Any]:
    """Run one arm in an empty folder, and return what it spent.

    Raises:
        KeyError: no such arm.
    """
    torch.set_num_threads(task.compute.threads)
    folder.mkdir(parents=True)
    watch, begun = Stopwatch(most=3 if name == "same" else 0), now()
    arm = {"ours": ours, "shared": shared, "plain": plain, "best": best, "same": same}[name]
    pairs, scored = arm(task, watch, folder)
    return _figures(watch, now() - begun, scored, pairs)


def _figures(watch: Stopwatch, total: Spent, scored: Spent, pairs: int) -> dict[str, Any]:
    """Return the parts of what an arm spent."""
    training = watch.marks[-1] - watch.marks[0]
    updates = [(b - a).wall for a, b in pairwise(watch.marks)]
    fixed = total - training - scored
    return {
        "pairs": pairs,
        **{f"{part}_{name}": round(value, 4) for part, spent in
           (("training", training), ("reference", scored), ("fixed", fixed)) for name, value in vars(spent).items()},
        "updates": [round(seconds, 4) for seconds in updates],
        "losses": watch.losses,
        "resident_gib": round(resident(), 3),
        "peak_gib": round(peak(), 3),
        "peak_before_gib": round(watch.before, 3),
    }  # fmt: skip


def ours(task: Task, watch: Stopwatch, folder: Path) -> tuple[int, Spent]:
    """Score the reference and train one step, as two stages do."""
    scored_at, out = folder / "scored", folder / "out"
    scored_at.mkdir()
    out.mkdir()
    with timed(reference, "pair_logps") as scoring:
        scored = reference.score(scored_at, task.base, task.pairs, ["train"], task.data.max_tokens, task.compute)
    train = dpo.fit

    def watched(trainer: Any, *rest: Any) -> None:
        trainer.add_callback(watch)
        train(trainer, *rest)

    with replaced(dpo, "fit", watched):
        dpo.train(out, task.base, scored, task.config.objective(BETA, 1), task.config.training, 0, task.compute)
    watch.losses = [json.loads(line)["loss"] for line in (out / "progress.jsonl").read_text().splitlines()]
    return scored.counts["train"], scoring


def shared(task: Task, watch: Stopwatch, folder: Path) -> tuple[int, Spent]:
    """Ours, with the prompt computed once and logits for answers only, on whatever device."""
    train = dpo.fit

    def headed(trainer: Any, *rest: Any) -> None:
        fused_head.add(inner(trainer.model))
        train(trainer, *rest)

    with replaced(dpo, "fit", headed):
        return ours(task, watch, folder)


def plain(task: Task, watch: Stopwatch, folder: Path) -> tuple[int, Spent]:
    """TRL with its defaults."""
    return _trl(task, watch, folder, _rows(task), {})


def best(task: Task, watch: Stopwatch, folder: Path) -> tuple[int, Spent]:
    """TRL at its best."""
    rows = [
        row | {"length": tokens(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])} for row in _rows(task)
    ]
    options = {"precompute_ref_log_probs": True, "gradient_checkpointing": False}
    alike = {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}  # it reads the lengths
    return _trl(task, watch, folder, rows, options | alike)


def same(task: Task, watch: Stopwatch, folder: Path) -> tuple[int, Spent]:
    """TRL on our batches; the schedule is the whole training's."""
    rows = _rows(task)
    places = order([tokens(r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]]) for r in rows], task.config, 0)
    rows = [rows[i] for i in places]
    return _trl(task, watch, folder, rows, {"train_sampling_strategy": "sequential"})


def _rows(task: Task) -> list[dict[str, Any]]:
    tokenizer = weights.load_tokenizer(task.base)
    return reference.tokenise(tokenizer, task.pairs.path / "train.jsonl", task.data.max_tokens)[0]


def _trl(
    task: Task, watch: Stopwatch, folder: Path, rows: list[dict[str, Any]], options: dict[str, Any]
) -> tuple[int, Spent]:
    """Train with TRL on tokenised rows and save; with an adapter, switching it off gives the live reference."""
    config, on_cpu = task.config, device_kind(task.compute.device) == "cpu"
    model, tokenizer = weights.load(task.base, task.compute)
    args = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=config.micro_batch or config.batch,
        gradient_accumulation_steps=config.accumulate, max_steps=_updates(config, len(rows)), beta=BETA, seed=0,
        learning_rate=config.learning_rate, lr_scheduler_type=config.schedule.value, warmup_steps=config.warmup,
        use_cpu=on_cpu, bf16=not on_cpu, max_length=None, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, **options,
    )  # fmt: skip
    scoring = Spent()

    class Tokenised(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Dataset:
            nonlocal scoring
            begun = now()
            made = super()._precompute_ref_logps(*arguments)
            scoring += now() - begun
            return made

    trainer = Tokenised(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=adapter(config), callbacks=[watch],
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return len(rows), scoring


def _updates(config: Step, rows: int) -> int:
    """Return as many updates as `ours` makes of these rows."""
    return len(order([1] * rows, config, 0)) // config.batch


@contextmanager
def timed(module: Any, name: str) -> Iterator[Spent]:
    """Add up what calls of a function of a module spend."""
    total, function = Spent(), getattr(module, name)

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        begun = now()
        result = function(*args, **kwargs)
        vars(total).update(vars(total + (now() - begun)))
        return result

    with replaced(module, name, counted):
        yield total


@contextmanager
def replaced(module: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """Let a module's function be another for a while."""
    before = getattr(module, name)
    setattr(module, name, by)
    try:
        yield
    finally:
        setattr(module, name, before)
