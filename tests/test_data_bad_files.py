"""Files that are no data, and rows that no text should hold: refused in a sentence, at once, whoever reads them."""

import gzip
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Sources
from models.data import preferences, readers, sft_corpus, sources, suites
from models.errors import BadData, BadInput
from models.files import packed
from models.recipe import Data, Selection

GOOD = {"prompt": "hi", "chosen": "yes", "rejected": "no", "completion": "yes", "answer": "yes", "good": True}
DEEP = "[" * 10_000 + "]" * 10_000


def prepared(path: Path) -> Any:
    out = path.parent / "out"
    out.mkdir(exist_ok=True)
    found = Sources(path=path.parent, digest="", files={"steps.0": str(path)})
    config = Data(validation=0, test=0, bad_rows=0.9)
    return preferences.prepare(out, found, "steps.0", Selection(metric="harmless", paired=True), config)


def taught(path: Path) -> Any:
    return sft_corpus.examples(Sources(path=path.parent, digest="", files={"sft": str(path)}), Data())


READERS: dict[str, Callable[[Path], Any]] = {
    "pairs": prepared,
    "suite": lambda path: suites.read(path, "harmless"),
    "labels": suites.labels,
    "corpus": taught,
    "digest": readers.digest,
    "key": lambda path: sources.digest("suite/harmless", str(path)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", ["/dev/zero", "/dev/random", "pipe", "pipe.jsonl", "zero.jsonl", "random.json"])
def test_only_regular_files_and_folders_are_data(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = Path(name) if name.startswith("/") else tmp_path / name
    if name.startswith("pipe"):
        os.mkfifo(path)
    elif not name.startswith("/"):
        path.symlink_to(f"/dev/{path.stem}")
    started = time.monotonic()
    with pytest.raises(BadData, match="neither a regular file nor a folder; copy the data into one"):
        read(path)
    assert time.monotonic() - started < 60  # it never ends


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", ["a\0b.jsonl", "\ud800.jsonl", "x" * 5000 + ".jsonl"], ids=["NUL", "half", "long"])
def test_a_path_that_cannot_be_is_told(name: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(BadData, match="cannot be read") as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_huge_folder_is_no_data(read: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "FILES", 50)
    for i in range(6):
        (tmp_path / "all" / str(i)).mkdir(parents=True)
        for j in range(10):
            (tmp_path / "all" / str(i) / f"{j}.jsonl").write_text(json.dumps(GOOD))
    with pytest.raises(BadData, match="holds more than 50 files; give the folder that holds the data alone"):
        read(tmp_path / "all")


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (("helpful_train.jsonl", "helpful_test.jsonl"), ["helpful_test.jsonl"]),
        (("trainset.jsonl", "testset.jsonl"), ["testset.jsonl"]),
        (("mine-train-0.jsonl", "mine-dev-0.jsonl"), ["mine-dev-0.jsonl"]),
        (("restrained.jsonl", "constraint.jsonl"), []),
    ],
)
def test_of_a_folder_the_files_named_train_are_read(names: tuple[str, str], left: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert readers.unread_files(tmp_path) == left


@pytest.mark.parametrize("role", ["steps.0", "sft", "suite/harmless", "labels/harmless"])
def test_files_of_a_folder_that_are_not_read_are_said(role: str, tmp_path: Path) -> None:
    for name in ("hh_train.jsonl", "beaver.jsonl"):
        (tmp_path / name).write_text(json.dumps(GOOD) + "\n")
    (sentence,) = sources.oddities({role: str(tmp_path), "sft.town": "town"})
    assert (
        sentence
        == f"{role}: {tmp_path}: 1 file not read, since others are named train or the type is not known: beaver.jsonl"
    )


def test_a_folder_is_named_by_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / "data" / name).write_text(json.dumps(GOOD) + "\n")
    before = readers.digest(tmp_path / "data")
    (tmp_path / "data" / "test-0.jsonl").write_text("")
    assert readers.digest(tmp_path / "data") != before and readers.unread_files(tmp_path / "data") == ["test-0.jsonl"]
    assert json.loads((prepared(tmp_path / "data").path / "card.json").read_text())["files_not_read"] == [
        "test-0.jsonl"
    ]


ROWS = {
    "deep": ('{"prompt": ' + DEEP + "}", "nested too deeply"),
    "digits": (json.dumps(GOOD)[:-1] + ', "id": ' + "9" * 5000 + "}", "a number has more than 4,300 digits"),
    "half": (json.dumps({**GOOD, "prompt": "a\ud800b"}), r"a text holds half a character \(a lone surrogate\)"),
    "half key": (json.dumps({**GOOD, "\ud800": 1}), r"a text holds half a character \(a lone surrogate\)"),
    "twice": ('{"prompt": "other", ' + json.dumps(GOOD)[1:], "the key 'prompt' stands twice"),
    "twice inside": (json.dumps(GOOD)[:-1] + ', "x": [{"a": 1, "a": 2}]}', "the key 'a' stands twice"),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_that_no_text_should_hold_is_one_bad_row(kind: str, tmp_path: Path) -> None:
    line, reason = ROWS[kind]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n" + json.dumps(GOOD | {"prompt": "more"}))
    made = prepared(path)
    (held,) = [json.loads(line) for line in (made.path / "quarantine.jsonl").read_text().splitlines()]
    assert held["row"] == 2 and held["reason"] == reason.replace("\\", "") and made.counts["train"] == 2
    for read in (READERS["suite"], READERS["labels"], READERS["corpus"]):
        with pytest.raises(BadData, match=f"rows.jsonl: row 2: {reason}"):
            read(path)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("read", [READERS[name] for name in ("pairs", "suite", "labels", "corpus")])
def test_the_same_in_one_value_of_json(kind: str, read: Callable[[Path], Any], tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text("[" + ROWS[kind][0] + "]")
    with pytest.raises(BadData, match=ROWS[kind][1].split(";")[0]):
        read(path)


def test_a_deep_last_line_without_its_end_is_no_cut_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n" + DEEP)
    with pytest.raises(BadData, match="row 2: nested too deeply"):
        suites.read(tmp_path / "rows.jsonl", "harmless")


def test_splits_in_one_value_of_json(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"test": [GOOD] * 3, "train": [GOOD], "version": 1}))
    made = prepared(path)
    became = json.loads((made.path / "card.json").read_text())["rows_became"]
    assert became == {"train": 1, readers.OTHER_SPLIT: 3} and len(suites.read(path, "harmless")) == 1
    path.write_text(json.dumps({"a": [GOOD], "b": [GOOD]}))
    with pytest.raises(BadData, match=r"holds several lists \(a, b\); give a file with one, or name one train"):
        prepared(path)
    path.write_text(json.dumps({"train": [], "test": [GOOD]}))
    with pytest.raises(BadData, match="no row is left to train on"):
        prepared(path)


BOMB = {
    "jsonl": b'{"prompt": "' + b"a" * 2**20 + b'"}\n',
    "json": b"[" + b" " * 2**20,
    "csv": b"prompt\n" + b"a" * 2**20,
}


@pytest.mark.parametrize("kind", BOMB)
@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_what_expands_without_end_is_refused(
    kind: str, pack: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "UNPACKED", 2**18)
    path = tmp_path / f"rows.{kind}.{'gz' if pack is gzip.compress else 'xz'}"
    path.write_bytes(pack(BOMB[kind]))
    with pytest.raises(BadData, match="expands to more than 200 times its size; if that is right, unpack it"):
        prepared(path)


def test_one_line_of_four_gibibytes_takes_no_memory(tmp_path: Path) -> None:
    """S6: a small .xz that expands to one line of 4 GiB. Here 256 MiB; it is refused after 64 of them."""
    packer = lzma.LZMACompressor(preset=0)
    with (tmp_path / "rows.jsonl.xz").open("wb") as file:
        file.write(packer.compress(b'{"prompt": "'))
        for _ in range(16):
            file.write(packer.compress(b"a" * 2**24))
        file.write(packer.flush())
    code = (
        "import resource, sys; from pathlib import Path; from models.data import readers\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: list(readers.rows(Path(sys.argv[1])))\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "rows.jsonl.xz")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent,
    ).stdout.splitlines()  # fmt: skip
    assert printed[0].startswith("BadData ") and "expands to more than 200 times its size" in printed[0]
    assert int(printed[1]) < 100 * 1024  # KiB


def test_a_row_of_many_bytes_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "ROW", 1000)
    lines = [json.dumps(GOOD), json.dumps(GOOD | {"prompt": "a" * 5000}), json.dumps(GOOD | {"prompt": "b"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    rows = [row if isinstance(row, dict) else str(row) for _, row in readers.rows(tmp_path / "rows.jsonl")]
    assert rows[0] == GOOD and rows[1] == "the row is longer than 1,000 bytes" and rows[2]["prompt"] == "b"
    (tmp_path / "rows.csv").write_text("prompt\nshort\n" + "a" * 5000 + "\n")
    with pytest.raises(BadData, match="a line is longer than 1,000 characters"):
        list(readers.rows(tmp_path / "rows.csv"))


def test_a_column_twice_in_a_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,prompt\na,b,c\n")
    with pytest.raises(BadData, match="the column 'prompt' stands twice in the header"):
        prepared(tmp_path / "rows.csv")


def test_a_suite_says_what_is_null(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('[{"prompt": null}]')
    with pytest.raises(BadData, match="row 1: prompt is null"):
        suites.read(tmp_path / "s.json", "harmless")


def test_an_incident_is_added_to_a_regular_file_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(BadData, match="neither a regular file nor a folder"):
        suites.add(tmp_path / "pipe.jsonl", "how do i", "", "")
    with pytest.raises(BadInput, match="is not UTF-8 text"):
        suites.add(tmp_path / "new.jsonl", "how do i \udcff", "", "")
    assert not (tmp_path / "new.jsonl").exists()
