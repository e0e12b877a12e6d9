"""A person has to agree: what they answer binds, and a death or another champion meanwhile is no obstacle."""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from filelock import FileLock
from prefect.client.orchestration import SyncPrefectClient

from models.errors import BadData, Undecided
from models.files import sealed
from models.recipe.toml import read
from tasks import leases
from tasks import run as runs_of
from tasks.registry import champion
from tasks.tracking import connection
from tasks.tracking.ledger import Ledger, Standing
from tasks.work import processes

ASKS = [
    "steps.1.lambda=[1]", "steps.1.updates=20", "merge.weights=[]", "gate.margin=0.3", "gate.kl=99",
    "evaluation.kl_prompts=32", "gate.approval=true",
]  # fmt: skip


def paused(client: SyncPrefectClient, process: "subprocess.Popen[str]", runs: Path) -> UUID:
    """Wait until a command asks a person, and return its flow run."""
    while process.poll() is None:
        for path in runs.glob("leases/*.json"):
            lease = leases.read(path)
            if lease and lease.pid == process.pid and lease.run:
                state = client.read_flow_run(UUID(lease.flow_run)).state
                if state and state.is_paused():
                    return UUID(lease.flow_run)
        time.sleep(0.2)
    raise AssertionError(process.communicate()[0])


def answer(client: SyncPrefectClient, flow_run: UUID, agreed: bool) -> None:
    """Answer as the page does."""
    said = {"agreed": agreed, "by": "Ada", "why": "read the card"}
    response = client._client.post(f"/flow_runs/{flow_run}/resume", json={"run_input": said})
    assert response.json()["status"] == "ACCEPT", response.text


def tags(runs: Path, version: str) -> dict[str, Any]:
    return dict(connection.client(runs).get_model_version("quickstart", version).tags)


def workers(runs: Path) -> list[int]:
    """Return the process of each worker that ever worked for a runs folder; there was one."""
    found = [int(log.stem.split("-")[1]) for log in (runs / "logs").glob("worker-*.log")]
    assert found
    return found


def overtake(runs: Path, source: str) -> None:
    """Make a colleague's version 3, which serves from now on."""
    mlflow = connection.client(runs)
    mlflow.create_model_version("quickstart", source, mlflow.get_model_version("quickstart", "1").run_id)
    Ledger(runs).note_standing("quickstart", "3", Standing("pass", "", "", "a colleague's", source))
    champion.promote(runs, "quickstart", "3", "a colleague's")


@pytest.mark.slow
def test_a_run_that_died_while_it_waited_compares_with_who_serves_now(
    prefect: str, start: Callable[..., "subprocess.Popen[str]"], served: Path, small: list[str]
) -> None:
    runs, report = served, json.loads(next(served.glob("quickstart/*/report.json")).read_text("utf-8"))
    (reward,) = [one["path"] for one in report["candidates"] if one["name"] == "helpful"]
    changes = [*small, *ASKS, f"gate.anchor={reward}"]
    with SyncPrefectClient(prefect) as client:
        first = start("run", "quickstart", changes=changes)
        asked = paused(client, first, runs)
        assert not any(map(processes.identity_of, workers(runs)))  # nobody knows how long it waits
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert tags(runs, "2")["gate"] == "waits for approval"

        source = connection.client(runs).get_model_version("quickstart", "1").source
        overtake(runs, source)  # meanwhile somebody else's version serves, which happens to be version 1 again

        again = start("run", "quickstart", changes=changes)
        asked_again = paused(client, again, runs)
        state = client.read_flow_run(asked).state
        assert state and state.is_crashed()  # found by the second one
        answer(client, asked_again, agreed=True)
        out, _ = again.communicate(timeout=600)
    assert again.returncode == 0, out
    assert champion.line_of_champions(champion.log(runs, "quickstart")) == ["1", "3", "2"]
    assert "agreed by Ada: read the card" in champion.log(runs, "quickstart")[-1].why
    kept = tags(runs, "2")
    assert kept["gate"] == "pass"
    assert {"gate.helpful against the champion", "gate.helpful against the anchor", "gate.KL to the base"} < kept.keys()


def test_a_refusal_binds(
    prefect: str,
    start: Callable[..., "subprocess.Popen[str]"],
    run: Callable[..., tuple[int, str]],
    served: Path,
    small: list[str],
) -> None:
    runs = served
    with SyncPrefectClient(prefect) as client:
        process = start("run", "quickstart", changes=[*small, "gate.approval=true"])
        asked = paused(client, process, runs)
        answer(client, asked, agreed=False)
        out, _ = process.communicate(timeout=600)
        state = client.read_flow_run(asked).state
    assert state and state.name == "NotPromoted" and "alias challenger. Nothing was promoted." in (state.message or "")
    assert process.returncode == 4 and "Nothing was promoted" in " ".join(out.split()), out
    assert tags(runs, "2")["gate"] == "refused by Ada: read the card"
    code, out = run("promote", "quickstart", "2", changes=[])
    assert code == 2 and "version 2 did not pass the gate (refused by Ada: read the card)" in out
    mlflow = connection.client(runs)
    mlflow.set_model_version_tag("quickstart", "2", "gate", "waits for approval")  # as if never answered
    code, out = run("promote", "quickstart", "2", changes=[])
    assert code == 2 and "version 2 did not pass the gate (refused by Ada: read the card)" in out
    code, out = run("promote", "quickstart", "2", "--force", changes=[])
    assert code == 0 and champion.line_of_champions(champion.log(runs, "quickstart")) == ["1", "2"]


def test_who_waits_for_the_same_run_is_told_when_that_asks_a_person(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trained when the second one came, and asks only later: for days, perhaps."""
    monkeypatch.setattr(runs_of, "LOOKS", 0.1)
    recipe = read("quickstart")
    name = runs_of.digest(recipe)
    runs.mkdir(exist_ok=True)
    lock = runs / f"{recipe.name}-{name[:16]}.lock"
    first, heard = FileLock(lock), []
    monkeypatch.setattr(runs_of, "digest", lambda _: name)

    def second() -> None:
        try:
            runs_of._wait_for(FileLock(lock), recipe, name)
            heard.append("its turn")
        except Undecided as error:
            heard.append(str(error))

    for question in ("answer it on its page", ""):
        with first:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(0.5)
            assert thread.is_alive()
            if question:
                sealed.write_text(runs_of._question(runs, recipe, name), question)
                thread.join(600)
                runs_of._question(runs, recipe, name).unlink()
        thread.join(600)
        assert heard.pop() == (question or "its turn")
    monkeypatch.setattr(runs_of, "digest", lambda _: "of other data")
    with pytest.raises(BadData, match="what the recipe names has changed while this run waited; start it again"):
        runs_of._wait_for(FileLock(lock), recipe, name)
    with FileLock(lock, blocking=False):
        pass


@pytest.mark.slow
def test_a_run_that_is_overtaken_while_a_person_is_asked_decides_again(
    prefect: str, start: Callable[..., "subprocess.Popen[str]"], served: Path, small: list[str]
) -> None:
    """While a person is asked nobody waits for it and no worker lives; they come back for the second test."""
    runs, report = served, json.loads(next(served.glob("quickstart/*/report.json")).read_text("utf-8"))
    (merge,) = [one["path"] for one in report["candidates"] if one["name"] == "merge q=0.5"]
    with SyncPrefectClient(prefect) as client:
        process = start("run", "quickstart", changes=[*small, "gate.approval=true", "gate.margin=0.4"])
        answer_first = paused(client, process, runs)
        assert not any(map(processes.identity_of, workers(runs)))
        (deciding,) = runs.glob("deciding-*.lock")
        with FileLock(deciding, blocking=False):
            before = {*runs.glob("store/answer-*")}
        overtake(runs, merge)
        answer(client, answer_first, agreed=True)
        again = paused(client, process, runs)
        asked_about = [standing.state for standing in Ledger(runs).standings("quickstart", "2")]
        answer(client, again, agreed=True)
        out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert "another version of quickstart serves since this one was tested" in " ".join(out.split())
    assert champion.line_of_champions(champion.log(runs, "quickstart")) == ["1", "3", "2"]
    assert asked_about == ["pass", "waits for approval", "agreed", "pass", "waits for approval"]
    assert {*runs.glob("store/answer-*")} - before  # those of the colleague's version to the test prompts
    assert "gate.helpful against the champion" in tags(runs, "2")
