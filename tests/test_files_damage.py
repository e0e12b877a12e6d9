"""A file of ours that a disk or a kill damaged: made again or named in one line, never a traceback, never believed."""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest

from models.alignment.checkpoints import newest
from models.data import sources
from models.errors import BadInput
from models.files import sealed
from models.files.kept import RunsFolderEntry
from models.recipe.toml import read
from models.report import diff
from tasks import decisions, leases, outcomes
from tasks.access import passwords
from tasks.leases import Lease
from tasks.work import store
from tasks.work.store import Stage
from tests.conftest import untracked
from tests.damages import Damage, braces, brackets, cut, empty, folder, gone, noise


def flip(path: Path) -> None:
    """Change one bit of the first half, another one for every file; the name of the seal itself stands at the end."""
    held = bytearray(path.read_bytes())
    draw = Random(path.name)
    held[draw.randrange(len(held) // 2)] ^= 1 << draw.randrange(8)
    path.write_bytes(held)


def flip_high(path: Path) -> None:
    """Make a letter of the first half a byte that UTF-8 does not know there."""
    held = bytearray(path.read_bytes())
    held[len(held) // 3] ^= 128
    path.write_bytes(held)


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


SMALL = [flip, flip_high, cut, empty, braces, brackets, deep, noise, folder, gone]


def database(path: Path) -> None:
    """Put a real sqlite file there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as table, table:
        table.execute("CREATE TABLE numbers (n INTEGER PRIMARY KEY)")


# Small files


def gather() -> Stage[Any]:
    """The town's corpus: a real stage that takes a fraction of a second."""
    arguments = {"files": {"sft": "town", "steps.0": "town"}, "sha256": {}, "seed": 0}
    return Stage(sources.gather, "data", arguments)


@pytest.mark.parametrize("damage", SMALL)
def test_a_result_with_a_damaged_manifest_is_made_again(damage: Damage, runs: Path) -> None:
    made = store.make(runs, gather())
    damage(made.path / store.MANIFEST)
    assert store.find(runs, gather()) is None and store.seconds(made) == 0
    assert store.make(runs, gather()) == made == store.find(runs, gather())


def test_no_flipped_bit_of_a_manifest_is_believed(runs: Path) -> None:
    """Each of 400 bits, drawn over the whole file: the seal covers names, digests, and how long it took."""
    made = store.make(runs, gather())
    place, draw = made.path / store.MANIFEST, Random(0)
    whole = place.read_bytes()
    for _ in range(400):
        held = bytearray(whole)
        held[draw.randrange(len(held))] ^= 1 << draw.randrange(8)
        place.write_bytes(held)
        found = sealed.read(place, store.Manifest)
        assert found is None or json.loads(whole) == found | {sealed.SEAL: json.loads(whole)[sealed.SEAL]}
    place.write_bytes(whole)
    assert store.find(runs, gather()) == made


def test_a_file_where_a_result_should_be_is_in_nobodys_way(runs: Path) -> None:
    place = gather().folder(runs)
    place.parent.mkdir(parents=True)
    place.write_text("a file")
    gather().partial(runs).write_text("another")
    assert store.find(runs, gather()) is None
    assert store.make(runs, gather()) == store.find(runs, gather())


@pytest.fixture(scope="module")
def ended(undisturbed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of a run that has ended, for this module alone."""
    copy = tmp_path_factory.mktemp("damage") / "runs"
    shutil.copytree(undisturbed, copy, symlinks=True)
    return copy


@pytest.fixture
def whole(ended: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of its report, which is as it was again afterwards."""
    monkeypatch.setenv("SACPO_RUNS", str(ended))
    (report,) = (path.parent for path in ended.glob("quickstart/*/report.json"))
    outcome = sealed.read(report / "outcome.json", outcomes.Outcome)
    assert outcome
    moved = [place.replace(str(undisturbed), str(ended)) for place in outcome["stages"]]
    sealed.write(report / "outcome.json", {**outcome, "report": str(report), "stages": moved})
    before = {path: path.read_bytes() for path in report.iterdir() if path.is_file()}
    yield report
    for path, content in before.items():
        sealed.remove(path)
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["outcome.json", "report.json", "report.html"])
@pytest.mark.parametrize("damage", SMALL)
def test_a_run_whose_end_is_damaged_has_not_ended(damage: Damage, name: str, whole: Path, small: list[str]) -> None:
    recipe = read("quickstart", [*small, "compute.processes=2"])
    before = outcomes.finished(recipe)
    assert before and before["exit_code"] == 0
    damage(whole / name)
    assert outcomes.finished(recipe) is None
    assert outcomes.forget_failed(recipe) == 0


@pytest.mark.parametrize("damage", [d for d in SMALL if d is not gone])
def test_a_damaged_lease_question_or_note_of_servers_stops_nobody(damage: Damage, runs: Path) -> None:
    lease = Lease("f", "quickstart", "", os.getpid(), "then", "here", "")
    place = runs / "leases" / "f.json"
    place.parent.mkdir(parents=True)
    sealed.write(place, {**lease.__dict__})
    assert leases.read(place) == lease
    damage(place)
    assert leases.read(place) is None and leases.sweep(runs) == []
    passwords.write_running(runs, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}, ["MLFLOW_TRACKING_URI"], {})
    assert passwords.read_running(runs)
    damage(runs / RunsFolderEntry.servers)
    assert passwords.read_running(runs) is None
    passwords.write_running(runs, {}, [], {})
    assert passwords.read_running(runs)


@pytest.mark.parametrize("damage", SMALL)
def test_a_checkpoint_without_a_whole_mark_is_none(damage: Damage, tmp_path: Path) -> None:
    for update in (5, 10):
        place = tmp_path / f"checkpoint-{update}"
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"weights")
        sealed.write(place / "complete.json", {"model.safetensors": 7})
    assert newest(tmp_path) == str(tmp_path / "checkpoint-10")
    damage(tmp_path / "checkpoint-10" / "complete.json")
    assert newest(tmp_path) == str(tmp_path / "checkpoint-5") and not (tmp_path / "checkpoint-10").exists()


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    sealed.write_text(place, "old")
    (tmp_path / "a.json.new").write_text("half of the n")  # left by a kill
    sealed.write_text(place, "new")
    assert place.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    folder(place)
    sealed.write(place, {"n": 1})
    assert sealed.read(place, dict[str, int]) == {"n": 1} and (tmp_path / "a.json.damaged-1").is_dir()
    place.write_text('{"n": 1}')  # of an older version
    assert sealed.read(place, dict[str, int]) == {"n": 1} and sealed.read(place, dict[str, str]) is None


@pytest.mark.parametrize("damage", SMALL)
def test_what_served_cannot_be_guessed_from_a_damaged_file(damage: Damage, runs: Path) -> None:
    """`rivals.json`: a run that is started again compares with what serves now, and keeps that."""
    run = untracked(runs)
    run.folder.mkdir(parents=True)
    place = run.folder / "rivals.json"
    served = decisions.Served(seen=3, champion="models:/quickstart/2", anchor="")
    sealed.write(place, served)
    assert decisions._served(run) == served
    damage(place)
    nothing_serves = decisions.Served(seen=0, champion="", anchor="")
    assert decisions._served(run) == nothing_serves == sealed.read(place, decisions.Served)


@pytest.mark.parametrize("damage", [d for d in SMALL if d is not flip])
def test_a_damaged_report_or_table_is_not_compared(damage: Damage, whole: Path) -> None:
    """A flipped bit that leaves a report readable is found by `finished`."""
    for name in ("report.json", *(["tables/answers.jsonl"] if damage is not empty else [])):
        copy = whole.parent / "copy"
        shutil.copytree(whole, copy)
        damage(copy / name)
        with pytest.raises(BadInput) as raised:
            diff.difference(diff.side(copy), diff.side(copy))
        assert str(copy) in str(raised.value) and len(str(raised.value).splitlines()) == 1
        shutil.rmtree(copy)


# Whole commands


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage", "code"),
    [
        ("quickstart/*/outcome.json", braces, 0),
        ("quickstart/*/report.json", cut, 0),
        ("store/dpo-*/manifest.json", flip_high, 0),
        ("answers.db", noise, 0),
        ("mlflow.db", cut, 2),
        ("operations.db", noise, 2),
        ("prefect/prefect.db", noise, 2),
    ],
)
def test_the_command_goes_on_to_the_same_or_names_the_file(
    name: str, damage: Damage, code: int, served: Path, run: Callable[..., tuple[int, str]], small: list[str]
) -> None:
    (report,) = served.glob("quickstart/*/report.json")
    weights = {entry["name"]: entry["digest"] for entry in json.loads(report.read_text())["candidates"]}
    if code or name == "answers.db":  # looked at only where something is left to do
        (report.parent / "outcome.json").unlink()
    if "prefect" in name:
        (served / "prefect").mkdir(exist_ok=True)
        database(served / name)
    place = next(iter(served.glob(name)))
    damage(place)
    server = {"PREFECT_API_URL": ""} if "prefect" in name else {}
    found, out = run("run", "quickstart", changes=[*small, "compute.processes=2"], **server)
    assert found == code and "Traceback" not in out, out
    if code:
        (line,) = (line for line in out.splitlines() if line.startswith("sacpo: "))
        assert str(place) in line and "✓" not in out
    else:
        again = {entry["name"]: entry["digest"] for entry in json.loads(report.read_text())["candidates"]}
        assert again == weights
