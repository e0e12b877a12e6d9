"""One step of SACPO: move a policy along one preference, anchored to the policy of the step before.

    reward step   π_r       = dpo(reference = base, KL weight β,   comparisons by helpfulness)
    safety step   π_{r+λg}  = dpo(reference = π_r,  KL weight β/λ, comparisons by harmlessness)      (eq. 11)

TRL trains. What is ours: the reference is exactly the saved weights of the step before, its log-probs are computed
once for the whole λ grid, and a run that breaks either stops with a sentence.
"""

from pathlib import Path

from models.alignment.batching import order
from models.alignment.rows import ScoredPair, read
from models.alignment.trainer import adapter, arguments, finish, fit, start, with_stored_logps
from models.artifacts import Policy, Reference
from models.policy.shared_prompt import tokens
from models.recipe import Compute, Method, Objective, PreferenceTraining
from models.stage import stage

CURVE = {"loss": "loss", "margin": "margin (nats)", "accuracy": "accuracy"}
"""Column of `progress.jsonl` → title of its panel: what shows whether such a training went well."""


@stage("alignment.dpo", version=2)
def train(
    out: Path,
    policy: Policy,
    reference: Reference,
    objective: Objective,
    training: PreferenceTraining,
    seed: int,
    compute: Compute,
) -> Policy:
    """Train one policy by DPO from, and against, the policy of the step before (SACPO Algorithm 1).

    Args:
        policy: where training starts; must be the very policy that `reference` was computed with.
        reference: tokenised pairs with log π_reference of both answers.
        objective: with the step's multiplier λ; the KL weight handed to DPO is β/λ.
        out: gets weights, tokenizer, `progress.jsonl` and `probe.json`.

    Raises:
        BrokenInvariant: the reference is not the policy of the step before; log-probs moved on disk; NaN.
        BadData: no pair to train on.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from models.alignment.curve import TrainingMonitor

    rows = read(reference, ScoredPair)
    model, tokenizer = start(policy, reference, objective, rows, compute)
    lengths = [tokens(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]]) for row in rows]
    # the order is ours and fixed by the seed, so that a resumed training sees the same rows as one that never stopped
    places = order(lengths, training, seed)
    curve = TrainingMonitor(out, training)
    trainer = with_stored_logps(DPOTrainer)(
        model=model,
        args=DPOConfig(
            **arguments(training, f"{objective.metric} step", len(places), seed, compute, out),
            beta=objective.kl_weight,
            max_length=None,  # rows that are too long were left out, never cut: a cut answer has no end
            precompute_ref_log_probs=True,  # they are in the rows; no second model is held in memory
        ),
        train_dataset=Dataset.from_list([rows[i] for i in places]),
        processing_class=tokenizer,
        callbacks=[curve],
        peft_config=adapter(training),
    )
    fit(trainer, curve, compute, out)
    return finish(trainer, policy, objective, Method.dpo, rows, out)
