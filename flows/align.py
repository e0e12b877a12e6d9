"""Algorithm 1 of SACPO as a flow: recipe → registered version.

π_0  ← base
for each step k with comparisons D_k and multipliers λ:
    π_k ← align π_{k−1} on D_k, with reference π_{k−1} and KL weight β/λ         (one policy per λ)
π(q) ← q·π_K + (1−q)·π_{K−1}                                                    (P-SACPO, one per q)
choose one candidate on validation prompts; test it once on test prompts; register it if the constraint holds
"""

from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from models.recipe import Recipe
from tasks import stages
from tasks.run import opened


@flow(name="align", flow_run_name="{recipe.name}")
def align(recipe: Recipe) -> dict[str, Any]:
    """Align the base policy step by step, and register the candidate that holds the constraint.

    Args:
        recipe: every choice of the experiment.
    """
    with opened(
        recipe, {"prefect.flow_run_id": flow_run.id or "", "prefect.flow_run_url": flow_run.ui_url or ""}
    ) as run:
        sources = stages.gather(run)
        base = stages.finetune(run, stages.base(run), sources)
        policies = frontier = [base]
        judged = [stages.evaluate.submit(run, base, {"base": base}, sources, "validation")]

        for step in recipe.steps:
            pairs = stages.prepare(run, sources, step)
            before, trained = frontier, []
            for reference in before:
                scored = stages.score(run, reference, pairs)
                for value in step.lambda_:
                    policy = stages.align.submit(run, reference, scored, step, value)
                    near = {"base": base, "reference": reference}
                    judged.append(stages.evaluate.submit(run, policy, near, sources, "validation"))  # type: ignore[call-overload]
                    trained.append(policy)
            frontier = [policy.result() for policy in trained]
            policies = policies + frontier

        for safe, reward in stages.ends(before, frontier):
            for q in recipe.merge.weights:
                merged = stages.interpolate(run, safe, reward, q)
                near = {"base": base, "reference": reward}
                judged.append(stages.evaluate.submit(run, merged, near, sources, "validation"))
                policies = [*policies, merged]

        evaluations = [evaluation.result() for evaluation in judged]
        choice = stages.choose(run, policies, evaluations)
        verdict = stages.certify(run, choice, policies, sources)
        registered = stages.register(run, choice, verdict, policies, sources)
        return stages.publish(run, policies, evaluations, choice, verdict, registered, sources)
