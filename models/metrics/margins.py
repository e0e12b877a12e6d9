"""Does a policy prefer what people preferred? Log-ratio margins on held-out pairs, and what follows from them.

The margin of a pair is h = log π(chosen)/π_base(chosen) − log π(rejected)/π_base(rejected), in nats, unscaled. Margins
of a policy and of its reference, subtracted, are the margins against that reference. Accuracy here is agreement with
labels on held-out comparisons; it is no safety rate.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.artifacts import Margins, Policy, Reference, content_digest, file_digest
from models.data.preferences import HELDOUT
from models.files import jsonl
from models.metrics.statistics import STEEPEST, Estimate, clustered, scale
from models.policy.logprobs import pair_logps
from models.policy.weights import load
from models.recipe import Compute
from models.stage import stage

Row = dict[str, Any]


@stage("margins.weigh", version=1)
def weigh(out: Path, policy: Policy, scored: dict[str, Reference], compute: Compute) -> Margins:
    """Write `margins.jsonl`: metric, split, prompt, tokens of both answers, and log π/π_base of chosen and rejected.

    Args:
        scored: metric → held-out pairs with the log-probs of the base.
    """
    own = all(reference.policy == policy.digest for reference in scored.values())  # the base against itself
    loaded = None if own else load(policy, compute)
    with (out / "margins.jsonl").open("w") as file:
        for metric, reference in scored.items():
            for split in HELDOUT:
                rows = list(jsonl.read(reference.path / f"{split}.jsonl"))
                stored = [(row["ref_chosen_logps"], row["ref_rejected_logps"]) for row in rows]
                logps = pair_logps(loaded[0], rows, loaded[1].pad_token_id) if loaded else stored
                for row, (chosen, rejected) in zip(rows, logps, strict=True):
                    told = {
                        "metric": metric,
                        "split": split,
                        "prompt": content_digest(row["prompt_ids"])[:12],
                        "tokens": [len(row["chosen_ids"]), len(row["rejected_ids"])],
                        "chosen": chosen - row["ref_chosen_logps"],
                        "rejected": rejected - row["ref_rejected_logps"],
                    }
                    file.write(json.dumps(told) + "\n")
    return Margins(path=out, digest=file_digest(out / "margins.jsonl"), policy=policy.digest)


def table(margins: Margins) -> list[Row]:
    """Return the rows of `margins.jsonl`."""
    return list(jsonl.read(margins.path / "margins.jsonl"))


def of(rows: list[Row], metric: str, split: str) -> list[Row]:
    """Return the rows of one metric and split."""
    return [row for row in rows if row["metric"] == metric and row["split"] == split]


def figures(rows: list[Row], metric: str) -> dict[str, Estimate]:
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
    asked = [row["prompt"] for row in validation]
    ours = _nll(
        _margin(test), max(0.0, scale(_margin(validation), asked, resamples=0).value)
    )  # never a reversed reward
    longer = _longer(validation)
    slope = scale(longer, asked, resamples=0).value if any(longer) else 0.0
    length = _nll(_longer(test), slope)
    right = [0.5 + 0.5 * float(np.sign(h)) for h in _margin(test)]
    guessed = [0.5 + 0.5 * float(np.sign(slope * longer)) for longer in _longer(test)]
    told = {
        f"preference/{metric}/accuracy": clustered(right, prompts),
        f"preference/{metric}/accuracy_length": clustered(guessed, prompts),
        f"preference/{metric}/nll": clustered(ours.tolist(), prompts),
    }
    if abs(slope) >= STEEPEST:
        return told
    return told | {
        f"preference/{metric}/nll_length": clustered(length.tolist(), prompts),
        f"preference/{metric}/nll_minus_length": clustered((ours - length).tolist(), prompts),
    }


def acts(rows: list[Row], reference: list[Row], metric: str) -> Estimate:
    """Return s, fitted on the held-out margins against the policy's own reference; at the optimum s = β/λ."""
    kept = [(a, b) for a, b in zip(rows, reference, strict=True) if a["metric"] == metric]
    margins = [(a["chosen"] - b["chosen"]) - (a["rejected"] - b["rejected"]) for a, b in kept]
    return scale(margins, [a["prompt"] for a, _ in kept])


def dpo_nll(rows: list[Row], reference: list[Row], metric: str, weight: float) -> Estimate:
    """Return DPO's own held-out loss −log σ(β/λ · h) on the test pairs, h against the policy's reference."""
    kept = [(a, b) for a, b in zip(rows, reference, strict=True) if a["metric"] == metric and a["split"] == "test"]
    margins = [(a["chosen"] - b["chosen"]) - (a["rejected"] - b["rejected"]) for a, b in kept]
    return clustered(_nll(margins, weight).tolist(), [a["prompt"] for a, _ in kept])


def distance(rows: list[Row], others: list[Row]) -> float:
    """Return the mean |log π − log π'| over held-out answers, in nats per answer."""
    pairs = zip(rows, others, strict=True)
    return float(np.mean([abs(a[side] - b[side]) for a, b in pairs for side in ("chosen", "rejected")] or [np.nan]))


def _margin(rows: list[Row]) -> list[float]:
    return [row["chosen"] - row["rejected"] for row in rows]


def _longer(rows: list[Row]) -> list[float]:
    return [float(row["tokens"][0] - row["tokens"][1]) for row in rows]


def _nll(margins: Sequence[float], weight: float) -> "np.ndarray[Any, Any]":
    return np.logaddexp(0.0, -weight * np.asarray(margins, dtype=float))
