"""Algorithm 1 of SACPO as a flow: recipe → registered version.

π_0  ← base
for each step k with comparisons D_k and multipliers λ:
    π_k ← align π_{k−1} on D_k, with reference π_{k−1} and KL weight β/λ         (one policy per λ)
π(q) ← q·π_K + (1−q)·π_{K−1}                                                    (P-SACPO, one per q)
choose one candidate on validation prompts; test it once on test prompts; register it if the constraint holds;
promote it if it also passes the gate beside the champion; if that has changed meanwhile, test beside the new one
"""

from typing import Any

from prefect.runtime import flow_run

from models.alignment.merge import merge_pairs
from models.recipe import Recipe
from tasks import decisions, reporting, stages
from tasks.leases import watched
from tasks.reporting import Findings
from tasks.run import opened
from tasks.work.prefect_pages import flow


def _named() -> str:
    """Name a run by what tells it from others of its recipe: `quickstart · helpful λ=1 → harmless λ=0.2, 1`."""
    return Recipe.model_validate(flow_run.parameters["recipe"]).headline


@watched
@flow(name="align", flow_run_name=_named)
def align(recipe: Recipe) -> Any:
    """Align the base policy step by step, and register the candidate that holds the constraint.

    Args:
        recipe: every choice of the experiment.
    """
    with opened(recipe) as run:
        sources = stages.gather(run)
        pairs = [stages.prepare(run, sources, step) for step in recipe.steps]  # bad data stop here, before any training
        base = stages.finetune(run, stages.base(run), sources)
        yardstick = stages.yardstick(run, base, sources, pairs)
        evidence = [stages.examine.submit(run, base, base, yardstick)]

        frontier = [base]
        for step, comparisons in zip(recipe.steps, pairs, strict=True):
            before, trained = frontier, []
            for reference in before:
                scored = stages.score(run, reference, comparisons, step)
                for value in step.lambda_:
                    policy = stages.align.submit(run, reference, scored, step, value)
                    evidence.append(stages.examine.submit(run, policy, reference, yardstick))  # type: ignore[call-overload]
                    trained.append(policy)
            frontier = [policy.result() for policy in trained]

        for safe, reward in merge_pairs(before, frontier):
            for q in recipe.merge.weights:
                merged = stages.interpolate(run, safe, reward, q)
                evidence.append(stages.examine.submit(run, merged, reward, yardstick))

        candidates = stages.unique_candidates([told.result() for told in evidence])
        choice = decisions.choose(run, candidates)
        promoted = None
        while promoted is None:  # once more where another version became the champion since the test beside the former
            with decisions.turn(run, choice):
                rivals = decisions.rivals(run, choice, candidates)
                tested = decisions.test(run, choice, candidates, yardstick, rivals)
                verdict = decisions.certify(run, tested, rivals)
                registered = decisions.register(run, choice, verdict, candidates, sources)
                found = Findings(candidates, choice, [verdict] if verdict else [], yardstick, tested)
                asks = decisions.waits(run, registered, verdict)
                promoted = None if asks else decisions.promote(run, registered, verdict, rivals)
            if asks:  # for days, perhaps: nobody waits for this run meanwhile
                reporting.show(run, found, registered)
                approval = decisions.approve(run, registered, verdict, rivals)
                promoted = decisions.promote(run, registered, verdict, rivals, approval)
        return reporting.ended(reporting.publish(run, found, promoted))
