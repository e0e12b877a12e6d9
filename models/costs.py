"""What a run costs, told before it starts: memory, time on a CPU, answers to generate, calls of judges."""

import math
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from models.artifacts import Sources
from models.data import town
from models.files import hub, jsonl
from models.judges.judge import SEES
from models.judges.protocol import rubric_files
from models.policy import weights
from models.policy.probe import Findings
from models.recipe import JudgeKind, Recipe
from models.recipe.places import TOWN

OVERHEAD = 0.03
"""Seconds per optimiser update that do not depend on the model (measured on town, one thread)."""
EFFICIENCY = 0.5
"""Share of a plain matrix product's speed that training reaches (measured on town and SmolLM2-135M, float32)."""
CHARACTERS_PER_TOKEN = 4
"""Roughly, of English text; nothing is tokenised for an estimate."""


class Trainings(NamedTuple):
    """The trainings of one step, which differ in λ and in the policy that they start from."""

    number: int
    tokens: int
    """Tokens that one training reads."""
    updates: int
    """Optimiser updates of one training."""


def parameters(base: str, findings: Findings) -> int:
    """Return the number of parameters; from the name (`…-7b`) for a hub model that is not here yet; −1 if unknown.

    Args:
        findings: what is known of a base that is on this disk.
    """
    if base == TOWN:
        return town.PARAMETERS
    if base.startswith("models:/"):
        return -1
    if hub.is_name(base):
        size = re.search(r"(\d+(?:\.\d+)?)([bm])\b", base.lower().replace("_", "-"))
        return int(float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]) if size else -1
    return findings.parameters if findings.parameters >= 0 else weights.parameters(weights.located(base))


def training_memory(parameters: int, full: bool) -> float:
    """Return the bytes of weights, gradients and optimiser of one training, of all weights or of an adapter."""
    # In float32 a weight, its gradient and AdamW's two moments take 4 bytes each. Under an adapter the base needs its
    # weights only; the adapter itself is counted as one byte per weight of the base.
    return parameters * (16.0 if full else 5.0)


def disk(parameters: int, policies: int, checkpoints: int) -> float:
    """Return the bytes of all policies and of the checkpoints of the full trainings that run side by side."""
    # Policies are float32; a checkpoint holds the weights and AdamW's two moments.
    return parameters * (4.0 * policies + 12.0 * checkpoints)


def seconds(recipe: Recipe, steps: Sequence[Trainings], parameters: int) -> float:
    """Return about how long all trainings and their references take on this machine's CPU; −1 on an accelerator."""
    if weights.device_kind(recipe.compute.device) != "cpu":
        return -1.0
    speed = EFFICIENCY * _matrix_speed() * recipe.compute.threads
    total = 0.0
    for step, trainings in zip(recipe.steps, steps, strict=True):
        # Per parameter and token: 2 operations forward, 2 for the gradients of activations, 2 for those of the weights,
        # which an adapter does not need.
        work = (4 if step.adapter_rank else 6) * parameters * trainings.tokens
        training = trainings.updates * OVERHEAD + work / speed
        side_by_side = min(recipe.compute.processes, trainings.number)
        total += math.ceil(trainings.number / max(1, side_by_side)) * training
        total += 2 * parameters * trainings.tokens / speed  # the reference scores the rows once, forward only
    return total


def _matrix_speed(size: int = 512) -> float:
    """Return the float32 operations per second of one matrix product on one core, roughly."""
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    best = math.inf
    for _ in range(5):  # the fastest one is least disturbed by other programs
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def judging(recipe: Recipe, origin: Sources | None, policies: int) -> list[str]:
    """Say how many answers to the suites on this disk are generated, and what chat models that judge cost at most.

    Every policy is compared with the base and with the policy that it was trained from. On the test prompts one
    candidate is compared with the base, with the champion and with the anchor.

    Args:
        policies: how many are judged, the base included.
    """
    evaluation = recipe.evaluation
    prompts = {
        split: {role: [row["prompt"] for row in jsonl.read(path)] for role, path in origin.suites(split).items()}
        for split in ("validation", "test")
        if origin
    }
    if not any(prompts.values()):
        return []
    validation, test = (sum(map(len, prompts[split].values())) for split in ("validation", "test"))
    rivals = 3  # base, champion, anchor; where the recipe names no anchor, the first champion is the anchor
    sentences = [
        f"{policies * validation * evaluation.answers:,} answers of up to {evaluation.max_new_tokens} tokens by "
        f"{policies} policies, and at most {(1 + rivals) * test * evaluation.answers:,} to test prompts"
    ]
    for metric, judge in evaluation.judges:
        if judge.kind is not JudgeKind.llm:
            continue
        comparing, *single = (len(path.read_text("utf-8")) for path in rubric_files(metric, judge) if path.is_file())
        calls, tokens = 0, 0.0
        for split, judged, comparisons in (("validation", policies, 2 * (policies - 1)), ("test", 1, rivals)):
            texts = [str(prompt) for role in SEES[metric] for prompt in prompts[split].get(role, [])]
            # (calls per prompt, characters of the rubric, answers in it); each pair is shown in both orders.
            kinds = [(2 * comparisons, comparing, 2), *((judged, rubric, 1) for rubric in single)]
            for times, rubric, answers in kinds:
                times *= evaluation.answers * judge.repeats
                calls += times * len(texts)
                call = rubric / CHARACTERS_PER_TOKEN + answers * evaluation.max_new_tokens + judge.reply_tokens
                tokens += times * (call * len(texts) + sum(map(len, texts)) / CHARACTERS_PER_TOKEN)
        sentences.append(
            f"{metric} by {judge.model}: at most {calls:,} calls and about {tokens / 1e6:,.1f} million tokens"
        )
    return sentences
