"""From a file or folder to its rows: the one way in for comparisons, suites, labelled samples and the corpus.

Only regular files and folders are opened, and what is read at once is bounded. A row that cannot be used is
`Unusable`, with the reason; a file that cannot be trusted as a whole raises `BadData`. A new kind of file is one more
function that yields rows, and a line in `_rows_of_file`.
"""

import csv
import gzip
import json
import lzma
import os
import re
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import cast

from models.artifacts import tree_digest
from models.errors import BadData
from models.files.confined import refuse_way_out, refuse_ways_out_of_datasets
from models.files.packed import EXPANDS, largest_size, open_unpacked
from models.files.raw_rows import Dropped, Row, Unusable, bad_row, parse, sound

KNOWN = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".parquet")
DATA = (*KNOWN, ".json.gz", ".csv.gz", ".json.xz", ".csv.xz", ".ndjson", ".tsv", ".zst", ".arrow", ".zip", ".tar.gz")
"""How names of files of rows end."""
ROW = 2**24
"""Bytes of the longest row of text: several million tokens."""
WHOLE = 2**31
"""Bytes of the largest .json file: it is held in memory as a whole."""
FILES = 10_000
"""Files and folders that a folder of data may hold."""
TRAIN = re.compile(r"^train|(?<![^-._ 0-9])train(?![^-._ 0-9])")
"""In a name: it begins so, or has it as a word (`helpful_train.jsonl`, `train-00000-of-00004.parquet`)."""
OTHER_SPLIT = "stands in a split that is not read"


def rows(source: Path, parts: dict[str, int] | None = None) -> Iterator[tuple[int, Row | Unusable]]:
    """Yield (row number from 1, row) of a file of a KNOWN type, a `datasets` folder, or a folder of such files.

    Args:
        parts: filled with file → how many rows came before its first one, while they are read.

    Raises:
        BadData: the file is missing, empty, cut off in the middle, or of no known type.
    """
    number = 0
    for file in _files_to_read(source):
        # noted before the first row is yielded: `Fates` looks up there which file a row came from
        if parts is not None:
            parts[source.name if file == source else str(file.relative_to(source))] = number
        for row in _rows_of_file(file):
            number += 1
            yield number, row if isinstance(row, (dict, Unusable)) else Unusable("the row is not an object")
    if not number:
        raise BadData(f"{source}: holds no rows")


def usable_rows(source: Path) -> Iterator[tuple[int, Row]]:
    """Yield (row number, row) of a file in which every row must be usable.

    Raises:
        BadData: as `rows` does; or a row is unusable, which is named.
    """
    for number, row in rows(source):
        if isinstance(row, Unusable):
            if not isinstance(row, Dropped):
                raise bad_row(source, number, row)
        else:
            yield number, row


def digest(source: Path) -> str:
    """Return the sha256 of a file of data, or one over all files of a folder, by name.

    Raises:
        BadData: there is nothing, or nothing that may be read.
    """
    try:
        return tree_digest(source, _regular_files(source) if is_folder(source) else ())
    except OSError as error:
        raise _unreadable(source, error) from error


def unread_files(source: Path) -> list[str]:
    """Return the data files of a folder that are left out: others are named `train`, or their type is unknown."""
    if not is_folder(source) or _of_datasets(source):
        return []
    read = set(_files_to_read(source))
    # `_files_to_read` reads endings in lower case only, so a file called rows.CSV is left out, and its owner is told
    return [
        str(p.relative_to(source)) for p in _regular_files(source) if p.name.lower().endswith(DATA) and p not in read
    ]


def count_unread_rows(source: Path) -> int:
    """Return how many rows stand in a split of a .json file that is not read."""
    files = [file for file in _files_to_read(source) if file.suffix == ".json"]
    return sum(isinstance(row, Dropped) for file in files for row in _rows_of_file(file))


def folders(source: Path) -> list[str]:
    """Return the folders inside one that its rows come from, as hubs keep several sets of data in one repository."""
    if not is_folder(source) or _of_datasets(source):
        return []
    return sorted({str(path.parent.relative_to(source)) for path in _files_to_read(source)})


def is_folder(source: Path) -> bool:
    """Return whether this is a folder and not a regular file.

    Raises:
        BadData: neither, as a pipe or a device: reading it may never end.
    """
    try:
        mode = source.stat().st_mode
    except FileNotFoundError:
        raise BadData(f"{source}: no such data file") from None
    except (OSError, ValueError) as error:  # the path is too long, not ours to read, or holds NUL or half a character
        raise _unreadable(source, error) from error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise BadData(f"{source}: neither a regular file nor a folder; copy the data into one")
    return stat.S_ISDIR(mode)


def _unreadable(source: Path, error: Exception) -> BadData:
    why = getattr(error, "strerror", None) or error
    return BadData(f"{str(source)!a}: cannot be read ({why}); give a file or folder that can")


def _regular_files(folder: Path) -> list[Path]:
    """Return all regular files of a folder, sorted.

    Raises:
        BadData: there are too many, or one that holds data lies elsewhere.
    """
    files: list[Path] = []
    entries = 0
    for place, folders, names in os.walk(folder):
        # counted while walking, so that a home folder or / that is given by mistake is refused soon
        entries += len(folders) + len(names)
        if entries > FILES:
            raise BadData(f"{folder}: holds more than {FILES:,} files; give the folder that holds the data alone")
        files += [path for name in names if (path := Path(place, name)).is_file()]
    for path in files:
        if path.is_symlink() and path.name.endswith((*KNOWN, ".arrow")):
            refuse_way_out(folder, path)
    return sorted(files)


def _of_datasets(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))


def _files_to_read(source: Path) -> list[Path]:
    """Return what to read one after the other; of a folder as hubs lay them out, those named `train` if there are any.

    Raises:
        BadData: there is nothing to read.
    """
    if not is_folder(source) or _of_datasets(source):
        return [source]
    files = [path for path in _regular_files(source) if path.name.endswith(KNOWN)]
    train = [p for p in files if any(TRAIN.search(part) for part in p.relative_to(source).parts)]
    if not files:
        raise BadData(f"{source}: holds no {', '.join(KNOWN)}")
    return train or files


def _rows_of_file(file: Path) -> Iterator[object]:
    """Yield the rows of one file; a file that breaks off is refused as a whole."""
    suffix = Path(file.name.removesuffix(".gz").removesuffix(".xz")).suffix
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}.get(suffix)
    if file.is_dir():  # whatever its name: a folder of `datasets` may be called rows.jsonl
        read = _folder
    if read is None:
        raise BadData(f"{file}: unknown type; give {', '.join(KNOWN)} or a datasets folder")
    number = 0
    try:
        for row in read(file):
            number += 1
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
        raise BadData(f"{file}: the compressed file is cut off after row {number}; copy it again") from error
    except UnicodeDecodeError as error:
        raise BadData(f"{file}: row {number + 1} is not UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise _unreadable(file, error) from error


def _jsonl(source: Path) -> Iterator[object]:
    with open_unpacked(source) as file:
        number = 0
        while line := file.readline(ROW + 1):
            number += 1
            if len(line) > ROW:
                # skip to the end of the line in pieces, so that the rest of a huge row is never in memory as a whole
                while line and not line.endswith(b"\n"):
                    line = file.readline(ROW)
                yield Unusable(f"the row is longer than {ROW:,} bytes")
                continue
            # a byte order mark, which Windows programs write, is taken off the first line only
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            if number == 1 and text.strip() in ("[", "{"):
                raise BadData(f"{source}: is one value of JSON over many lines; name it .json")
            try:
                row, suspect = parse(text)
                yield sound(row) if suspect else row
            except RecursionError:
                yield Unusable("nested too deeply")
            except ValueError:
                # only the last line can lack its end: what is wrong there was cut off, and more rows may be missing
                if not text.endswith("\n"):
                    raise BadData(
                        f"{source}: line {number} is cut off; the file is incomplete, copy it again"
                    ) from None
                yield Unusable("not valid JSON")


def _json(source: Path) -> Iterator[object]:
    """Yield the rows of a list, or of the split `train` of `{"train": […], …}`; the rows of other splits are named."""
    if _by_line(source):
        yield from _jsonl(source)
        return
    content = bytearray()
    with open_unpacked(source) as file:
        while chunk := file.read(ROW):
            content += chunk
            if len(content) > WHOLE:
                raise BadData(f"{source}: has more than {WHOLE:,} bytes, too many for one value of JSON; write .jsonl")
    try:
        value, suspect = parse(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise BadData(f"{source}: not valid JSON at line {error.lineno}: {error.msg}") from error
    except RecursionError:
        raise BadData(f"{source}: nested too deeply to be rows") from None
    lists: dict[str, list[object]] = {"": value} if isinstance(value, list) else {}
    if isinstance(value, dict):
        lists = {name: part for name, part in value.items() if isinstance(part, list)}
    if len(lists) > 1 and "train" not in lists:
        raise BadData(f"{source}: holds several lists ({', '.join(lists)}); give a file with one, or name one train")
    if not lists:
        raise BadData(f"{source}: must hold one list of rows")
    own_split = lists.pop("train" if "train" in lists else next(iter(lists)))
    # `sound` looks at every text again, so it is called only where `parse` saw a reason to
    yield from map(sound, own_split) if suspect else own_split
    for other in lists.values():
        yield from (Dropped(OTHER_SPLIT) for _ in other)


def _by_line(source: Path) -> bool:
    """Return whether the first line is a row and others follow: JSONL is often called .json, as in SHP."""
    with open_unpacked(source) as file:
        first, second = file.readline(ROW), file.readline(ROW)
    try:
        return bool(second.strip()) and isinstance(parse(first.decode("utf-8-sig"))[0], dict)
    except (ValueError, RecursionError):
        return False


def _csv(source: Path) -> Iterator[object]:
    csv.field_size_limit(ROW)
    with open_unpacked(source) as file, TextIOWrapper(cast(BufferedReader, file), "utf-8-sig", newline="") as text:
        table = csv.DictReader(_lines(text, source), strict=True)
        try:
            header = table.fieldnames or [""]
            repeated = [name for name, times in Counter(header).items() if times > 1]
            if repeated:
                # DictReader would keep the last of them without a word
                raise BadData(f"{source}: the column {repeated[0]!r} stands twice in the header")
            if len(header) == 1 and (mark := next((m for m in ";\t|" if m in header[0]), "")):
                raise BadData(f"{source}: its columns are separated by {mark!r}; write it with commas")
            for row in table:
                # DictReader puts cells that are too many under the key None, and None for cells that are missing
                broken = None in row or None in row.values()
                yield Unusable("the number of columns differs from the header") if broken else row
        except csv.Error as error:
            raise BadData(f"{source}: not valid CSV ({error})") from error


def _lines(text: TextIOWrapper, source: Path) -> Iterator[str]:
    """Yield the lines of a table; one without an end, as in a file of zeros, must not fill the memory."""
    while line := text.readline(ROW):
        if len(line) == ROW:
            raise BadData(f"{source}: a line is longer than {ROW:,} characters")
        yield line


def _parquet(source: Path) -> Iterator[object]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(source)
        # Parquet says in its footer what it expands to, so a bomb is refused before anything is unpacked
        size = sum(table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups))
        if size > largest_size(source):
            raise BadData(f"{source}: expands to more than {EXPANDS} times its size; write it without compression")
        for batch in table.iter_batches(1000):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise BadData(f"{source}: not a whole Parquet file ({' '.join(str(error).split())[:200]})") from error


def _folder(source: Path) -> Iterator[object]:
    from datasets import Dataset, load_from_disk

    try:
        refuse_ways_out_of_datasets(source)
        rows_on_disk = load_from_disk(str(source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadData(f"{source}: not a folder of Dataset.save_to_disk ({error})") from error
    assert isinstance(rows_on_disk, Dataset)  # `refuse_ways_out_of_datasets` has refused folders of several splits
    yield from rows_on_disk
