"""A folder of data is read inside: neither a link nor a name in it leads anywhere else."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.data import readers
from models.errors import BadData

ROWS = [{"prompt": "how", "chosen": "so", "rejected": "no"}]


def jsonl(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(path: Path) -> list[Any]:
    return [row for _, row in readers.rows(path)]


def saved(path: Path) -> Path:
    """A folder of Dataset.save_to_disk."""
    from datasets import Dataset

    Dataset.from_list(ROWS).save_to_disk(path)
    return path


def names(folder: Path, file: str) -> None:
    """Let a folder of `datasets` name another file as its data."""
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_data_files": [{"filename": file}]}))


@pytest.mark.parametrize("does", [read, readers.digest])
@pytest.mark.parametrize("way", ["absolute", "relative", "two steps"])
def test_a_link_out_of_the_folder_is_refused(does: Any, way: str, tmp_path: Path) -> None:
    secret, folder = jsonl(tmp_path / "mine" / "secret.jsonl"), tmp_path / "data"
    jsonl(folder / "a.jsonl")
    (tmp_path / "step").symlink_to(secret)
    target = {"absolute": secret, "relative": Path("../mine/secret.jsonl"), "two steps": Path("../step")}[way]
    (folder / "b.jsonl").symlink_to(target)
    with pytest.raises(BadData, match=r"b\.jsonl: leads out of its folder, to .*secret\.jsonl; copy it") as error:
        does(folder)
    assert "\n" not in str(error.value)
    assert read(folder / "b.jsonl") == ROWS  # a person has named it


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    jsonl(tmp_path / "data" / "deep" / "a.jsonl")
    (tmp_path / "data" / "b.jsonl").symlink_to("deep/a.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert read(tmp_path / "data") == read(tmp_path / "link") == ROWS * 2
    readers.digest(tmp_path / "link")


def test_what_is_no_data_may_lead_anywhere(tmp_path: Path) -> None:
    jsonl(tmp_path / "data" / "a.jsonl")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "data" / "LICENSE").symlink_to("../LICENSE")
    assert read(tmp_path / "data") == ROWS and readers.digest(tmp_path / "data")


def test_the_cache_of_the_hub_goes_on_working(tmp_path: Path) -> None:
    """Its snapshots are links to blobs; a person may link to a blob too."""
    cached = tmp_path / "hub" / "datasets--owner--name"
    jsonl(cached / "blobs" / "0123abcd")
    snapshot = cached / "snapshots" / "revision"
    (snapshot / "data").mkdir(parents=True)
    (snapshot / "data" / "train.jsonl").symlink_to("../../../blobs/0123abcd")
    own = tmp_path / "own"
    own.mkdir()
    (own / "train.jsonl").symlink_to(snapshot / "data" / "train.jsonl")
    for folder in (snapshot, snapshot / "data", own):
        assert read(folder) == ROWS and readers.digest(folder)


@pytest.mark.parametrize("name", ["../mine/data-00000-of-00001.arrow", "{}/mine/data-00000-of-00001.arrow", "link/a"])
def test_a_folder_of_datasets_names_only_files_in_it(name: str, tmp_path: Path) -> None:
    saved(tmp_path / "mine")
    folder = saved(tmp_path / "data")
    assert read(folder) == ROWS
    (folder / "link").symlink_to("../mine")
    names(folder, name.format(tmp_path).replace("link/a", "link/data-00000-of-00001.arrow"))
    with pytest.raises(BadData, match=r"data: its state\.json names '.*\.arrow', which leads out of the folder"):
        read(folder)


@pytest.mark.parametrize("does", [read, readers.digest])
def test_rows_of_datasets_that_lie_elsewhere_are_refused(does: Any, tmp_path: Path) -> None:
    mine, folder = saved(tmp_path / "mine"), saved(tmp_path / "data")
    (held,) = folder.glob("*.arrow")
    held.unlink()
    held.symlink_to(mine / held.name)
    with pytest.raises(BadData, match=r"leads out of (the|its) folder"):
        does(folder)


def test_several_splits_are_refused_unopened(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "../../etc"]}))
    with pytest.raises(BadData, match=r"data: holds several splits \(train, \.\./\.\./etc\); give the folder of one"):
        read(tmp_path / "data")


@pytest.mark.parametrize("state", ["[]", "{}", '{"_data_files": [7]}', '{"_data_files": [{"filename": 7}]}', "no JSON"])
def test_a_damaged_folder_of_datasets_is_named(state: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "data")
    (folder / "state.json").write_text(state)
    with pytest.raises(BadData, match=r"not a folder of Dataset\.save_to_disk"):
        read(folder)
