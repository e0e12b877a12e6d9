"""What a trained policy says of itself: its name, its parent, the weights it was trained with."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.alignment import dpo, merge, sft, trainer
from models.artifacts import Policy, Reference, Sources
from models.data.dialogue import encode
from models.errors import BadData, BrokenInvariant
from models.files import jsonl
from models.policy import logprobs
from models.policy import weights as policies
from models.recipe import Compute, Data, Sft, Step

SETTINGS = {"data": "-", "batch": 8, "updates": 1, "learning_rate": 1e-2, "warmup": 0}


def step(metric: str = "harmless", **changes: object) -> Step:
    return Step.model_validate({"metric": metric, **SETTINGS, **changes})


def test_a_step_names_its_parent_and_the_weights_it_was_trained_with(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    parent = replace(policy, name="helpful", step=1)
    made = dpo.train(tmp_path, parent, scored, step().objective(0.1, 0.4), step().training, 0, compute)
    assert made == replace(
        parent, path=tmp_path, digest=policies.digest(tmp_path), name="harmless λ=0.4", kind="step", step=2,
        metric="harmless", method="dpo", parents=(policy.digest,), beta=0.1, lambda_=0.4, beta_over_lambda=0.25,
        rows=40,
    )  # fmt: skip
    merged = tmp_path / "merged"
    merged.mkdir()
    both = merge.interpolate(merged, made, replace(policy, rows=3), 0.25)
    assert (both.path, both.name, both.rows, both.parents) == (merged, "merge q=0.25", 0, (made.digest, policy.digest))


@pytest.mark.parametrize(
    ("parent", "step_of_parent", "metric", "lambda_", "name"),
    [
        ("base", 0, "helpful", 1.0, "helpful"),
        ("base", 0, "helpful", 2.0, "helpful λ=2"),
        ("helpful", 1, "harmless", 1.0, "harmless λ=1"),
        ("helpful", 1, "harmless", 0.4, "harmless λ=0.4"),
        ("harmless λ=0.4", 2, "honest", 2.0, "harmless λ=0.4 · honest λ=2"),
    ],
    ids=["first", "first of a grid", "second", "second of a grid", "third"],
)
def test_a_name_is_the_same_whatever_else_the_grid_holds(
    parent: str, step_of_parent: int, metric: str, lambda_: float, name: str
) -> None:
    policy = Policy(path=Path(), digest="", name=parent, kind="step", step=step_of_parent)
    assert trainer._name(policy, step(metric).objective(0.1, lambda_)) == name


def test_the_supervised_step_learns_the_answers_and_not_the_prompts(
    policy: Policy, compute: Compute, tmp_path: Path
) -> None:
    """Its first loss is what the base gives the tokens of the answers, and of nothing else; none is cut."""
    lengths = [1, 2, 3, 1, 2, 3, 1, 400]
    rows = [{"prompt": "how do i clean my lamp ?", "completion": "get the brush . " * length} for length in lengths]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"})
    out = tmp_path / "out"
    out.mkdir()
    made = sft.train(out, policy, sources, Sft.model_validate(SETTINGS), Data(), 0, compute)
    model, tokenizer = policies.load(policy, compute)
    dialogues = [([{"role": "user", "content": row["prompt"]}], [row["completion"]]) for row in rows]
    answers = [(prompt, answer) for prompt, (answer,) in encode(tokenizer, dialogues)]
    logps = logprobs.logps(model, answers, tokenizer.pad_token_id)
    first, *_ = jsonl.read(out / "progress.jsonl")
    assert first["loss"] == pytest.approx(-sum(logps) / sum(len(answer) for _, answer in answers), rel=1e-4)
    assert made == replace(
        policy, path=out, digest=policies.digest(out), method="sft", parents=(policy.digest,), rows=8
    )
    probe = json.loads((out / "probe.json").read_text())
    trained, _ = policies.load(made, compute)
    again = logprobs.logps(trained, [(p, a) for p, a in probe["answers"]], tokenizer.pad_token_id)
    assert len(again) == trainer.PROBES and again == pytest.approx(probe["logps"], abs=1e-4)


def test_an_adapter_weighs_twice_its_rank_unless_the_recipe_says_otherwise() -> None:
    assert trainer.adapter(step()) is None
    assert [trainer.adapter(step(adapter_rank=4, **also)).lora_alpha for also in ({}, {"adapter_alpha": 5})] == [
        8,
        5,
    ]


def test_an_adapter_that_changes_the_policy_when_it_is_folded_in_stops_the_step(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter([[-1.0, -2.0], [-1.0, -2.5]])
    monkeypatch.setattr(trainer, "logps", lambda *_: next(found))
    with pytest.raises(BrokenInvariant, match=r"^merging the adapter changed the policy"):
        config = step(adapter_rank=2)
        dpo.train(tmp_path, policy, scored, config.objective(0.1, 1.0), config.training, 0, compute)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_training_that_would_move_nothing_is_refused(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    """The learning rate of the first update of a warm-up is 0."""

    def trained(out: Path, **changes: object) -> Path:
        out.mkdir()
        config = step("helpful", **changes)
        return dpo.train(out, policy, scored, config.objective(0.1, 1.0), config.training, 0, compute).path

    with pytest.raises(BadData, match=r"^helpful step: its only update is the first of the warm-up, whose learning"):
        trained(tmp_path / "still", warmup=0.03)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"prompt": "how ?", "completion": "get the brush ."}) + "\n")
    sources = Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"})
    (tmp_path / "supervised").mkdir()
    with pytest.raises(BadData, match=r"^sft: its only update is the first of the warm-up"):
        supervised = Sft.model_validate(SETTINGS | {"warmup": 0.03})
        sft.train(tmp_path / "supervised", policy, sources, supervised, Data(), 0, compute)
    before = load_file(policy.path / "model.safetensors")
    for name, changes in (("constant", {"schedule": "constant"}), ("more", {"updates": 2})):
        after = load_file(trained(tmp_path / name, warmup=0.03, **changes) / "model.safetensors")
        assert any(not torch.equal(after[tensor], before[tensor]) for tensor in before)
