"""A team's object store, on loopback."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Store(NamedTuple):
    """Where a team's artifacts lie: its bucket is `s3://team`."""

    client: Any
    environment: dict[str, str]
    """What the server needs to reach it."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """An S3-compatible store with one empty bucket."""
    import boto3

    from tests.conftest import PASSWORD, PATIENCE, answering, free_port

    address = f"http://127.0.0.1:{(port := free_port())}"
    log = (tmp_path_factory.mktemp("store") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    answering(address, Path(log.name))
    client = boto3.client(
        "s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="sacpo", aws_secret_access_key=PASSWORD
    )
    client.create_bucket(Bucket="team")
    yield Store(client, {
        "AWS_ACCESS_KEY_ID": "sacpo", "AWS_SECRET_ACCESS_KEY": PASSWORD, "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": address,
    })  # fmt: skip
    server.terminate()
    server.wait(PATIENCE)
