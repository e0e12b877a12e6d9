"""Whose weights a registered version's are is asked of the ledger: what MLflow says of it can be edited."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from models.artifacts import Policy
from models.errors import BadPolicy
from models.policy.weights import intact
from models.recipe.toml import read
from tasks.registry import champion
from tasks.tracking import download
from tasks.tracking.connection import client
from tasks.tracking.ledger import Ledger
from tasks.tracking.tracker import Tracker

NAME = "models:/quickstart/1"


@pytest.fixture(autouse=True)
def untold() -> None:
    download.say_unvouched.cache_clear()


@pytest.fixture(scope="module")
def made(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of MLflow with version 1: making them takes seconds."""
    folder = tmp_path_factory.mktemp("made") / "runs"
    tracker = Tracker(folder, read("quickstart"), "digest", {})
    assert tracker.register(policy, {}) == "1"
    tracker.fail("FAILED")
    return folder


@pytest.fixture
def by_hand(made: Path, runs: Path) -> Path:
    """Version 1 in MLflow alone."""
    return Path(shutil.copytree(made, runs))


@pytest.fixture
def registered(policy: Policy, by_hand: Path) -> Path:
    """Version 1 in MLflow and in the ledger, as a run leaves it."""
    runs = by_hand
    source = champion.source(runs, "quickstart", "1")
    Ledger(runs).note_registered("quickstart", "1", source, policy.digest)
    Ledger(runs).note_registered("quickstart", "1", source, policy.digest)  # by a run that was killed and goes on
    return runs


def moved(runs: Path, elsewhere: Path) -> None:
    """Let the version name other weights, as whoever can write into MLflow's database can."""
    with closing(sqlite3.connect(runs / "mlflow.db")) as records, records:
        records.execute("UPDATE model_versions SET source = ?, storage_location = ?", (str(elsewhere),) * 2)


def untagged(runs: Path) -> None:
    client(runs).delete_model_version_tag("quickstart", "1", "sacpo.policy")


@pytest.mark.parametrize("tag", ["kept", "deleted", "changed"])
def test_foreign_weights_are_refused_whatever_the_tag_says(
    tag: str, registered: Path, other_policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    moved(registered, other_policy.path)
    if tag == "deleted":
        untagged(registered)
    if tag == "changed":
        client(registered).set_model_version_tag("quickstart", "1", "sacpo.policy", other_policy.digest)
    with pytest.raises(BadPolicy, match=f"not the policy that was registered .*{other_policy.digest[:12]}.*DATABASE"):
        download.fetch(registered, NAME)
    assert not list(registered.glob("registered/*/**/*.safetensors")) and not capsys.readouterr().out


@pytest.mark.parametrize("tag", ["kept", "deleted", "changed"])
def test_the_registered_weights_are_served_wherever_they_lie(
    tag: str, registered: Path, policy: Policy, other_policy: Policy, capsys: pytest.CaptureFixture[str]
) -> None:
    if tag == "deleted":
        untagged(registered)
    if tag == "changed":
        client(registered).set_model_version_tag("quickstart", "1", "sacpo.policy", other_policy.digest)
    intact(download.fetch(registered, NAME), policy.digest)
    moved(registered, policy.path)  # artifacts were carried to another disk
    intact(download.fetch(registered, NAME), policy.digest)
    assert not capsys.readouterr().out
    assert champion.policy(registered, "quickstart", "1") == policy.digest


@pytest.mark.parametrize(
    ("tag", "said"), [("kept", "but its tag in MLflow, which everybody can edit"), ("deleted", "nobody vouches for")]
)
def test_a_version_that_somebody_else_registered_is_used_and_that_is_said_once(
    tag: str, said: str, policy: Policy, by_hand: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if tag == "deleted":
        untagged(by_hand)
    for _ in range(2):
        intact(download.fetch(by_hand, NAME, "gate.anchor"), policy.digest)
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith(f"gate.anchor '{NAME}': our ledger does not know whose weights") and said in out
    assert out.count("our ledger") == 1


def test_a_number_that_was_given_once_more_has_its_own_weights(
    runs: Path, policy: Policy, other_policy: Policy
) -> None:
    ledger = Ledger(runs)
    assert ledger.policy("m", "1", "a") == ""
    ledger.note_registered("m", "1", "a", policy.digest)
    ledger.note_registered("m", "1", "b", other_policy.digest)
    assert (ledger.policy("m", "1", "a"), ledger.policy("m", "1", "b")) == (policy.digest, other_policy.digest)
    assert ledger.policy("m", "1", "elsewhere") == other_policy.digest


@pytest.mark.parametrize("tag", ["sacpo.run_id", "sacpo.policy"])
def test_a_report_of_no_run_or_no_policy_is_refused(tag: str, by_hand: Path) -> None:
    client(by_hand).delete_model_version_tag("quickstart", "1", tag)
    with pytest.raises(BadPolicy, match="was not registered by sacpo"):
        download.fetch_report(by_hand, NAME)


def test_a_report_that_was_made_again_is_fetched_again(by_hand: Path, tmp_path: Path) -> None:
    """As after `--retry-failed`: the run is the same, and its report another."""
    mlflow = client(by_hand)
    run = mlflow.get_model_version("quickstart", "1").tags["sacpo.run_id"]
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "scores.jsonl").write_text("")
    mlflow.log_artifacts(run, str(tmp_path / "tables"), "tables")
    places = []
    for content in ("first", "second", "second"):
        (tmp_path / "report.json").write_text(content)
        mlflow.log_artifact(run, str(tmp_path / "report.json"))
        place, _ = download.fetch_report(by_hand, NAME)
        assert (place / "report.json").read_text() == content and (place / "tables" / "scores.jsonl").exists()
        places.append(place)
    assert places[1] == places[2]
