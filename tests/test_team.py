"""The team profile as it is: both servers on a real PostgreSQL, artifacts in an S3-compatible store, on loopback."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from models.errors import BadPlace
from tasks import servers, tracking
from tasks.servers import Wanted

BIN = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: float(path.parent.name))
NOBODY = os.getuid() == 0 and "postgres" not in {user.pw_name for user in pwd.getpwall()}
pytestmark = pytest.mark.skipif(
    BIN is None or NOBODY, reason="no PostgreSQL here: apt-get install postgresql (and its user, for root)"
)
KEYS = {"AWS_ACCESS_KEY_ID": "sacpo", "AWS_SECRET_ACCESS_KEY": "sacpo-sacpo", "AWS_DEFAULT_REGION": "us-east-1"}
PASSWORD = "only for this test"


@pytest.fixture(scope="module")
def postgres(free: Callable[[], int]) -> Iterator[str]:
    """A fresh cluster without databases; PostgreSQL refuses to run as root."""
    folder = Path(tempfile.mkdtemp(prefix="sacpo-postgres-"))
    folder.chmod(0o755)
    (folder / "password").write_text(PASSWORD)
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres")
    port = free()

    def does(name: str, *arguments: str) -> None:
        subprocess.run([*user, f"{BIN}/{name}", "-D", f"{folder}/data", *arguments], cwd=folder, check=True, stdout=-3)

    does("initdb", "-U", "sacpo", f"--pwfile={folder}/password", "-A", "scram-sha-256", "--no-sync", "-E", "UTF8")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -k {folder} -c fsync=off"
    does("pg_ctl", "-w", "-l", f"{folder}/log", "-o", settings, "start")
    yield f"postgresql://sacpo@127.0.0.1:{port}"
    does("pg_ctl", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def store(free: Callable[[], int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An S3-compatible store with one empty bucket, and a client of it."""
    import boto3

    address = f"http://127.0.0.1:{(port := free())}"
    log = (tmp_path_factory.mktemp("store") / "log").open("w")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    for _ in range(100):
        try:
            urllib.request.urlopen(address, timeout=2).close()
            break
        except OSError:
            time.sleep(0.2)
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    given = {name: KEYS[key] for name, key in names.items()}
    client = boto3.client("s3", endpoint_url=address, region_name=KEYS["AWS_DEFAULT_REGION"], **given)
    client.create_bucket(Bucket="team")
    yield client
    server.terminate()
    server.wait(10)


def test_a_team(
    postgres: str, store: Any, up: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    wanted = Wanted(postgres=postgres)
    port = postgres.rpartition(":")[2]
    for name in servers.DATABASES:
        with pytest.raises(BadPlace, match=f'"{name}" does not exist; createdb -h 127.0.0.1 -p {port} {name}$'):
            servers._look(wanted)
        with psycopg.connect(f"{postgres}/postgres", autocommit=True) as connection:
            connection.execute(f"create database {name}")  # type: ignore[arg-type]
    servers._look(wanted)
    with pytest.raises(BadPlace, match="password authentication failed"):
        servers._look(Wanted(postgres=postgres.replace("sacpo@", "sacpo:wrong@")))

    runs = tmp_path / "server"
    secrets = {"PREFECT_SERVER_API_AUTH_STRING": "team:correct-horse", "MLFLOW_AUTH_ADMIN_PASSWORD": "battery-staple"}
    team = up(
        runs, "--postgres", postgres, "--artifacts", "s3://team", "--no-worker",
        MLFLOW_S3_ENDPOINT_URL=store.meta.endpoint_url, **KEYS, **secrets,
    )  # fmt: skip
    assert PASSWORD not in team.said + "".join(path.read_text() for path in runs.rglob("*.ini"))

    person = {
        **team.addresses, "SACPO_DATABASE": wanted.database("sacpo", "psycopg"), "SACPO_RUNS": str(tmp_path / "person"),
        "PREFECT_API_AUTH_STRING": "team:correct-horse",
        "MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "battery-staple",
    }  # fmt: skip
    few = [*small, "sft.updates=20", "steps.1.lambda=[1]", "merge.weights=[]"]
    changes = [part for change in few for part in ("--set", change)]
    done = subprocess.run(
        [sys.executable, "-m", "flows", "run", "quickstart", *changes],
        env=os.environ | person, cwd=servers.CHECKOUT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode in (0, 4), done.stdout + done.stderr

    with psycopg.connect(f"{postgres}/prefect") as connection:
        states = connection.execute("select state_type from flow_run where name = 'quickstart'").fetchall()
    assert states == [("COMPLETED",)]
    with psycopg.connect(f"{postgres}/sacpo") as connection:
        assert connection.execute("select count(*) from sacpo_decisions").fetchone() == (1,)
    with psycopg.connect(f"{postgres}/mlflow") as connection:
        assert connection.execute("select username from users").fetchall() == [("admin",)]
    keys = [found["Key"] for found in store.list_objects_v2(Bucket="team")["Contents"]]
    assert any(key.endswith("report.html") for key in keys) and any(key.endswith(".safetensors") for key in keys)
    assert not (runs / "mlflow.db").exists() and not (runs / "artifacts").exists()

    for name, value in person.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracking, "SERVER", team.mlflow)
    assert list(tracking.fetch(tmp_path / "colleague", "models:/quickstart/1").glob("*.safetensors"))
    assert team.end() == 0
