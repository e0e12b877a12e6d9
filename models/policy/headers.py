"""What the weights of a folder, or of a GGUF file, say of themselves, read without reading the weights.

A safetensors file begins with the length of a JSON text, and that text names type, shape and place of every tensor
(https://github.com/huggingface/safetensors#format). A GGUF file begins with `GGUF` and a version
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from models.errors import BadPolicy

WEIGHTS = "*.safetensors"
INDEX = "model.safetensors.index.json"
TENSORS = 200_000
"""Names in all files of a folder; mixtures with hundreds of experts have some 100,000."""
LARGEST_HEADER = 16 * 2**20
"""Bytes: 150,000 tensors in one file. The library itself reads 100 MB, which take ten seconds and 760 MB of memory."""
LARGEST_SETTINGS = 32 * 2**20
"""Bytes; the largest is the index of a model of many tensors."""
GGUF_VERSIONS = (2, 3)
AGAIN = "copy or download it again"
Settings = dict[str, Any]
"""The JSON object of a config file: each architecture has keys of its own."""


class Tensor(NamedTuple):
    """One tensor of a file."""

    dtype: str
    """As safetensors writes it: F32, BF16, I8, …."""
    shape: tuple[int, ...]


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return name → type and shape of every tensor that the folder's safetensors files hold.

    Raises:
        BadPolicy: a file is empty, cut, or no safetensors; more tensors are named than any model has; a file that the
            index names is missing.
    """
    named: dict[str, Tensor] = {}
    for file in weights(folder):
        named |= _header(file)
        _refuse_too_many(folder, len(named))
    if (folder / INDEX).exists():
        missing = next((name for name in _indexed(folder) if not (folder / name).is_file()), None)
        if missing is not None:
            raise BadPolicy(f"{folder / INDEX}: names the file {missing!r}, which is not there; {AGAIN}")
    return named


def weights(folder: Path) -> list[Path]:
    """Return the safetensors files that hold a folder's weights, by name: those that transformers would load.

    Others may lie beside them, as `consolidated.safetensors` in Mistral's own folders, with the same weights under
    other names.

    Raises:
        BadPolicy: the index cannot be read.
    """
    whole, files = folder / "model.safetensors", sorted(folder.glob(WEIGHTS))
    # transformers looks for this file first, also where an index lies beside it
    if whole in files:
        return [whole]
    indexed = _indexed(folder) if (folder / INDEX).exists() else []
    return [file for file in files if file.name in indexed] or files


def _indexed(folder: Path) -> list[str]:
    """Return the names of the files that the index names; one empty name, which no file has, if it is no index."""
    weight_map = settings(folder / INDEX).get("weight_map")
    return sorted({*map(str, weight_map.values())}) if isinstance(weight_map, dict) else [""]


def settings(file: Path) -> Settings:
    """Return the JSON object in a file.

    Raises:
        BadPolicy: there is none, or a larger one than any model has.
    """
    try:
        if regular(file).stat().st_size > LARGEST_SETTINGS:
            raise BadPolicy(f"{file}: is larger than {LARGEST_SETTINGS:,} bytes, which no settings are; {AGAIN}")
        content = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise BadPolicy(f"{file}: cannot be read ({error.strerror}); {AGAIN}") from error
    except (ValueError, RecursionError) as error:
        raise BadPolicy(f"{file}: is no JSON ({error}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise BadPolicy(f"{file}: holds a {type(content).__name__} where settings are meant; {AGAIN}")
    return content


def regular(file: Path) -> Path:
    """Return the file, unless it is a folder, or a device or pipe that may never end.

    Raises:
        BadPolicy: it is one of these.
    """
    if file.exists() and not file.is_file():
        raise BadPolicy(f"{file}: is a {'folder' if file.is_dir() else 'pipe or device'}, not a file; {AGAIN}")
    return file


def gguf(file: Path) -> None:
    """Check that a file begins as a GGUF file does.

    Raises:
        BadPolicy: it is empty, something else, or of a version that does not exist.
    """
    with regular(file).open("rb") as stream:
        start = stream.read(24)  # the fixed part: `GGUF`, version, number of tensors, number of settings
    version = int.from_bytes(start[4:8], "little")
    if not start.startswith(b"GGUF"):
        raise BadPolicy(f"{file}: is {'empty' if not start else 'no GGUF file'}; {AGAIN}")
    if len(start) < 24:
        raise BadPolicy(f"{file}: is cut off after {len(start)} bytes; {AGAIN}")
    if version not in GGUF_VERSIONS:
        raise BadPolicy(f"{file}: is GGUF of version {version}; versions 2 and 3 can be read: convert the model again")


def _refuse_too_many(where: Path, tensors: int) -> None:
    if tensors > TENSORS:
        raise BadPolicy(f"{where}: names more than {TENSORS:,} tensors, which no model has; {AGAIN}")


def _header(file: Path) -> dict[str, Tensor]:
    """Return name → type and shape of the tensors of one safetensors file, whose size must fit what it names."""
    size = regular(file).stat().st_size
    if size < 8:
        raise BadPolicy(f"{file}: is {'empty' if not size else 'cut off'}; {AGAIN}")
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        # Eight bytes of any other file, read as a number, are nearly always larger than that file and our limit
        if length > size - 8 and length > LARGEST_HEADER:
            raise BadPolicy(f"{file}: is no safetensors file; {AGAIN}")
        if length > LARGEST_HEADER:
            raise BadPolicy(f"{file}: has a header of {length:,} bytes, which no model has; {AGAIN}")
        text = stream.read(length)
    if len(text) < length:
        raise BadPolicy(f"{file}: is cut off; {AGAIN}")
    # Counted before JSON makes objects of them, which took 760 MB for a million tensors. A tensor has three brackets:
    # its own, that of its shape and that of its place
    _refuse_too_many(file, (text.count(b"{") + text.count(b"[")) // 3)
    try:
        entries = [(name, entry) for name, entry in json.loads(text).items() if name != "__metadata__"]
        named = {name: Tensor(entry["dtype"], tuple(map(int, entry["shape"]))) for name, entry in entries}
        end = max((int(entry["data_offsets"][1]) for _, entry in entries), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise BadPolicy(f"{file}: is no safetensors file; {AGAIN}") from error
    if size - 8 - length != end:
        raise BadPolicy(f"{file}: holds {size - 8 - length:,} bytes of weights where {end:,} are named; {AGAIN}")
    return named
