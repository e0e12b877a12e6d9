"""A stage's result: named by meaning, made once, found again, made again if damaged, never half done."""

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.alignment import merge
from models.alignment.curve import TrainingMonitor
from models.artifacts import Margins, Policy, Sources, file_digest
from models.data import sources
from models.errors import Damaged
from models.policy import weights as policies
from models.recipe import Compute, Data, Step
from models.stage import mark_of, stage
from tasks.work import store
from tasks.work.store import Stage


def gather(**changes: Any) -> Stage[Any]:
    """The town's corpus: a real stage that takes a fraction of a second."""
    arguments = {"files": {"sft": "town", "steps.0": "town"}, "sha256": {}, "seed": 0} | changes
    return Stage(sources.gather, "data", arguments)


def stamp(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_stage_that_is_done_is_not_done_again(runs: Path) -> None:
    assert store.find(runs, gather()) is None
    made = store.make(runs, gather())
    before = stamp(made.path)
    assert store.make(runs, gather()) == made == store.find(runs, gather())
    assert stamp(made.path) == before and before
    assert made.path == gather().folder(runs) and made.path.name == f"gather-{gather().key[:16]}"
    assert not list((runs / "store").glob("*.partial"))


def test_the_manifest_says_what_was_made_of_what(runs: Path) -> None:
    made = store.make(runs, gather())
    manifest = json.loads((made.path / "manifest.json").read_text())
    version = mark_of(sources.gather).version
    assert (manifest["stage"], manifest["title"], manifest["version"], manifest["key"]) == (
        "sources.gather",
        "data",
        version,
        gather().key,
    )
    assert manifest["given"] == {"files": {"sft": "town", "steps.0": "town"}, "sha256": {}, "seed": 0}
    assert manifest["noun"] == {"digest": made.digest, "files": made.files, "sha256": {}}
    held = {path.name: path for path in made.path.iterdir() if path.name != "manifest.json"}
    assert manifest["files"].keys() == held.keys() and len(held) > 3
    for name, path in held.items():
        assert manifest["files"][name] == {"sha256": file_digest(path), "bytes": path.stat().st_size}
    assert manifest["seconds"] == store.seconds(made) >= 0 and manifest["finished"].endswith("Z")


def test_parents_come_back_as_they_were(runs: Path, policy: Policy, other_policy: Policy) -> None:
    arguments = {"safe": policy, "reward": other_policy, "q": 0.5}
    work = Stage(merge.interpolate, "merge", arguments)
    made = store.make(runs, work)
    found = store.find(runs, work)
    assert found == made and isinstance(found, Policy) and found.parents == (policy.digest, other_policy.digest)
    assert json.loads((made.path / "manifest.json").read_text())["given"]["safe"]["digest"] == policy.digest


# What names a stage

POLICY = Policy(path=Path("/a"), digest="d", name="n", kind="base")
STEP = Step(metric="harmless", data="town")


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("seed", 0, 1),
        ("q", 0.25, 0.5),
        ("policy", POLICY, replace(POLICY, digest="e")),
        ("config", STEP, STEP.model_copy(update={"learning_rate": 1e-5})),
        ("config", Data(), Data(salt="x")),
        ("near", {"base": POLICY}, {"base": replace(POLICY, digest="e")}),
        ("near", {"base": POLICY}, {"reference": POLICY}),
        ("pairs", [POLICY], [POLICY, POLICY]),
        ("splits", ["train", "test"], ["test", "train"]),
        ("compute", Compute(device="cpu", threads=1), Compute(device="cpu", threads=2)),
    ],
)  # fmt: skip
def test_another_meaning_is_another_key(name: str, value: Any, other: Any) -> None:
    assert gather(**{name: value}).key != gather(**{name: other}).key
    assert gather(**{name: value}).key != gather().key or name == "seed"


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [
        ("policy", POLICY, POLICY.at(Path("/elsewhere"))),
        ("config", STEP, Step.model_validate({"metric": "harmless", "data": "town", "lambda": 1})),
        ("splits", ["train"], ("train",)),
        ("near", {"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ("compute", Compute(device="cpu"), Compute(device="cpu", processes=7)),
    ],
)
def test_the_same_meaning_is_the_same_key(name: str, value: Any, other: Any) -> None:
    assert gather(**{name: value}).key == gather(**{name: other}).key


def test_version_and_name_are_in_the_key_and_the_title_is_not() -> None:
    one = gather()

    def marked(name: str, version: int) -> str:
        def does(out: Path, files: dict[str, str], sha256: dict[str, str], seed: int) -> Sources:
            raise NotImplementedError

        return replace(one, does=stage(name, version=version)(does)).key

    version = mark_of(sources.gather).version
    assert len({one.key, marked("sources.gather", version + 1), marked("sources.other", version)}) == 3
    assert marked("sources.gather", version) == replace(one, title="another").key == one.key


def test_the_libraries_that_compute_are_in_the_key() -> None:
    content = store.content_of(Compute(device="cpu"))
    assert {"torch", "transformers", "trl", "device", "dtype", "threads"} <= content.keys()
    assert "processes" not in content


def test_a_value_without_a_meaning_names_no_stage() -> None:
    with pytest.raises(TypeError, match="a stage cannot be named by a set"):
        _ = gather(seed={1, 2}).key


# Damage


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    held = bytearray(path.read_bytes())
    held[len(held) // 2] ^= 1
    path.write_bytes(held)


@pytest.mark.parametrize("damage", [shorten, flip, Path.unlink])
@pytest.mark.parametrize("name", ["corpus.jsonl", "manifest.json"])
def test_a_damaged_result_is_made_again(damage: Callable[[Path], None], name: str, runs: Path) -> None:
    made = store.make(runs, gather())
    whole = (made.path / "corpus.jsonl").read_bytes()
    damage(made.path / name)
    if (damage, name) == (flip, "manifest.json"):  # one bit of the manifest: any, but not one that means nothing
        (made.path / name).write_text("{" + (made.path / name).read_text())
    assert store.find(runs, gather()) is None and store.verified(made.path) is None
    assert store.make(runs, gather()) == made == store.find(runs, gather())
    assert (made.path / "corpus.jsonl").read_bytes() == whole


def test_a_table_of_any_size_is_checked_by_its_content(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = store.make(runs, gather())
    monkeypatch.setattr(store, "HASHED_UP_TO", 10)
    flip(made.path / "corpus.jsonl")
    assert store.find(runs, gather()) is None
    assert store.make(runs, gather()) == made == store.find(runs, gather())


def test_large_weights_are_checked_by_size_until_somebody_reads_them(
    runs: Path, policy: Policy, other_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen gigabytes a candidate are not hashed at each start; whoever finds them damaged has them made again."""

    def merged(**parents: Policy) -> Stage[Any]:
        return Stage(merge.interpolate, "merge", {**parents, "q": 0.5})

    first = merged(safe=policy, reward=other_policy)
    made = store.make(runs, first)
    assert isinstance(made, Policy)
    monkeypatch.setattr(store, "HASHED_UP_TO", 10)
    flip(made.path / "model.safetensors")
    assert store.find(runs, first) == made
    with pytest.raises(Damaged, match="the same command makes them again"):
        store.make(runs, merged(safe=made, reward=policy))
    assert store.find(runs, first) is None
    assert store.make(runs, first) == made
    policies.intact(made.path, made.digest)
    shorten(made.path / "model.safetensors")
    assert store.find(runs, first) is None


def test_a_result_stays_valid_when_the_runs_folder_moves(runs: Path, tmp_path: Path) -> None:
    made = store.make(runs, gather())
    runs.rename(tmp_path / "moved")
    found = store.find(tmp_path / "moved", gather())
    assert found is not None and found.digest == made.digest and found.path != made.path


# Two at once, and a kill


@stage("test.slowly", version=1)
def slowly(out: Path, notes: str, wait: float) -> Margins:
    """Work that says when it starts: one line per attempt."""
    with Path(notes).open("a") as file:
        file.write(f"{os.getpid()}\n")
    (out / "first.txt").write_text("half of the work")
    (out / "seen.txt").write_text(" ".join(sorted(path.name for path in out.iterdir())))
    time.sleep(wait)
    (out / "margins.jsonl").write_text("{}\n")
    return Margins(path=out, digest=file_digest(out / "margins.jsonl"), policy="p")


def slow(notes: Path, wait: float) -> Stage[Any]:
    return Stage(slowly, "slow work", {"notes": str(notes), "wait": wait})


def start(runs: Path, stage: Stage[Any]) -> Any:
    """Make the stage in a new process: pytest's own holds threads by now, which a fork would break."""
    process = multiprocessing.get_context("spawn").Process(target=store.make, args=(runs, stage))
    process.start()
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 600
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def test_two_processes_that_want_the_same_do_the_work_once(runs: Path, tmp_path: Path) -> None:
    notes, stage = tmp_path / "notes", slow(tmp_path / "notes", 0.5)
    both = [start(runs, stage) for _ in range(2)]
    for process in both:
        process.join(600)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(notes.read_text().splitlines()) == 1
    assert store.find(runs, stage) is not None


def test_a_kill_leaves_no_result_and_the_next_attempt_goes_on_in_the_same_place(runs: Path, tmp_path: Path) -> None:
    notes, stage = tmp_path / "notes", slow(tmp_path / "notes", 60)
    folder = stage.folder(runs)
    partial = folder.with_name(folder.name + ".partial")
    process = start(runs, stage)
    wait_for(partial / "seen.txt")
    process.kill()
    process.join(600)
    assert process.exitcode == -9 and store.find(runs, stage) is None and not folder.exists()
    (partial / "checkpoint").write_text("from before the kill")
    quick = replace(stage, does=quickly)
    assert quick.key == stage.key
    made = store.make(runs, quick)
    assert made.path == folder and not partial.exists() and store.find(runs, stage) == made
    assert "checkpoint" in (folder / "found.txt").read_text().split()
    assert len(notes.read_text().splitlines()) == 1


@stage("test.slowly", version=1)
def quickly(out: Path, notes: str, wait: float) -> Margins:
    (out / "found.txt").write_text(" ".join(path.name for path in out.iterdir()))
    return Margins(path=out, digest="d", policy="p")


@stage("test.slowly", version=1)
def fails(out: Path, notes: str, wait: float) -> Margins:
    raise RuntimeError("no luck")


def test_a_stage_that_fails_leaves_no_result_and_no_lock(runs: Path, tmp_path: Path) -> None:
    stage = replace(slow(tmp_path / "notes", 0), does=fails)
    with pytest.raises(RuntimeError, match="no luck"):
        store.make(runs, stage)
    assert store.find(runs, stage) is None and not stage.folder(runs).exists()
    assert store.make(runs, replace(stage, does=quickly)).path == stage.folder(runs)


def test_time_spent_by_killed_attempts_counts(runs: Path, tmp_path: Path) -> None:
    stage = replace(slow(tmp_path / "notes", 0), does=quickly)
    partial = stage.folder(runs).with_name(stage.folder(runs).name + ".partial")
    partial.mkdir(parents=True)
    times = [1000.0, 1020.0, 1040.0, 500.0]  # the clock was set back
    lines = [json.dumps({"done": i, "of": 4, "time": time}) for i, time in enumerate(times)]
    (partial / "progress.jsonl").write_text("\n".join([*lines, '{"done": 4, "of']))
    assert store.seconds(store.make(runs, stage)) == pytest.approx(40, abs=0.5)


def test_half_a_line_that_a_full_disk_left_stops_no_later_attempt(runs: Path, tmp_path: Path) -> None:
    """The next attempt writes on behind it, so the half line and the first new one are one broken line."""
    from transformers import TrainerState

    half = json.dumps({"done": 1, "of": 3, "loss": 0.7, "time": 1000.0}) + '\n{"done": 2, "of'
    (tmp_path / "progress.jsonl").write_text(half)
    curve = TrainingMonitor(tmp_path, STEP)
    for done in (2, 3):
        curve.on_log(None, TrainerState(global_step=done, max_steps=3), None, {"loss": 0.6})
    curve.finish()
    updates_done = [json.loads(line)["done"] for line in (tmp_path / "progress.jsonl").read_text().splitlines()]
    assert updates_done[0] == 1 and updates_done[-1] == 3
    stage = replace(slow(tmp_path / "notes", 0), does=quickly)
    partial = stage.folder(runs).with_name(stage.folder(runs).name + ".partial")
    partial.mkdir(parents=True)
    (partial / "progress.jsonl").write_text(half + '{"done": 2, "of": 3, "time": 1001.0}\n')
    assert store.make(runs, stage).path == stage.folder(runs)


def test_what_a_damaged_policy_was_is_found_out_before_it_is_used(
    runs: Path, policy: Policy, other_policy: Policy, compute: Compute
) -> None:
    """A large file is checked by size here; its content is checked where it is loaded."""
    arguments = {"safe": policy, "reward": other_policy, "q": 0.5}
    made = store.make(runs, Stage(merge.interpolate, "merge", arguments))
    assert isinstance(made, Policy) and merge.weights is policies.headers.weights
    policies.load(made, compute)
    flip(made.path / "model.safetensors")
    with pytest.raises(Exception, match="weights have digest"):
        policies.load(made, compute)
