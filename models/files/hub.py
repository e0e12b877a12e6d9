"""Where a name leads: a local file or folder, or a repository of the Hugging Face hub, or a part of one."""

import os
import re
from pathlib import Path

from models.errors import BadInput

NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?")
"""Repository, revision, and the folder or file inside."""
WEIGHTS = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*"]
"""What is fetched of a model: never code, never pickled weights."""
ROWS_OR_WEIGHTS = (".jsonl", ".json", ".csv", ".parquet", ".gz", ".xz", ".gguf", ".safetensors", ".toml")
FILES = (*ROWS_OR_WEIGHTS, ".yaml", ".yml", ".txt", ".md")
"""Endings that no hub id has: data, weights, tasks, rubrics."""
ROWS = ["*.jsonl", "*.jsonl.gz", "*.jsonl.xz", "*.json", "*.csv", "*.parquet"]


def is_name(place: str, folder: Path = Path()) -> bool:
    """Return whether this names a hub repository (`owner/name@revision:folder`) and nothing on this disk.

    Without a revision the newest is meant, without a folder the whole repository.

    Args:
        folder: where a relative path begins.
    """
    repository = place.partition(":")[0]
    # `data/pairs.jsonl` and `my-models/tiny` look like owner/name: the ending of a file, or a folder `my-models` that
    # is there, tells that a place on this disk is meant, even if nothing lies there yet
    of_a_file = repository.endswith(FILES) or (folder / Path(repository).expanduser()).parent.is_dir()
    return NAME.fullmatch(place) is not None and not of_a_file


def local(place: str, kind: str) -> Path:
    """Return the local path of a file, folder or hub repository; the hub's own cache keeps what was downloaded.

    Args:
        kind: `model` or `dataset`.

    Raises:
        BadInput: no such repository, revision or folder in it, or no network.
    """
    match = NAME.fullmatch(place)
    if match is None or not is_name(place):
        return Path(place).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, revision, part = match.groups()
    patterns = WEIGHTS if kind == "model" else ROWS
    if part:
        patterns = [part, *(f"{part}/{pattern}" for pattern in patterns)]
    try:
        offline = bool(os.environ.get("HF_HUB_OFFLINE"))
        snapshot = snapshot_download(
            name,
            repo_type=kind,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=offline,
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(f"{kind} {place!r}: neither on this disk nor to be had from the hub ({why})") from error
    if part and not (Path(snapshot) / part).exists():
        raise BadInput(f"{kind} {place!r}: the repository holds no {part}, or nothing in it that is read here")
    return Path(snapshot) / (part or "")
