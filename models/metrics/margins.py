"""Does a policy prefer what people preferred? Log-ratio margins on held-out pairs, and what follows from them.

The margin of a pair is h = log π(chosen)/π_base(chosen) − log π(rejected)/π_base(rejected), in nats, unscaled. Margins
of a policy and of its reference, subtracted, are the margins against that reference. Accuracy here is agreement with
labels on held-out comparisons; it is no safety rate.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from typing_extensions import TypedDict

from models.alignment.rows import ScoredPair, read
from models.artifacts import Margins, Policy, Reference, content_digest, file_digest
from models.data.preferences import HELDOUT
from models.files import jsonl
from models.metrics.statistics import STEEPEST, Estimate, clustered, scale
from models.policy.logprobs import pair_logps
from models.policy.weights import load
from models.recipe import Compute
from models.stage import stage


class MarginRow(TypedDict):
    """How a policy weighs one held-out pair, relative to the base: a row of `margins.jsonl`."""

    metric: str
    split: str
    prompt: str
    """Digest of the prompt's tokens: pairs with one prompt depend on each other."""
    tokens: list[int]
    """Of the chosen and of the rejected answer."""
    chosen: float
    """log π(chosen)/π_base(chosen), in nats."""
    rejected: float


@stage("margins.weigh", version=1)
def weigh(out: Path, policy: Policy, scored: dict[str, Reference], compute: Compute) -> Margins:
    """Write `margins.jsonl`: metric, split, prompt, tokens of both answers, and log π/π_base of chosen and rejected.

    Args:
        scored: metric → held-out pairs with the log-probs of the base.
    """
    own = all(reference.policy == policy.digest for reference in scored.values())  # the base is weighed against itself
    loaded = None if own else load(policy, compute)
    with (out / "margins.jsonl").open("w") as file:
        for metric, reference in scored.items():
            for split in HELDOUT:
                rows = read(reference, ScoredPair, split)
                stored = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows]
                logps = pair_logps(loaded[0], rows, loaded[1].pad_token_id) if loaded else stored
                for row, (chosen, rejected) in zip(rows, logps, strict=True):
                    margin: MarginRow = {
                        "metric": metric,
                        "split": split,
                        "prompt": content_digest(row["prompt_ids"])[:12],
                        "tokens": [len(row["chosen_ids"]), len(row["rejected_ids"])],
                        "chosen": chosen - row["ref_chosen_logps"],
                        "rejected": rejected - row["ref_rejected_logps"],
                    }
                    file.write(json.dumps(margin) + "\n")
    return Margins(path=out, digest=file_digest(out / "margins.jsonl"), policy=policy.digest)


def table(margins: Margins) -> list[MarginRow]:
    """Return the rows of `margins.jsonl`."""
    return [cast(MarginRow, row) for row in jsonl.read(margins.path / "margins.jsonl")]


def of(rows: Sequence[MarginRow], metric: str, split: str) -> list[MarginRow]:
    """Return the rows of one metric and split."""
    return [row for row in rows if row["metric"] == metric and row["split"] == split]


def figures(rows: Sequence[MarginRow], metric: str) -> dict[str, Estimate]:
    """Return accuracy and negative log-likelihood (nats) on the test pairs of a metric.

    One scale, fitted on the validation pairs, turns margins into probabilities; the length-only baseline gets the same
    freedom. `nll_minus_length` is paired: below 0 the policy explains the labels better than length does. Where length
    alone tells the few validation pairs apart without an error, its fit has no end, and there is no such figure: on
    other pairs it would be wrong by thousands of nats.
    """
    test, validation = of(rows, metric, "test"), of(rows, metric, "validation")
    if not test or not validation:
        return {}
    prompts = [row["prompt"] for row in test]
    fitted_on = [row["prompt"] for row in validation]
    fit = scale(_margin(validation), fitted_on, resamples=0).value
    policy_nll = _nll(_margin(test), max(0.0, fit))  # a negative scale would reverse the reward
    longer = _longer(validation)
    slope = scale(longer, fitted_on, resamples=0).value if any(longer) else 0.0
    length_nll = _nll(_longer(test), slope)
    right = [0.5 + 0.5 * float(np.sign(h)) for h in _margin(test)]
    guessed = [0.5 + 0.5 * float(np.sign(slope * longer)) for longer in _longer(test)]
    estimates = {
        f"preference/{metric}/accuracy": clustered(right, prompts),
        f"preference/{metric}/accuracy_length": clustered(guessed, prompts),
        f"preference/{metric}/nll": clustered(policy_nll.tolist(), prompts),
    }
    if abs(slope) >= STEEPEST:
        return estimates
    return estimates | {
        f"preference/{metric}/nll_length": clustered(length_nll.tolist(), prompts),
        f"preference/{metric}/nll_minus_length": clustered((policy_nll - length_nll).tolist(), prompts),
    }


def acts(rows: Sequence[MarginRow], reference: Sequence[MarginRow], metric: str) -> Estimate:
    """Return s, fitted on the held-out margins against the policy's own reference; at the optimum s = β/λ."""
    pairs = [(a, b) for a, b in zip(rows, reference, strict=True) if a["metric"] == metric]
    return scale([_against(a, b) for a, b in pairs], [a["prompt"] for a, _ in pairs])


def dpo_nll(rows: Sequence[MarginRow], reference: Sequence[MarginRow], metric: str, weight: float) -> Estimate:
    """Return DPO's own held-out loss −log σ(β/λ · h) on the test pairs, h against the policy's reference."""
    pairs = zip(of(rows, metric, "test"), of(reference, metric, "test"), strict=True)
    margins = [(a["prompt"], _against(a, b)) for a, b in pairs]
    return clustered(_nll([h for _, h in margins], weight).tolist(), [prompt for prompt, _ in margins])


def distance(rows: Sequence[MarginRow], others: Sequence[MarginRow]) -> float:
    """Return the mean |log π − log π'| over held-out answers, in nats per answer."""
    gaps = []
    for a, b in zip(rows, others, strict=True):
        gaps += [abs(a["chosen"] - b["chosen"]), abs(a["rejected"] - b["rejected"])]
    return float(np.mean(gaps or [np.nan]))


def _against(row: MarginRow, reference: MarginRow) -> float:
    """Return the margin of a pair against the policy's own reference: both rows are relative to the base."""
    return (row["chosen"] - reference["chosen"]) - (row["rejected"] - reference["rejected"])


def _margin(rows: Sequence[MarginRow]) -> list[float]:
    return [row["chosen"] - row["rejected"] for row in rows]


def _longer(rows: Sequence[MarginRow]) -> list[float]:
    return [float(row["tokens"][0] - row["tokens"][1]) for row in rows]


def _nll(margins: Sequence[float], weight: float) -> "np.ndarray[Any, Any]":
    return np.logaddexp(0.0, -weight * np.asarray(margins, dtype=float))
