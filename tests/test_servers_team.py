"""The team profile as it is: both servers on a real PostgreSQL, artifacts in an S3-compatible store, on loopback."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from psycopg.sql import SQL, Identifier

from models.errors import BadPlace
from tasks.servers import up as servers
from tasks.servers.options import DATABASES, ServerOptions, check_postgres
from tasks.tracking import connection as tracking
from tasks.tracking import download


def composed(
    name: str, replaced: dict[str, str], secrets: dict[str, str]
) -> tuple[list[str], dict[str, str], set[str]]:
    """Return command and environment of a service of compose.yaml, with what was replaced in them, and nothing else.

    Args:
        name: of the service.
        replaced: host names, bind addresses, ports and paths as they stand there → as they are here.
        secrets: what a person exports; the file refuses to start without.
    """
    file = yaml.safe_load((servers.CHECKOUT / "mlflow" / "compose.yaml").read_text("utf-8"))
    service, used = file["services"][name], set()

    def here(text: str) -> str:
        text = re.sub(r"\$\{([A-Z_]+):\?set it\}", lambda found: secrets[found[1]], text)
        for there in sorted(replaced, key=len, reverse=True):
            if there in text:
                used.add(there)
                text = text.replace(there, replaced[there])
        return text

    command = [here(str(word)) for word in service["command"]]
    return command, {key: here(str(value)) for key, value in service["environment"].items()}, used


def without(postgres: str) -> None:
    """Drop the three databases: the tests of a module share a cluster."""
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        for name in DATABASES:
            connection.execute(SQL("drop database if exists {} with (force)").format(Identifier(name)))


def empty(postgres: str) -> None:
    """Make the three databases anew."""
    without(postgres)
    with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
        for name in DATABASES:
            connection.execute(SQL("create database {}").format(Identifier(name)))


@pytest.mark.slow
def test_compose_is_as_closed_as_up(postgres: str, store: Any, tmp_path: Path, port: int) -> None:
    """Its commands and environments, word for word but for the written list of places."""
    empty(postgres)
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        mlflow, prefect = (free.getsockname()[1] for free in (one, two))
    database = postgres.rpartition("@")[2]
    replaced = {
        "0.0.0.0": "127.0.0.1",
        "--port 5000": f"--port {mlflow}",
        "4200": str(prefect),
        "mlflow:5000": f"127.0.0.1:{mlflow}",
        "localhost:5000": f"localhost:{mlflow}",
        "127.0.0.1:5000": f"127.0.0.1:{mlflow}",
        "http://prefect:4200": f"http://127.0.0.1:{prefect}",
        "http://store:9000": store.environment["MLFLOW_S3_ENDPOINT_URL"],
        "@postgres/": f"@{database}/",
        "/run/mlflow-auth.ini": str(tmp_path / "mlflow-auth.ini"),
    }
    secrets = {
        "POSTGRES_PASSWORD": os.environ["PGPASSWORD"], "STORE_PASSWORD": store.environment["AWS_SECRET_ACCESS_KEY"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": "battery-staple", "MLFLOW_FLASK_SERVER_SECRET_KEY": "correct",
        "PREFECT_SERVER_API_AUTH_STRING": "team:correct-horse",
    }  # fmt: skip
    file = yaml.safe_load((servers.CHECKOUT / "mlflow" / "compose.yaml").read_text("utf-8"))
    settings = file["configs"]["mlflow-auth"]["content"].replace("@postgres/", f"@{database}/")
    (tmp_path / "mlflow-auth.ini").write_text(settings)
    machine = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}  # a container has little else
    machine |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PREFECT_HOME": str(tmp_path / "home")}
    started, unused = [], {*replaced}
    try:
        for name, address in (("mlflow", f"{mlflow}/health"), ("prefect", f"{prefect}/api/health"), ("worker", "")):
            command, environment, used = composed(name, replaced, secrets)
            unused -= used
            runs = {"SACPO_RUNS": str(tmp_path / "runs")}  # a volume of the worker
            log = (tmp_path / f"{name}.log").open("w")
            started.append(
                subprocess.Popen(
                    command, env=machine | environment | runs, cwd=servers.CHECKOUT, stdout=log, stderr=log
                )
            )
            end = time.monotonic() + 600
            while not (reached(address) if address else (tmp_path / "runs" / "servers.json").exists()):
                assert started[-1].poll() is None and time.monotonic() < end, (tmp_path / f"{name}.log").read_text()
                time.sleep(0.5)
        assert not unused  # the list holds nothing that the file does not
        other = {"Origin": "http://127.0.0.1:9"}
        admin, team = ("admin", "battery-staple"), ("team", "correct-horse")
        search = f"http://127.0.0.1:{mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
        assert [httpx.get(search, auth=auth).status_code for auth in (admin, None, team)] == [200, 401, 401]
        assert httpx.get(search, auth=admin, headers=other).status_code == 403
        assert httpx.get(search, auth=admin, headers={"Host": "evil.example"}).status_code == 403
        flows = f"http://127.0.0.1:{prefect}/api"
        assert [httpx.get(f"{flows}/admin/version", auth=auth).status_code for auth in (team, None)] == [200, 401]
        assert httpx.post(f"{flows}/flows/filter", auth=team, json={}).status_code == 403  # no token
        asks = {**other, "Access-Control-Request-Method": "POST"}
        assert httpx.options(f"{flows}/flows/", headers=asks).status_code == 400
        for secret in secrets.values():
            assert not [
                name for name in ("mlflow", "prefect", "worker") if secret in (tmp_path / f"{name}.log").read_text()
            ]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(600)


def reached(address: str) -> bool:
    """Whether a server answers."""
    try:
        return httpx.get(f"http://127.0.0.1:{address}").is_success
    except httpx.HTTPError:
        return False


def test_a_database_that_is_missing_is_named_with_the_command_that_makes_it(postgres: str) -> None:
    without(postgres)
    wanted = ServerOptions(postgres=postgres)
    port = postgres.rpartition(":")[2]
    for name in DATABASES:
        with pytest.raises(BadPlace, match=f'"{name}" does not exist; createdb -h 127.0.0.1 -p {port} {name}$'):
            check_postgres(wanted)
        with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
            connection.execute(SQL("create database {}").format(Identifier(name)))
    check_postgres(wanted)
    with pytest.raises(BadPlace, match="password authentication failed"):
        check_postgres(ServerOptions(postgres=postgres.replace("sacpo@", "sacpo:wrong@")))


@pytest.mark.slow
def test_a_team(
    postgres: str, store: Any, up: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ServerOptions(postgres=postgres)
    empty(postgres)

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
        assert connection.execute("select count(*) from sacpo_verdicts").fetchone() == (1,)
    with psycopg.connect(f"{postgres}/mlflow") as connection:
        assert connection.execute("select username from users").fetchall() == [("admin",)]
    keys = [found["Key"] for found in store.client.list_objects_v2(Bucket="team")["Contents"]]
    assert any(key.endswith("report.html") for key in keys) and any(key.endswith(".safetensors") for key in keys)
    assert not (runs / "mlflow.db").exists() and not (runs / "artifacts").exists()

    for name, value in person.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "SERVER", team.mlflow)
    assert list(download.fetch(tmp_path / "colleague", "models:/quickstart/1").glob("*.safetensors"))
    assert team.end() == 0
