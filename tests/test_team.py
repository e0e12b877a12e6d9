"""The team profile as it is: both servers on a real PostgreSQL, artifacts in an S3-compatible store, on loopback."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from models.errors import BadPlace
from tasks import fetching, servers, tracking
from tasks.wanted import DATABASES, Wanted, reachable


def test_a_team(
    postgres: str, store: Any, up: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Wanted(postgres=postgres)
    port = postgres.rpartition(":")[2]
    for name in DATABASES:
        with pytest.raises(BadPlace, match=f'"{name}" does not exist; createdb -h 127.0.0.1 -p {port} {name}$'):
            reachable(wanted)
        with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")  # type: ignore[arg-type]
    reachable(wanted)
    with pytest.raises(BadPlace, match="password authentication failed"):
        reachable(Wanted(postgres=postgres.replace("sacpo@", "sacpo:wrong@")))

    runs = tmp_path / "server"
    secrets = {"PREFECT_SERVER_API_AUTH_STRING": "team:correct-horse", "MLFLOW_AUTH_ADMIN_PASSWORD": "battery-staple"}
    team = up(runs, "--postgres", postgres, "--artifacts", "s3://team", "--no-worker", **store.environment, **secrets)
    assert os.environ["PGPASSWORD"] not in team.said + "".join(path.read_text() for path in runs.rglob("*.ini"))

    person = {
        **team.addresses, "SACPO_DATABASE": wanted.database("sacpo", "psycopg"), "SACPO_RUNS": str(tmp_path / "person"),
        "PREFECT_API_AUTH_STRING": "team:correct-horse",
        "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "battery-staple",
    }  # fmt: skip
    few = [*small, "sft.updates=20", "steps.1.lambda=[1]", "merge.weights=[]"]
    changes = [part for change in few for part in ("--set", change)]
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", "quickstart", *changes],
        env=os.environ | person, cwd=servers.CHECKOUT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode in (0, 4), done.stdout + done.stderr

    with psycopg.connect(f"{postgres}/prefect") as connection:
        states = connection.execute("select state_type from flow_run where name like 'quickstart · %'").fetchall()
    assert states == [("COMPLETED",)]
    with psycopg.connect(f"{postgres}/sacpo") as connection:
        assert connection.execute("select count(*) from sacpo_decisions").fetchone() == (1,)
    with psycopg.connect(f"{postgres}/mlflow") as connection:
        assert connection.execute("select username from users").fetchall() == [("admin",)]
    keys = [found["Key"] for found in store.client.list_objects_v2(Bucket="team")["Contents"]]
    assert any(key.endswith("report.html") for key in keys) and any(key.endswith(".safetensors") for key in keys)
    assert not (runs / "mlflow.db").exists() and not (runs / "artifacts").exists()

    for name, value in person.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "SERVER", team.mlflow)
    assert list(fetching.fetch(tmp_path / "colleague", "models:/quickstart/1").glob("*.safetensors"))
    assert team.end() == 0
