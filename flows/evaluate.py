"""Judge policies as they are, trained here or not: the same judges, statistics and report as after training."""

from prefect import State

from models.gate.gate import AS_THEY_ARE
from models.gate.promotion_log import NOT_REGISTERED
from models.recipe import Assessment
from models.report.report import Findings
from tasks import stages
from tasks.decisions import test_in_order
from tasks.leases import gives_lease_back
from tasks.outcomes import Outcome
from tasks.reporting import publish, state_of
from tasks.run import open_run
from tasks.work.prefect_pages import flow


@gives_lease_back
@flow(name="evaluate", flow_run_name="{assessment.name}")
def evaluate(assessment: Assessment) -> State[Outcome]:
    """Judge policies side by side, and test the bound on them in the order in which they are named.

    Args:
        assessment: policies, prompts, judges, and the bound.
    """
    with open_run(assessment) as run:
        sources = stages.gather(run)
        adopted = [stages.adopt(run, place) for place in assessment.policies]
        policies = stages.uniquely_named(assessment.policies, adopted)
        # Nothing is chosen here, so all prompts are test prompts, and no held-out comparisons are needed.
        yardstick = stages.Yardstick(policies[0], sources, [], {}, stages.gather_prompts(run, sources, [], "test"))
        futures = [stages.examine.submit(run, policy, policies[0], yardstick) for policy in policies]
        candidates = [future.result() for future in futures]
        verdicts = test_in_order(run, candidates)
        return state_of(publish(run, Findings(candidates, AS_THEY_ARE, verdicts), yardstick, NOT_REGISTERED))
