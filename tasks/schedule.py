"""Scheduled runs that start late, because the worker was down or an earlier one took long, must not pile up."""

from datetime import UTC, datetime

from prefect import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.runtime import deployment, flow_run

WAITING = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING]


def superseded() -> str:
    """Return why this run has nothing to do: a newer run of the same deployment is due already; empty if none is."""
    if not deployment.id or not flow_run.id:
        return ""
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(flow_run.id)
        scheduled = this.expected_start_time
        if scheduled is None:
            return ""
        due = FlowRunFilter(
            deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=WAITING)),
            expected_start_time=FlowRunFilterExpectedStartTime(after_=scheduled, before_=datetime.now(UTC)),
        )
        waiting = client.read_flow_runs(flow_run_filter=due)
    # A run with other parameters is no substitute. Of two that are due at the same moment neither gives way.
    newer = [
        run
        for run in waiting
        if run.id != this.id
        and run.parameters == this.parameters
        and run.expected_start_time
        and run.expected_start_time > scheduled
    ]
    return f"superseded by {newer[0].name}, which was due at {newer[0].expected_start_time:%H:%M:%S}" if newer else ""
