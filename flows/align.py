"""Algorithm 1 of SACPO as a flow: recipe → registered version.

π_0  ← base
for each step k with comparisons D_k and multipliers λ:
    π_k ← align π_{k−1} on D_k, with reference π_{k−1} and KL weight β/λ         (one policy per λ)
π(q) ← q·π_K + (1−q)·π_{K−1}                                                    (P-SACPO, one per q)
choose one candidate on validation prompts; test it once on test prompts; register it if the constraint holds;
promote it if it also passes the gate beside its rivals, champion and anchor; if another version has become the
champion meanwhile, test beside that one
"""

from typing import cast

from prefect import State
from prefect.runtime import flow_run

from models.alignment.merge import merge_pairs
from models.artifacts import Policy
from models.recipe import Recipe
from models.report.report import Findings
from tasks import approvals, decisions, reporting, stages
from tasks.leases import gives_lease_back
from tasks.outcomes import Outcome
from tasks.run import open_run
from tasks.work.prefect_pages import flow


def _run_name() -> str:
    """Return a name that tells runs of one recipe apart: `quickstart · helpful λ=1 → harmless λ=0.2, 1`."""
    return Recipe.model_validate(flow_run.parameters["recipe"]).headline


@gives_lease_back
@flow(name="align", flow_run_name=_run_name)
def align(recipe: Recipe) -> State[Outcome]:
    """Align the base policy step by step, and register the candidate that holds the constraint.

    Args:
        recipe: every choice of the experiment.
    """
    with open_run(recipe) as run:
        sources = stages.gather(run)
        # All data are prepared first: bad data stop the run here, before any training.
        pairs = [stages.prepare(run, sources, step) for step in recipe.steps]
        base = stages.finetune(run, stages.base(run), sources)
        yardstick = stages.yardstick(run, base, sources, pairs)
        examined = [stages.examine.submit(run, base, base, yardstick)]

        frontier = [base]
        for step, comparisons in zip(recipe.steps, pairs, strict=True):
            before, trained = frontier, []
            for reference in before:
                log_probs = stages.score(run, reference, comparisons, step)
                for value in step.lambda_:
                    future = stages.align.submit(run, reference, log_probs, step, value)
                    # Prefect waits for the future, and calls the task with its policy. Its types do not say so.
                    policy = cast(Policy, future)
                    examined.append(stages.examine.submit(run, policy, reference, yardstick))
                    trained.append(future)
            frontier = [future.result() for future in trained]

        for safe, reward in merge_pairs(before, frontier):
            for q in recipe.merge.weights:
                merged = stages.interpolate(run, safe, reward, q)
                examined.append(stages.examine.submit(run, merged, reward, yardstick))

        candidates = stages.unique_candidates([candidate.result() for candidate in examined])
        choice = decisions.choose(run, candidates)
        promoted = None
        # Repeat if another version became the champion since the test.
        while promoted is None:
            with decisions.turn(run, choice):
                rivals = decisions.rivals(run, choice, candidates)
                tested = decisions.test(run, choice, candidates, yardstick, rivals)
                verdict = decisions.certify(run, tested, rivals)
                registered = decisions.register(run, choice, verdict, candidates, sources)
                findings = Findings(candidates, choice, [verdict] if verdict else [], tested)
                waits = approvals.needs_approval(run, registered, verdict)
                promoted = None if waits else decisions.promote(run, registered, verdict, rivals)
            # The turn is over: a person may take days to answer, and other runs decide meanwhile.
            if waits:
                reporting.show(run, findings, yardstick, registered)
                approval = approvals.approve(run, registered, verdict, rivals)
                promoted = decisions.promote(run, registered, verdict, rivals, approval)
        return reporting.state_of(reporting.publish(run, findings, yardstick, promoted))
