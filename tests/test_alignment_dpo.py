"""One step on the real code: where it starts, what it counts, what it refuses, and how it goes on after a kill."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.alignment import dpo, guards, trainer
from models.alignment.batching import order
from models.alignment.checkpoints import COMPLETE, newest
from models.alignment.curve import TrainingMonitor
from models.artifacts import Policy, Reference
from models.errors import BadData, BrokenInvariant
from models.files import jsonl
from models.policy import logprobs
from models.policy import weights as policies
from models.policy.shared_prompt import Group, tokens
from models.recipe import Compute, Step

Dialogues = list[tuple[str, str, str]]
Scorer = Callable[[Policy, Dialogues, Path], Reference]
LN2 = math.log(2)
STEP = {"metric": "harmless", "data": "town", "batch": 8, "updates": 4, "learning_rate": 1e-2, "warmup": 0}


def step(**changes: object) -> Step:
    return Step(**(STEP | changes))  # type: ignore[arg-type]


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]


def weights(policy: Policy) -> str:
    return hashlib.sha256((policy.path / "model.safetensors").read_bytes()).hexdigest()


def train(policy: Policy, scored: Reference, config: Step, compute: Compute, out: Path, b: float = 0.1) -> Policy:
    """Train with λ = 2 at the KL weight b."""
    out.mkdir(exist_ok=True)
    return dpo.train(out, policy, scored, config.objective(2 * b, 2.0), config.training, 0, compute)


def rewritten(scored: Reference, folder: Path, change: Callable[[list[dict]], list[dict]]) -> Reference:
    """Return the reference with other rows."""
    folder.mkdir()
    rows = change(list(jsonl.read(scored.path / "train.jsonl")))
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return scored.at(folder)


def swap(rows: list[dict]) -> list[dict]:
    return [
        row
        | {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}
        | {"ref_chosen_logps": row["ref_rejected_logps"], "ref_rejected_logps": row["ref_chosen_logps"]}
        for row in rows
    ]


@pytest.fixture(scope="module")
def stepped(
    policy: Policy, scored: Reference, compute: Compute, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Policy, list[dict[str, float]]]:
    """π_r, and the curve of the step that made it."""
    out = tmp_path_factory.mktemp("stepped")
    made = train(policy, scored, step(updates=10), compute, out)
    return made, curve(out)


# Where a step starts (science 8.19, 8.20)


@pytest.mark.parametrize("b", [0.01, 0.1, 5.0])
def test_a_step_starts_at_ln_2_and_margin_0_for_every_pair_and_every_weight(
    b: float, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    """Batches of one pair, learning rate nearly 0: every line of the curve is one pair at the start."""
    config = step(batch=1, updates=8, learning_rate=1e-12)
    made = train(policy, scored, config, compute, tmp_path / "out", b)
    assert made.beta_over_lambda == pytest.approx(b) and made.lambda_ == 2 and made.beta == pytest.approx(2 * b)
    for line in curve(tmp_path / "out"):
        assert line["loss"] == pytest.approx(LN2, abs=1e-5 * max(1, b))
        assert line["margin"] == pytest.approx(0, abs=1e-5 * max(1, b))


def test_step_two_starts_at_margin_0_against_the_policy_before_and_not_against_the_base(
    policy: Policy, stepped: tuple[Policy, list], dialogues: Dialogues, compute: Compute, reference_of: Scorer,
    scored: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reward, _ = stepped
    config = step(updates=1, batch=40, learning_rate=1e-12)
    right = reference_of(reward, dialogues, tmp_path / "right")
    train(reward, right, config, compute, tmp_path / "one")
    (first,) = curve(tmp_path / "one")
    assert first["loss"] == pytest.approx(LN2, abs=1e-5) and first["margin"] == pytest.approx(0, abs=1e-5)
    monkeypatch.setattr(guards, "TOLERANCE", math.inf)
    train(reward, replace(scored, policy=reward.digest), config, compute, tmp_path / "two")
    (first,) = curve(tmp_path / "two")
    assert first["margin"] > 0.01 and first["loss"] < LN2 - 0.005


def test_swapping_labels_negates_margins(
    policy: Policy, stepped: tuple[Policy, list], dialogues: Dialogues, scored: Reference, compute: Compute,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """loss(m) − loss(−m) = −m, pair by pair, on a policy that has moved away from the reference."""
    monkeypatch.setattr(guards, "TOLERANCE", math.inf)
    moved = replace(scored, policy=stepped[0].digest)
    config = step(batch=1, updates=8, learning_rate=1e-12)
    train(stepped[0], moved, config, compute, tmp_path / "a")
    train(stepped[0], rewritten(moved, tmp_path / "rows", swap), config, compute, tmp_path / "b")
    swapped = {round(abs(row["margin"]), 5): row for row in curve(tmp_path / "b")}
    for here in curve(tmp_path / "a"):
        there = swapped[min(swapped, key=lambda margin: abs(margin - abs(here["margin"])))]
        assert there["margin"] == pytest.approx(-here["margin"], abs=1e-5) and abs(here["margin"]) > 1e-3
        assert here["loss"] - there["loss"] == pytest.approx(-here["margin"], abs=1e-4)


def test_ten_nats_at_weight_a_tenth_cost_0_313262(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """−log σ(0.1 · 10), with the reference moved by hand so that the log-ratio margin is 10 nats."""
    monkeypatch.setattr(guards, "TOLERANCE", math.inf)
    moved = rewritten(
        scored,
        tmp_path / "rows",
        lambda rows: [row | {"ref_chosen_logps": row["ref_chosen_logps"] - 10} for row in rows],
    )
    train(policy, moved, step(updates=1, batch=40, learning_rate=1e-12), compute, tmp_path / "out")
    (line,) = curve(tmp_path / "out")
    assert line["loss"] == pytest.approx(0.313262, abs=1e-5) and line["margin"] == pytest.approx(1, abs=1e-5)
    assert line["accuracy"] == 1


@pytest.mark.parametrize("b", [0.1, 2.0])
def test_the_first_gradient_is_minus_half_the_weight(
    b: float, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    """∂loss/∂(log π(y_w) − log π(y_l)) = −b/2, so the gradient's norm is b/2 times that of the mean difference."""
    model, _ = policies.load(policy, compute)
    rows = list(jsonl.read(scored.path / "train.jsonl"))
    chosen, rejected = (
        logprobs.answer_logps(model, [(row["prompt_ids"], [row[side]]) for row in rows], 0)
        for side in ("chosen_ids", "rejected_ids")
    )
    (chosen - rejected).mean().backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None))
    train(policy, scored, step(updates=1, batch=40, learning_rate=1e-12), compute, tmp_path / "out", b)
    assert curve(tmp_path / "out")[0]["grad_norm"] == pytest.approx(b / 2 * norm, rel=1e-3)


def test_a_step_raises_the_margin_and_follows_the_base(stepped: tuple[Policy, list], policy: Policy) -> None:
    made, lines = stepped
    assert lines[-1]["margin"] > 0.1 and lines[-1]["loss"] < lines[0]["loss"]
    assert [line["done"] for line in lines] == list(range(1, 11))
    assert made.parents == (policy.digest,) and made.step == 1 and made.vocabulary == policy.vocabulary
    assert made.digest == policies.digest(made.path) != policy.digest
    assert not list(made.path.glob("checkpoint-*"))


# TRL's own way to the same losses


def test_stored_reference_log_probs_give_the_losses_of_a_live_reference_model(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = step(updates=5, micro_batch=4, learning_rate=1e-3)
    made = train(policy, scored, config, compute, tmp_path / "ours", 0.3)
    rows = list(jsonl.read(scored.path / "train.jsonl"))
    places = order([tokens(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows], config, 0)
    texts = [{name: rows[i][f"{name}_ids"] for name in ("prompt", "chosen", "rejected")} for i in places]

    class Tokenised(DPOTrainer):
        """TRL as it is, except that the rows are token ids already; no stored log-probs."""

        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return Dataset.from_list([{f"{name}_ids": ids for name, ids in row.items()} for row in texts])

    (model, tokenizer), (live, _) = (policies.load(policy, compute) for _ in range(2))
    trainer = Tokenised(
        model=model,
        ref_model=live,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"), beta=0.3, per_device_train_batch_size=4, gradient_accumulation_steps=2,
            max_steps=5, learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0,
            train_sampling_strategy="sequential", logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
            max_length=None, bf16=False, disable_tqdm=True, seed=0,
        ),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    ours = [line["loss"] for line in curve(tmp_path / "ours")]
    assert ours == pytest.approx(theirs, abs=1e-4) and max(abs(loss - LN2) for loss in ours) > 5e-3
    trained, _ = policies.load(made, compute)
    for a, b in zip(trained.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


# What stops a step


def test_a_reference_of_another_policy_is_refused(
    policy: Policy, other_policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    with pytest.raises(BrokenInvariant, match="harmless step: the reference log-probs are of policy"):
        train(other_policy, scored, step(), compute, tmp_path / "out")
    with pytest.raises(BrokenInvariant, match=r"policy and reference differ: log-probs are [\d.]+ nats apart"):
        train(other_policy, replace(scored, policy=other_policy.digest), step(), compute, tmp_path / "out")


@pytest.mark.parametrize("column", ["ref_chosen_logps", "ref_rejected_logps"])
@pytest.mark.parametrize("moved", [0.01, -0.01, math.nan, math.inf])
def test_reference_log_probs_that_moved_by_a_hundredth_of_a_nat_stop_the_step(
    column: str, moved: float, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    def one(rows: list[dict]) -> list[dict]:
        return [row | {column: row[column] + moved} if i == 3 else row for i, row in enumerate(rows)]

    with pytest.raises(BrokenInvariant, match="before the first update, policy and reference differ"):
        train(policy, rewritten(scored, tmp_path / "rows", one), step(), compute, tmp_path / "out")


def test_weights_that_changed_on_disk_stop_the_step(
    policy: Policy, other_policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    copy = policy.at(tmp_path / "copy")
    shutil.copytree(policy.path, copy.path)
    shutil.copyfile(other_policy.path / "model.safetensors", copy.path / "model.safetensors")
    with pytest.raises(BrokenInvariant, match="weights have digest"):
        train(copy, scored, step(), compute, tmp_path / "out")


def test_a_policy_that_does_not_reproduce_its_probe_is_not_trained_further(
    stepped: tuple[Policy, list], dialogues: Dialogues, compute: Compute, reference_of: Scorer, tmp_path: Path
) -> None:
    made, _ = stepped
    scored = reference_of(made, dialogues, tmp_path / "scored")
    copy = made.at(tmp_path / "copy")
    shutil.copytree(made.path, copy.path)
    train(copy, scored, step(updates=1), compute, tmp_path / "fine")
    probe = json.loads((copy.path / "probe.json").read_text())
    probe["logps"][5] += 0.01
    (copy.path / "probe.json").write_text(json.dumps(probe))
    with pytest.raises(BrokenInvariant, match="is not the one that was trained"):
        train(copy, scored, step(updates=1), compute, tmp_path / "out")


def test_no_rows_are_no_step(policy: Policy, scored: Reference, compute: Compute, tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"harmless step: no (pair|row) to train on"):
        train(policy, rewritten(scored, tmp_path / "rows", lambda rows: []), step(), compute, tmp_path / "out")


@pytest.mark.parametrize("updates", [1, 3])
def test_weights_that_are_no_numbers_are_never_saved(
    updates: int, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    """With one update the loss is still finite when it is logged, and the weights are not. No recipe may say 1e30."""
    config = step(updates=updates).model_copy(update={"learning_rate": 1e30})
    with pytest.raises(BrokenInvariant, match="finite"):
        train(policy, scored, config, compute, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


# What goes on after a kill


class Killed(Exception):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("rank", [0, 4])
def test_a_killed_training_goes_on_to_the_very_same_weights(
    rank: int, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = step(updates=9, save_every=2, micro_batch=4, adapter_rank=rank)
    torch.manual_seed(1)
    whole = train(policy, scored, config, compute, tmp_path / "whole")

    class Killing(TrainingMonitor):
        def on_log(self, args, state, *rest, **more) -> None:
            super().on_log(args, state, *rest, **more)
            if state.global_step == 7:
                raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("models.alignment.curve.TrainingMonitor", Killing)
        train(policy, scored, config, compute, tmp_path / "killed")
    here = tmp_path / "killed"
    assert sorted(path.name for path in here.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert (here / "checkpoint-6" / COMPLETE).exists()
    # as a kill in the middle of the next checkpoint leaves it: some files, one half written, no mark
    shutil.copytree(here / "checkpoint-6", here / "checkpoint-8")
    (here / "checkpoint-8" / COMPLETE).unlink()
    (here / "checkpoint-8" / "optimizer.pt").write_bytes(b"half")
    torch.manual_seed(2)  # another process, another state of the generator
    resumed = train(policy, scored, config, compute, here)
    assert weights(resumed) == weights(whole) != weights(policy)
    assert [line["done"] for line in curve(here)] == list(range(1, 10))
    for ours, theirs in zip(curve(here), curve(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in ours.items() if k != "time"} == {k: v for k, v in theirs.items() if k != "time"}
    assert not list(here.glob("checkpoint-*"))


def test_a_checkpoint_with_a_short_file_is_not_gone_on_from(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:

    for number in (2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "model.safetensors").write_bytes(b"12345")
        (tmp_path / f"checkpoint-{number}" / COMPLETE).write_text(json.dumps({"model.safetensors": 5}))
    assert newest(tmp_path) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "model.safetensors").write_bytes(b"123")
    assert newest(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-10").exists()


# LoRA, order, corpus


@pytest.mark.parametrize(("rank", "times"), [(0, 2), (4, 3)])
def test_guards_ask_no_weights_twice_and_a_prompt_once(
    rank: int, times: int, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Weights are asked at the start and at the end, with an adapter before and after it is folded in."""
    asked: list[list[int]] = []
    ask = logprobs.answer_logps

    def counted(model: Any, groups: list[Group], pad: int) -> torch.Tensor:
        asked.append([len(answers) for _, answers in groups])
        return ask(model, groups, pad)

    monkeypatch.setattr(logprobs, "answer_logps", counted)
    train(policy, scored, step(adapter_rank=rank, updates=1), compute, tmp_path / "out")
    assert asked == [[2] * trainer.PROBES] * times


def test_an_adapter_trains_and_is_folded_into_ordinary_weights(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    config = step(adapter_rank=4, updates=6, learning_rate=5e-2)
    torch.manual_seed(5)
    made = train(policy, scored, config, compute, tmp_path / "out")
    lines = curve(tmp_path / "out")
    assert lines[0]["loss"] == pytest.approx(LN2, abs=1e-5) and lines[-1]["loss"] < LN2 - 0.01
    (before, _), (after, _) = (policies.load(p, compute) for p in (policy, made))
    changed = {
        name
        for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert {name.split(".")[-2] for name in changed} == {f"{x}_proj" for x in (*"qkvo", "gate", "up", "down")}
    probe = json.loads((made.path / "probe.json").read_text())
    values = logprobs.logps(after, [(prompt, answer) for prompt, answer in probe["answers"]], 0)
    assert values == pytest.approx(probe["logps"], abs=1e-4)
    torch.manual_seed(6)  # what ran before in this worker must not matter
    assert weights(train(policy, scored, config, compute, tmp_path / "again")) == weights(made)


@pytest.mark.parametrize(
    ("rows", "batch", "micro", "updates"), [(37, 8, 0, 0), (37, 8, 4, 0), (5, 16, 8, 3), (300, 8, 2, 100)]
)
def test_every_row_is_seen_before_any_is_seen_again(rows: int, batch: int, micro: int, updates: int) -> None:
    config = step(batch=batch, micro_batch=micro, updates=updates, epochs=2)
    places = order(range(rows), config, seed=3)
    assert len(places) == (updates or math.ceil(2 * rows / batch)) * batch
    counts = np.bincount(places, minlength=rows)
    assert counts.max() - counts.min() <= 1
    assert places == order(range(rows), config, seed=3) != order(range(rows), config, seed=4)


def test_batches_are_mixed_or_hold_similar_lengths_as_the_recipe_says() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 640)

    def batches(similar: bool) -> np.ndarray:
        places = order(lengths.tolist(), step(batch=16, updates=40, similar_lengths=similar), seed=0)
        assert sorted(places) == list(range(640))
        return lengths[places].reshape(40, 16)

    similar, mixed = batches(True), batches(False)
    padding = [1 - b.sum() / (b.max(axis=1) * 16).sum() for b in (similar, mixed)]
    assert padding[0] < 0.1 < 0.4 < padding[1]
    assert mixed.mean(axis=1).std() < 60 < 100 < similar.mean(axis=1).std()
    rises = np.diff(similar.mean(axis=1)) > 0
    assert 0.3 < rises.mean() < 0.7  # which batch comes when is random
