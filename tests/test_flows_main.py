"""The command line where nothing is trained: bad input, silent servers, full disks, plans."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import BadPlace
from models.recipe.toml import shipped
from tasks.servers import environment as home
from tasks.work import runs_folder

ROOT = Path(__file__).parent.parent


def sacpo(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "flows", *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


BAD: list[tuple[list[str], str]] = [
    (["stepz=1"], "stepz: unknown key; did you mean 'steps'?"),
    (["steps.1.lambda=[-1]"], "steps.1.lambda: lambda must be at least 0, got -1"),
    (["steps.7.lambda=1"], "leads nowhere in this recipe (there are 2, counted from 0)"),
    (["beta=0"], "beta: must be at least 1e-06, got 0"),
    (["steps.0.data=nowhere.jsonl"], "steps.0.data: nowhere.jsonl: no such data file"),
    (["base=nowhere"], "base 'nowhere': no such folder or GGUF file"),
    (["steps.1.metric=helpful"], "two steps have the metric 'helpful'; give the second a name of its own"),
    (["steps.1.lambda=1,2"], 'steps.1.lambda: must be a list, written as [1, 2], got "1,2"'),
    (
        ["evaluation.judges.helpful=oracle"],
        "is a table of its own; set a key in it, as in evaluation.judges.helpful.KEY",
    ),
    (["evaluation.suites.harmless=town"], "the town's suites come with data = 'town'"),
    (["""registry.name='a" OR "b'"""], "registry.name"),
    (["merge.weights=[1.5]"], "every merge weight must lie in [0, 1]"),
]


@pytest.mark.parametrize(("changes", "said"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(changes: list[str], said: str, runs: Path) -> None:
    done = sacpo("run", "quickstart", *(part for change in changes for part in ("--set", change)))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("sacpo: ") and said in line
    assert not runs.exists()


def test_every_key_is_listed_with_its_default_and_its_meaning() -> None:
    done = sacpo("keys", "steps.N.l")
    assert done.returncode == 0 and "steps.N.lambda = [1.0]\n    One policy is trained per value" in done.stdout
    listed = [line for line in sacpo("keys").stdout.splitlines() if not line.startswith(" ")]
    assert len(listed) > 100 and "evaluation.judges.harmless.threshold = 0.0" in listed and "name" in listed


def test_servers_that_do_not_answer_are_refused_at_once(runs: Path, prefect: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nobody = f"http://127.0.0.1:{port}/api"
    for name, address, said in [
        ("PREFECT_API_URL", nobody, "does not answer"),
        ("MLFLOW_TRACKING_URI", nobody, "does not answer"),
        ("MLFLOW_TRACKING_URI", "sqlite:////proc/nowhere/mlflow.db", "takes no runs"),
    ]:
        ours = "" if address.startswith("sqlite") else prefect  # what is found last ends our own server too
        done = sacpo("run", "quickstart", **{"PREFECT_API_URL": ours, name: address})
        assert done.returncode == 2 and f"{name} = " in done.stderr and said in done.stderr
        assert not (runs / "store").exists()


def test_an_address_of_prefect_without_api_is_said(prefect: str) -> None:
    page = prefect.removesuffix("/api")
    done = sacpo("run", "quickstart", PREFECT_API_URL=page)
    assert done.returncode == 2 and f"PREFECT_API_URL = {page} is not Prefect's API; it ends in /api" in done.stderr


def test_a_disk_that_is_nearly_full_is_refused_at_once(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_folder, "LEAST_FREE", 2**62)
    with pytest.raises(BadPlace, match=f"^{runs}: only .* MiB free; .* or set SACPO_RUNS to another disk$"):
        home.configure_clients()


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_passes_check_offline(name: str) -> None:
    done = sacpo("check", name)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    assert "KL weight" in done.stdout and "evidence" in done.stdout
