"""SACPO (Wachi et al. 2024, Algorithm 1) in plain torch: no TRL, no Prefect, no MLflow, and no other file of ours.

    1    π_r       ←  DPO(start and reference π_base,  KL weight β,    pairs by helpfulness)
    2    π_{r+λg}  ←  DPO(start and reference π_r,     KL weight β/λ,  pairs by harmlessness)        (eq. 11)

`python examples/sacpo_loop.py runs/quickstart/0123456789abcdef 0.2` reads base, pairs and settings of a finished run of
the quickstart, trains both steps by itself on the same pairs in the same order, here for λ = 0.2, and prints how far
its weights are from those of the run.
"""

import copy
import json
import math
import sys
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, logsigmoid
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedModel

Pair = dict[str, list[int]]  # token ids: prompt_ids, chosen_ids, rejected_ids; an answer ends with EOS


class Step(NamedTuple):
    """The pairs of one step, and how the weights are moved."""

    pairs: list[Pair]
    updates: int
    batch: int
    learning_rate: float
    warmup: float
    max_grad_norm: float
    seed: int


def sacpo(base: PreTrainedModel, helpful: Step, harmless: Step, beta: float, lambda_: float) -> list[PreTrainedModel]:
    """Return π_r and π_{r+λg}: Algorithm 1."""
    reward = dpo(base, helpful, beta)
    return [reward, dpo(reward, harmless, beta / lambda_)]


def dpo(reference: PreTrainedModel, step: Step, b: float) -> PreTrainedModel:
    """Return the policy π that starts at the reference p and is trained with the DPO loss of KL weight b.

    L(π) = −E log σ( b·log[π(chosen|x)/p(chosen|x)] − b·log[π(rejected|x)/p(rejected|x)] )
    """
    policy = copy.deepcopy(reference)
    optimiser = torch.optim.AdamW(policy.parameters(), weight_decay=0)
    for update, pairs in enumerate(batches(step)):
        with torch.no_grad():
            p_chosen, p_rejected = (log_probs(reference, pairs, side) for side in ("chosen_ids", "rejected_ids"))
        chosen, rejected = (log_probs(policy, pairs, side) for side in ("chosen_ids", "rejected_ids"))
        margins = (chosen - p_chosen) - (rejected - p_rejected)
        loss = -logsigmoid(b * margins).mean()
        optimiser.zero_grad()
        loss.backward()
        clip_grad_norm_(policy.parameters(), step.max_grad_norm)
        optimiser.param_groups[0]["lr"] = learning_rate(update, step)
        optimiser.step()
        if update % 10 == 9:
            print(f"  update {update + 1} of {step.updates}: loss {loss:.4f}, margin {margins.mean():.3f} nats")
    return policy


def log_probs(model: PreTrainedModel, pairs: list[Pair], side: str) -> torch.Tensor:
    """Return log π(answer|prompt) of one answer per pair: summed over its tokens, in nats, shape (pairs,)."""
    ids = [torch.tensor(pair["prompt_ids"] + pair[side]) for pair in pairs]
    targets = [torch.tensor([-100] * len(pair["prompt_ids"]) + pair[side]) for pair in pairs]  # −100 counts as 0 nats
    # Padding stands on the right and attention looks to the left, so no token of an answer sees it.
    logits = model(input_ids=pad_sequence(ids, batch_first=True)).logits
    next_ids = pad_sequence(targets, batch_first=True, padding_value=-100)[:, 1:]  # position t predicts token t + 1
    return -cross_entropy(logits[:, :-1].transpose(1, 2), next_ids, reduction="none", ignore_index=-100).sum(dim=1)


def learning_rate(update: int, step: Step) -> float:
    """Return the learning rate of an update, counted from 0: it rises in a line, then falls as half a cosine."""
    rising = math.ceil(step.warmup * step.updates)
    angle = math.pi * (update - rising) / (step.updates - rising)
    return step.learning_rate * (update / rising if update < rising else 0.5 + 0.5 * math.cos(angle))


def batches(step: Step) -> list[list[Pair]]:
    """Return the pairs of each update: every pair once in random order, then every pair once more, and so on."""
    draw = np.random.default_rng(step.seed)
    stream = (step.pairs[i] for _ in count() for i in draw.permutation(len(step.pairs)))
    return [list(islice(stream, step.batch)) for _ in range(step.updates)]


def gap(model: PreTrainedModel, folder: Path) -> float:
    """Return the largest difference between a weight of the model and the same weight in a folder."""
    weights = load_file(folder / "model.safetensors")
    return max(float((weight - weights[name]).abs().max()) for name, weight in model.state_dict().items())


def step_of(policy: Path) -> Step:
    """Return how a run trained a policy, and on which pairs, as the manifests of its results say."""
    manifests = {path.parent: json.loads(path.read_text("utf-8")) for path in policy.parent.glob("*/manifest.json")}
    arguments = manifests[policy]["given"]
    (folder,) = (f for f, manifest in manifests.items() if manifest["noun"]["digest"] == arguments["reference"])
    pairs = [json.loads(line) for line in (folder / "train.jsonl").read_bytes().splitlines()]
    settings = arguments["training"] | {"pairs": pairs, "seed": arguments["seed"]}
    return Step(**{name: settings[name] for name in Step._fields})


if __name__ == "__main__":
    torch.set_num_threads(1)  # as the run does; at this size a second thread only costs time
    run, lambda_ = Path(sys.argv[1]), float(sys.argv[2])
    report = json.loads((run / "report.json").read_text("utf-8"))
    folders = {(c["step"], c["lambda"]): Path(c["path"]) for c in report["candidates"] if c["kind"] != "merge"}
    base, places = folders[0, 0], (folders[1, 1], folders[2, lambda_])
    start = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policies = sacpo(start, step_of(places[0]), step_of(places[1]), report["recipe"]["settings"]["beta"], lambda_)
    for name, policy, place in zip(("π_r", "π_{r+λg}"), policies, places, strict=True):
        print(f"{name}: within {gap(policy, place):.0e} of the run's weights, {gap(policy, base):.0e} from the base's")
