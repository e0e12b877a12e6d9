"""The addresses of MLflow's pages, for links from other pages to them."""

from urllib.parse import quote

from models.gate.promotion_log import Registered
from tasks.tracking import connection
from tasks.tracking.mlflow_run import MlflowRun


def pages(run: MlflowRun, registered: Registered) -> list[tuple[str, str]]:
    """Return (address, text) of the pages of a run and of a version; none where MLflow is a file and has no pages.

    The addresses hold no password; a model's name stands in them percent-encoded.
    """
    server = connection.shown_uri(run.root)
    if not server.startswith("http"):
        return []
    client, run_id = run.client(), run.open()
    experiment = client.get_run(run_id).info.experiment_id
    start, name, version = f"{server.rstrip('/')}/#", registered.name, registered.version
    return [
        (f"{start}/experiments/{experiment}/runs/{run_id}", "Run in MLflow"),
        (f"{start}/models/{quote(name, safe='')}/versions/{version}", f"{name} version {version} in MLflow"),
    ]
