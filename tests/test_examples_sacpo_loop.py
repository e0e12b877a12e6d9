"""`examples/sacpo_loop.py` trains in plain torch what the flow trains with TRL: the same rows, the same weights."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.alignment import dpo, reference, sft
from models.artifacts import Noun, Policy
from models.data import preferences
from models.data import sources as origins
from models.policy import weights
from models.recipe import Compute, Recipe
from models.recipe.toml import read
from tasks.work import store
from tasks.work.store import Stage

LOOP = Path(__file__).parent.parent / "examples" / "sacpo_loop.py"
SHORT = [
    "sft.updates=60", "steps.0.updates=20", "steps.1.updates=20", "steps.1.lambda=0.2",
    "steps.0.pairs=500", "steps.1.pairs=500",  # 20 batches of 32: the rows are shuffled a second time
]  # fmt: skip
CLOSE = 3e-5
"""Largest difference of two weights that were trained alike for 20 updates. Rounding makes 3e-6; a KL weight that is
wrong by a tenth makes 5e-5, λ/β for β/λ makes 8e-4, and π_base as the reference of step two makes 2e-3."""


class Flow(NamedTuple):
    """What the flow's stages made of the quickstart."""

    recipe: Recipe
    base: Policy
    reward: Policy
    safe: Policy


@pytest.fixture(scope="module")
def loop() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sacpo_loop", LOOP)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory, compute: Compute) -> Flow:
    """The quickstart with 20 updates per step, stage by stage, without Prefect and MLflow."""
    root = tmp_path_factory.mktemp("runs")
    recipe = read("quickstart", SHORT)
    assert isinstance(recipe, Recipe)
    seed, data = recipe.seed, recipe.data

    def make(stage: Any, **arguments: Any) -> Any:
        noun: Noun = store.make(root, Stage(stage, stage.__name__, arguments))
        return noun

    files = make(
        origins.gather, files=origins.places_of(recipe), sha256=origins.digests(recipe), seed=seed, halves=True
    )
    town = make(weights.base, base="town", sha256=weights.base_digest("town"), template="", seed=seed)
    base = make(
        sft.train, policy=town, sources=files, training=recipe.sft.training, data=data, seed=seed, compute=compute
    )
    policies = [base]
    for k, step in enumerate(recipe.steps):
        pairs = make(preferences.prepare, sources=files, role=f"steps.{k}", selection=step.selection, config=data)
        before = policies[-1]
        scored = make(
            reference.score, policy=before, preferences=pairs, splits=["train"], max_tokens=data.max_tokens,
            compute=compute,
        )  # fmt: skip
        policies.append(make(
            dpo.train, policy=before, reference=scored, objective=step.objective(recipe.beta, step.lambda_[0]),
            training=step.training, seed=seed, compute=compute,
        ))  # fmt: skip
    return Flow(recipe, *policies)


def test_the_loop_and_the_flow_give_the_same_weights(loop: ModuleType, flow: Flow) -> None:
    """Each goes its own way from the base: step two of the loop starts at, and is held to, the π_r of the loop."""
    base = AutoModelForCausalLM.from_pretrained(flow.base.path, dtype=torch.float32)
    helpful, harmless = (loop.step_of(policy.path) for policy in (flow.reward, flow.safe))
    assert (helpful.updates, harmless.updates, len(harmless.pairs)) == (20, 20, 500)
    reward, safe = loop.sacpo(base, helpful, harmless, flow.recipe.beta, flow.recipe.steps[1].lambda_[0])
    for model, policy, before in ((reward, flow.reward, base), (safe, flow.safe, reward)):
        assert loop.gap(model, policy.path) < CLOSE
        assert loop.gap(before, policy.path) > 30 * CLOSE  # the step had a way to go


def test_the_loop_knows_nothing_of_the_machinery() -> None:
    tree = ast.parse(LOOP.read_text("utf-8"))
    imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imports += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    others = {name.split(".")[0] for name in imports} - sys.stdlib_module_names
    assert others == {"numpy", "torch", "safetensors", "transformers"}
    assert len(LOOP.read_text("utf-8").splitlines()) <= 120


def test_the_command_line_follows_a_whole_run(undisturbed: Path) -> None:
    (report,) = undisturbed.glob("quickstart/*/report.json")
    command = [sys.executable, str(LOOP), str(report.parent), "0.2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    gaps = re.findall(r"^(\S+): within (\S+) of the run's weights, (\S+) from the base's$", done.stdout, re.MULTILINE)
    assert [name for name, _, _ in gaps] == ["π_r", "π_{r+λg}"]
    assert all(float(near) < CLOSE < 30 * CLOSE < float(far) for _, near, far in gaps)
