"""Judge policies as they are, trained here or not: the same judges, statistics and report as after training."""

from typing import Any

from prefect import flow

from models.assessment import Assessment
from tasks import stages
from tasks.leases import watched
from tasks.run import opened


@watched
@flow(name="evaluate", flow_run_name="{assessment.name}")
def evaluate(assessment: Assessment) -> dict[str, Any]:
    """Judge policies side by side, and test the bound on them in the order in which they are given.

    Args:
        assessment: policies, prompts, judges, and the bound.
    """
    with opened(assessment) as run:
        sources = stages.gather(run)
        policies = [stages.adopt(run, place) for place in assessment.policies]
        yardstick = stages.Yardstick(policies[0], sources, [], {}, "test")
        told = [stages.examine.submit(run, policy, policies[0], yardstick) for policy in policies]
        candidates = [evidence.result() for evidence in told]
        verdicts = stages.test_in_order(run, candidates)
        return stages.publish(run, candidates, stages.AS_THEY_ARE, verdicts, stages.NOT_REGISTERED, yardstick)
