"""What must hold around every step; a run that breaks one of these stops with a sentence."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from models.alignment.rows import ScoredRow, scored_answers
from models.artifacts import Policy, Reference
from models.errors import BrokenInvariant
from models.policy.logprobs import Tokens, logps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-3
"""Nats by which log-probs of equal weights may differ in float32 (batching changes the order of sums)."""
PROBE = "probe.json"
"""Answers with the log-probs that a trained policy gave them, stored beside its weights."""


def same_policy(policy: Policy, reference: Reference, metric: str) -> None:
    """Check that the reference log-probs are those of the policy that training starts from."""
    if reference.policy != policy.digest:
        raise BrokenInvariant(
            f"{metric} step: the reference log-probs are of policy {reference.policy[:12]}, but training starts from "
            f"{policy.digest[:12]}; Theorem 1 holds only when both are the policy of the step before"
        )


def answers_are_seen(answers: Iterable[list[int]], what: str) -> None:
    """Check that some answer holds more than its end-of-turn token: else nothing is learnt, whatever the loss says."""
    if all(len(ids) <= 1 for ids in answers):
        raise BrokenInvariant(
            f"{what}: no answer holds a token to learn from; look at what the chat template writes of the assistant"
        )


def answers_differ(rows: Sequence[ScoredRow], metric: str) -> None:
    """Check that chosen and rejected differ in some row: else the loss stays at ln 2."""
    if all("chosen_ids" in row and row["chosen_ids"] == row["rejected_ids"] for row in rows):
        raise BrokenInvariant(
            f"{metric} step: in every pair chosen and rejected are the same tokens, so there is nothing to prefer; "
            "look at what the chat template writes of the assistant"
        )


def learns(update: int, grad_norm: float) -> None:
    """Check that the first update moves something; later ones may have learnt all there is."""
    if update == 1 and grad_norm == 0:
        raise BrokenInvariant(
            "update 1: the gradient is zero, so nothing would be learnt; look at the weights of the base, and at what "
            "the chat template writes of the assistant"
        )


def starts_at_reference(model: "PreTrainedModel", rows: Sequence[ScoredRow], pad: int) -> None:
    """Check log π = log π_reference before the first update, in nats, not scaled by β.

    A loss of ln 2 does not prove it: policy and reference both loaded from the base give ln 2 exactly.
    """
    answers = [answer for row in rows for answer in scored_answers(row)]
    ours = logps(model, [tokens for tokens, _ in answers], pad)
    agree(ours, [stored for _, stored in answers], "before the first update, policy and reference differ")


def reproduces_probe(policy: Policy, model: "PreTrainedModel", pad: int) -> None:
    """Check that the loaded weights give the log-probs that were stored when the step before ended."""
    path = policy.path / PROBE
    if path.exists():
        probe = json.loads(path.read_text())
        values = logps(model, [(prompt, answer) for prompt, answer in probe["answers"]], pad)
        agree(values, probe["logps"], f"the policy loaded from {policy.path} is not the one that was trained")


def write_probe(probes: list[Tokens], values: list[float], out: Path) -> None:
    """Store the log-probs by which the next step will recognise this policy."""
    # The loss of the last update was computed before that update, so it does not show weights that became NaN in it
    if not all(math.isfinite(value) for value in values):
        raise BrokenInvariant("after training log-probs are not finite; lower learning_rate or max_grad_norm")
    (out / PROBE).write_text(json.dumps({"answers": probes, "logps": values}))


def agree(values: Iterable[float], expected: Iterable[float], what: str) -> None:
    """Raise BrokenInvariant unless two lists of log-probs agree within TOLERANCE nats."""
    gaps = [abs(a - b) for a, b in zip(values, expected, strict=True)]
    gap = max((g for g in gaps if not math.isnan(g)), default=math.nan)
    if not all(g <= TOLERANCE for g in gaps):  # `any(g > TOLERANCE …)` would let NaN pass
        raise BrokenInvariant(f"{what}: log-probs are {gap:.3g} nats apart, at most {TOLERANCE:g} is allowed")
