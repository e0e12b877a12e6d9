"""A folder of data from elsewhere is read inside that folder only: its links may not lead to the reader's own files."""

import json
from pathlib import Path

from models.errors import BadData


def refuse_way_out(folder: Path, file: Path) -> None:
    """Refuse a file of a folder whose content lies elsewhere.

    Raises:
        BadData: the file is a link that leads out of the folder.
    """
    if _leads_out(folder, file):
        raise BadData(
            f"{file}: leads out of its folder, to {file.resolve()}; copy it into the folder, or give that file by its "
            "own path"
        )


def refuse_ways_out_of_datasets(folder: Path) -> None:
    """Refuse a folder of `Dataset.save_to_disk` that names files elsewhere as its data, or holds several splits.

    Raises:
        BadData: it is such a folder.
        OSError, ValueError, KeyError, TypeError: it cannot be read, or holds something else.
    """
    # `save_to_disk` writes these two files for a single split, and dataset_dict.json above the folders of several
    whole = all((folder / name).exists() for name in ("dataset_info.json", "state.json"))
    if not whole and (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text("utf-8"))["splits"]
        raise BadData(f"{folder}: holds several splits ({', '.join(splits)}); give the folder of one")
    for data_file in json.loads((folder / "state.json").read_text("utf-8"))["_data_files"]:
        name = data_file["filename"]
        if ".." in Path(name).parts or _leads_out(folder, folder / name):
            raise BadData(
                f"{folder}: its state.json names {name!r}, which leads out of the folder; save the data again in one"
            )


def _leads_out(folder: Path, file: Path) -> bool:
    real = file.resolve()
    # The hub's cache is no way out: its snapshots are folders of links to the folder `blobs` beside them
    is_blob = real.parent.name == "blobs" and (real.parent.parent / "snapshots").is_dir()
    return not (real.is_relative_to(folder.resolve()) or is_blob)
