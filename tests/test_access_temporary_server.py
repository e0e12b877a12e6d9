"""Prefect's server for the time of one command: out of reach of the terminal, and gone with the command."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from filelock import FileLock

from models.errors import BadPlace
from tasks.access import temporary_server
from tasks.servers import environment
from tests.conftest import unnamed

ROOT = Path(__file__).parent.parent
HOLDS = """
import os
from tasks.servers.environment import configure_clients
from tasks.work.runs_folder import root
from tasks.access.temporary_server import lasting_server, temporary_server
configure_clients()
with temporary_server(root()) as ready:
    ready()
    print(os.environ["PREFECT_API_URL"], repr(lasting_server()), flush=True)
    input()
    from prefect import flow, get_run_logger
    flow(lambda: get_run_logger().info("the last words"), name="speaks")()
print(os.environ.get("PREFECT_API_URL"), flush=True)
"""


def holding() -> tuple["subprocess.Popen[str]", str]:
    """Start a command with such a server, where a proxy is named; return it and the server's address."""
    proxied = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "intern.example", "NO_PROXY": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS], cwd=ROOT, env=unnamed() | {"PREFECT_API_URL": ""} | proxied, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout
    address, lasting_server = process.stdout.readline().split()
    assert lasting_server == "''"  # nothing that should outlive the command is left to it
    return process, address


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/health", timeout=30).close()
    except OSError:
        return False
    return True


def silent(address: str) -> bool:
    """Wait until nobody answers there."""
    end = time.monotonic() + 600
    while answers(address) and time.monotonic() < end:
        time.sleep(0.1)
    return not answers(address)


def test_it_ends_with_its_command_however_that_ends(runs: Path) -> None:
    process, address = holding()
    out, _ = process.communicate("\n", timeout=600)
    assert process.returncode == 0 and out == "None\n" and not answers(address)
    with closing(sqlite3.connect(runs / "prefect" / "prefect.db")) as database:  # what was sent in the background
        kept = [message for (message,) in database.execute("select message from log order by timestamp")]
    assert kept[-2:] == ["the last words", "Finished in state Completed()"]

    process, address = holding()
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait(600) == -signal.SIGKILL and silent(address)


def test_one_command_makes_the_database_and_the_others_wait(tmp_path: Path) -> None:
    """Two that make the same tables at the same moment would both fail."""
    environment = tmp_path / "prefect"
    first = temporary_server._lock_database(environment)
    locks: list[FileLock] = []
    lock: Callable[[], None] = lambda: locks.append(temporary_server._lock_database(environment))  # noqa: E731
    others = [threading.Thread(target=lock) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join(0.5)
        assert other.is_alive() and first.is_locked
    (environment / "prefect.db").touch()
    first.release()
    for other in others:
        other.join(600)
    assert len(locks) == 3 and not any(lock.is_locked for lock in locks)


def test_ctrl_c_reaches_the_command_alone(
    start: Callable[..., "subprocess.Popen[str]"], runs: Path, small: list[str]
) -> None:
    """Else Prefect's client asks a server that the same keys have ended, for two and a half minutes."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and what it starts
    process = start("run", "quickstart", changes=[*small, "sft.updates=1000"], PREFECT_API_URL="")
    end = time.monotonic() + 600
    while not any(path.stat().st_size for path in runs.glob("store/sft-*.partial/progress.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 130 and out.endswith("sacpo: interrupted; the same command goes on\n")
    assert "Traceback" not in out and "Warning" not in out
    assert time.monotonic() - begun < 60


def test_one_that_cannot_start_is_told_at_once(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "")
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{tmp_path}/no/folder/prefect.db")
    runs.mkdir()
    with (
        temporary_server.temporary_server(runs) as ready,
        pytest.raises(BadPlace, match=r"^Prefect's temporary server did not start, exit code 3: .* \(see .*\.log\)$"),
    ):
        ready()


@pytest.mark.parametrize("ours", ["", "http://127.0.0.1:1/api"])
def test_a_server_that_a_file_of_prefect_names_is_refused(
    ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would get the password of ours, or the runs that it should show would go to another one in silence."""
    monkeypatch.setattr(temporary_server, "_address", ours)
    monkeypatch.setenv("PREFECT_API_URL", ours)
    environment.refuse_hidden_server()
    (tmp_path / "prefect.toml").write_text('[api]\nurl = "http://prefect.example/api"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadPlace, match=r"names the server http://prefect\.example/api; set PREFECT_API_URL to it"):
        environment.refuse_hidden_server()
    assert os.environ.get("PREFECT_API_URL", "") == ours
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    environment.refuse_hidden_server()
