"""Averages of weights: parents bit for bit at the ends, float32 sums between, nothing that does not fit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.alignment import merge
from models.artifacts import Policy
from models.data import town
from models.errors import BadPolicy
from models.policy import weights as policies
from models.recipe import Compute

Tensors = dict[str, torch.Tensor]


def tensors(policy: Policy) -> Tensors:
    return {k: t for path in sorted(policy.path.glob("*.safetensors")) for k, t in load_file(path).items()}


def made(folder: Path, seed: int, dtype: torch.dtype = torch.float32, shards: str = "5GB") -> Policy:
    folder.mkdir()
    tokenizer = town.tokenizer()
    model = town.untrained(seed, tokenizer).to(dtype)
    with torch.no_grad():
        model.lm_head.weight[0, seed] = -0.0  # 1·(−0) + 0·b is +0: arithmetic would lose a bit
    model.save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    return policies.describe(folder, Policy(path=folder, digest="", name=f"{seed}", kind="step", step=2))


def merged(safe: Policy, reward: Policy, q: float, out: Path) -> Policy:
    out.mkdir()
    return merge.interpolate(out, safe, reward, q)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


KINDS = pytest.mark.parametrize(
    ("dtype", "shards"),
    [(torch.float32, "5GB"), (torch.bfloat16, "5GB"), (torch.float32, "100KB"), (torch.bfloat16, "50KB")],
)


@pytest.fixture
def parents(tmp_path: Path, dtype: torch.dtype, shards: str) -> tuple[Policy, Policy]:
    return made(tmp_path / "safe", 1, dtype, shards), made(tmp_path / "reward", 2, dtype, shards)


@KINDS
def test_the_ends_are_the_parents_bit_for_bit(parents: tuple[Policy, Policy], shards: str, tmp_path: Path) -> None:
    safe, reward = parents
    assert (len(list(safe.path.glob("*.safetensors"))) > 1) == (shards != "5GB")
    one, zero = merged(safe, reward, 1, tmp_path / "1"), merged(safe, reward, 0, tmp_path / "0")
    assert same(tensors(one), tensors(safe)) and same(tensors(zero), tensors(reward))
    assert (one.digest, zero.digest) == (safe.digest, reward.digest)


@KINDS
def test_between_the_ends_it_is_the_float32_sum(
    parents: tuple[Policy, Policy], dtype: torch.dtype, compute: Compute, tmp_path: Path
) -> None:
    safe, reward = parents
    mixture = merged(safe, reward, 0.3, tmp_path / "out")
    a, b, found = tensors(safe), tensors(reward), tensors(mixture)
    assert found.keys() == a.keys()
    for key, value in found.items():
        terms = [np.float32(q) * t[key].float().numpy() for q, t in ((0.3, a), (0.7, b))]
        ulp = np.spacing(np.maximum(*map(np.abs, terms))).astype(float)
        gap = np.abs(value.double().numpy() - (terms[0] + terms[1]))
        cast = 0 if dtype == torch.float32 else 2**-8 * np.abs(terms[0] + terms[1]).astype(float)  # rounded once
        assert value.dtype == dtype and (gap <= ulp + cast * (1 + 2**-8)).all()
    model, tokenizer = policies.load(mixture, compute)  # what was written loads
    assert model.lm_head.weight.shape[0] == len(tokenizer)


@KINDS
@pytest.mark.parametrize("q", [0.25, 0.3, 0.75])
def test_swapping_parents_and_weight_changes_nothing(parents: tuple[Policy, Policy], q: float, tmp_path: Path) -> None:
    safe, reward = parents
    forth, back = merged(safe, reward, q, tmp_path / "forth"), merged(reward, safe, 1 - q, tmp_path / "back")
    assert same(tensors(forth), tensors(back))


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, "5GB"), (torch.bfloat16, "50KB")])
@pytest.mark.parametrize("q", [0.25, 0.5, 0.9])
def test_a_merge_with_itself_is_the_identity(parents: tuple[Policy, Policy], q: float, tmp_path: Path) -> None:
    safe, _ = parents
    found, own = tensors(merged(safe, safe, q, tmp_path / "out")), tensors(safe)
    for key, value in found.items():  # q·a + (1−q)·a rounds twice
        torch.testing.assert_close(value, own[key], rtol=2**-22 if value.dtype == torch.float32 else 0, atol=0)


def test_a_merge_names_its_parents_and_carries_their_tokenizer(tmp_path: Path) -> None:
    safe, reward = made(tmp_path / "safe", 1), made(tmp_path / "reward", 2)
    (safe.path / "probe.json").write_text("{}")
    mixture = merged(safe, reward, 0.5, tmp_path / "out")
    assert (mixture.kind, mixture.merge_weight, mixture.step, mixture.name) == ("merge", 0.5, 2, "merge q=0.5")
    assert mixture.parents == (safe.digest, reward.digest) and mixture.vocabulary == safe.vocabulary
    assert mixture.digest == policies.digest(mixture.path) not in mixture.parents
    assert not (mixture.path / "probe.json").exists()  # the log-probs of a parent are not those of the merge
    assert (mixture.path / "config.json").read_bytes() == (safe.path / "config.json").read_bytes()


def edited(policy: Policy, folder: Path, change: str) -> Policy:
    """Return a copy that does not fit its sibling."""
    shutil.copytree(policy.path, folder)
    held = tensors(policy)
    if change == "shape":
        held["lm_head.weight"] = held["lm_head.weight"][:-1].clone()
    elif change == "missing":
        del held["lm_head.weight"]
    elif change == "type":
        held["lm_head.weight"] = held["lm_head.weight"].half()
    elif change == "template":
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    elif change == "vocabulary":
        path = folder / "tokenizer.json"
        tree = json.loads(path.read_text())
        vocabulary = tree["model"]["vocab"]
        a, b = [word for word, i in vocabulary.items() if i in (10, 11)]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
        path.write_text(json.dumps(tree))
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    return policies.describe(folder, replace(policy, path=folder))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("shape", "hold different tensors or shapes"),
        ("missing", "hold different tensors or shapes"),
        ("type", "hold different tensors or shapes"),
        ("template", "different vocabularies or templates"),
        ("vocabulary", "different vocabularies or templates"),
    ],
)
def test_policies_that_do_not_fit_are_refused(change: str, sentence: str, tmp_path: Path) -> None:
    safe, reward = made(tmp_path / "safe", 1), made(tmp_path / "reward", 2)
    other = edited(reward, tmp_path / "other", change)
    for i, (first, second) in enumerate([(safe, other), (other, safe)]):
        with pytest.raises(BadPolicy, match=sentence):
            merged(first, second, 0.5, tmp_path / f"out{i}")
    merged(safe, edited(reward, tmp_path / "equal", "nothing"), 0.5, tmp_path / "out")


def test_policies_that_are_sharded_differently_are_refused(tmp_path: Path) -> None:
    safe, reward = made(tmp_path / "safe", 1), made(tmp_path / "reward", 2, shards="100KB")
    with pytest.raises(BadPolicy, match="sharded differently; save one of them again"):
        merged(safe, reward, 0.5, tmp_path / "out")


def test_whole_numbers_and_single_numbers_survive_a_merge(tmp_path: Path) -> None:
    """Buffers of a model are not averaged; a scalar is a tensor too."""
    safe, reward = made(tmp_path / "safe", 1), made(tmp_path / "reward", 2)
    for policy, value in ((safe, 1.0), (reward, 3.0)):
        held = tensors(policy) | {"steps": torch.tensor([7, 8]), "scale": torch.tensor(value)}
        save_file(held, policy.path / "model.safetensors", {"format": "pt"})
    safe, reward = (policies.describe(policy.path, policy) for policy in (safe, reward))  # as they are now
    found = tensors(merged(safe, reward, 0.25, tmp_path / "out"))
    assert found["steps"].tolist() == [7, 8] and found["scale"].item() == 2.5


def test_each_policy_before_the_last_step_is_merged_with_its_child_of_the_largest_lambda() -> None:
    def policy(digest: str, lambda_: float = 1.0, *parents: str) -> Policy:
        return Policy(path=Path(), digest=digest, name=digest, kind="step", lambda_=lambda_, parents=parents)

    before = [policy("r1"), policy("r2"), policy("r3")]
    frontier = [
        policy("a", 0.5, "r1"),
        policy("b", 2.0, "r1", "r2"),
        policy("c", 0.1, "r2"),
        policy("d", 9.0, "x", "r1"),
    ]
    pairs = [(safe.digest, reward.digest) for safe, reward in merge.merge_pairs(before, frontier)]
    assert pairs == [("b", "r1"), ("c", "r2")]  # r3 has no child: every λ of its step was 0
    base, helpful = policy("base"), policy("helpful", 5.0, "base")  # λ = [0, 5], then λ = [0, 1]
    harmless = [policy("from base", 1.0, "base"), policy("from helpful", 1.0, "helpful")]
    both = merge.merge_pairs([base, helpful], [base, harmless[0], helpful, harmless[1]])
    assert [(safe.digest, reward.digest) for safe, reward in both] == [
        ("from base", "base"),
        ("from helpful", "helpful"),
    ]
