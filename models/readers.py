"""The formats people have, read row by row: one code path from a file to a pair.

A row that cannot be used is `Unusable`, with the reason; a file that cannot be trusted as a whole raises `BadData`.
"""

import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from models.errors import BadData
from models.tokens import Message

Row = dict[str, Any]
PKU_LABEL = {"helpful": "better_response_id", "harmless": "safer_response_id"}
KNOWN = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".json", ".csv", ".parquet")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class Pair(NamedTuple):
    """One comparison: the answer `chosen` was preferred to `rejected` for this prompt."""

    prompt: list[Message]
    chosen: str
    rejected: str


class Judged(NamedTuple):
    """One answer to a prompt, and whether it is desirable."""

    prompt: list[Message]
    answer: str
    desirable: bool


class Unusable(Exception):
    """Why a row goes to quarantine."""


def label_of(metric: str) -> str:
    """Return the column of PKU-SafeRLHF, or one named alike, that holds the label of a metric."""
    return PKU_LABEL.get(metric, f"{metric}_response_id")


def rows(source: Path) -> Iterator[tuple[int, Row | Unusable]]:
    """Yield (row number from 1, row) of a file of a KNOWN type, a `datasets` folder, or a folder of such files.

    Raises:
        BadData: the file is missing, empty, cut off in the middle, or of no known type.
    """
    if not source.exists():
        raise BadData(f"{source}: no such data file")
    files = [source]
    if source.is_dir() and not any((source / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        files = _parts(source)
    number = 0
    for file in files:
        for row in _whole(file):
            number += 1
            yield number, row if isinstance(row, (dict, Unusable)) else Unusable("the row is not an object")
    if not number:
        raise BadData(f"{source}: holds no rows")


def _whole(file: Path) -> Iterator[Any]:
    """Yield the rows of one file; a file that breaks off is refused as a whole."""
    suffix = Path(file.name.removesuffix(".gz").removesuffix(".xz")).suffix
    read = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}.get(suffix)
    if file.is_dir():
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


def _parts(folder: Path) -> list[Path]:
    """Return the data files of a folder, as hubs lay them out: those named `train` if there are any."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.endswith(KNOWN)]
    train = [p for p in files if any(part.startswith("train") for part in p.relative_to(folder).parts)]
    if not files:
        raise BadData(f"{folder}: holds no {', '.join(KNOWN)}")
    return train or files


def format_of(row: Row, source: Path) -> Callable[[Row, str], Pair]:
    """Return the reader for files whose rows look like this one: `reader(row, label column)`.

    Raises:
        BadData: no known format has these columns.
    """
    if {"response_0", "response_1"} <= row.keys():
        return pku
    if {"prompt", "completion", "label"} <= row.keys():
        return alone
    if {"chosen", "rejected"} <= row.keys():
        both = row["chosen"], row["rejected"]
        if "prompt" not in row and all(isinstance(text, str) for text in both):
            return hh
        return trl
    raise BadData(
        f"{source}: no known format has the columns {', '.join(sorted(row)) or '(none)'}; known are PKU-SafeRLHF "
        "(prompt, response_0, response_1 and a label), HH-RLHF (chosen, rejected as dialogues), "
        "TRL (prompt, chosen, rejected)"
    )


def pku(row: Row, label: str) -> Pair:
    """Read PKU-SafeRLHF (Dai et al. 2024): two answers, and in `label` the index of the preferred one."""
    prompt, *answers = (_text(row, field) for field in ("prompt", "response_0", "response_1"))
    if label not in row:
        raise Unusable(f"{label}: no such column; name the column that holds the label with `label` in the step")
    if row.get(label) not in (0, 1, "0", "1") or isinstance(row[label], bool):
        raise Unusable(f"{label}: must be 0 or 1")
    winner = int(row[label])
    return _checked(Pair([Message(role="user", content=prompt)], answers[winner], answers[1 - winner]))


def hh(row: Row, label: str) -> Pair:
    """Read HH-RLHF (Bai et al. 2022): two whole dialogues that differ in their last answer."""
    sides = []
    for field in ("chosen", "rejected"):
        context, found, answer = _text(row, field).rpartition(ASSISTANT)
        if not found:
            raise Unusable(f"{field}: has no 'Assistant:' turn")
        sides.append((context, answer.strip()))
    (context, chosen), (other, rejected) = sides
    if context != other:
        raise Unusable("chosen and rejected have different contexts")
    return _checked(Pair(_turns(context), chosen, rejected))


def alone(row: Row, label: str) -> Pair:
    """Refuse an unpaired row where pairs are needed."""
    raise Unusable('the row holds one answer, DPO needs two; use method = "kto" for unpaired data')


def trl(row: Row, label: str) -> Pair:
    """Read TRL's preference format, plain or conversational, with the prompt given or implied."""
    sides = [_messages(row, field) for field in ("chosen", "rejected")]
    prompt = _messages(row, "prompt", role="user") if "prompt" in row else sides[0][:-1]
    if "prompt" not in row and prompt != sides[1][:-1]:
        raise Unusable("chosen and rejected have different contexts")
    if "prompt" in row and any(len(side) != 1 for side in sides):
        raise Unusable("chosen and rejected must hold one answer each when the prompt is given")
    if any(side[-1]["role"] != "assistant" for side in sides):
        raise Unusable("chosen and rejected must end with a turn of the assistant")
    return _checked(Pair(prompt, sides[0][-1]["content"], sides[1][-1]["content"]))


def unpaired(row: Row, metric: str, label: str, read: "Callable[[Row, str], Pair]") -> list[Judged]:
    """Read one row for KTO.

    Both answers of a PKU row by `is_response_i_safe`, where the metric is harmless and no label is named; TRL's
    unpaired format (prompt, completion, label); or any pair as one desirable and one undesirable answer.
    """
    if read is alone:
        answer = _messages(row, "completion")[-1]["content"]
        return [_judged(_messages(row, "prompt", role="user"), answer, row.get("label"), "label")]
    if read is pku and metric == "harmless" and not label:
        asked = [Message(role="user", content=_text(row, "prompt"))]
        fields = [(f"response_{i}", f"is_response_{i}_safe") for i in (0, 1)]
        return [_judged(asked, _text(row, answer), row.get(flag), flag) for answer, flag in fields]
    pair = read(row, label or label_of(metric))
    return [Judged(pair.prompt, pair.chosen, True), Judged(pair.prompt, pair.rejected, False)]


def _judged(prompt: list[Message], answer: str, flag: Any, field: str) -> Judged:
    if flag not in (True, False, 0, 1):
        raise Unusable(f"{field}: must be true or false")
    if not answer.strip():
        raise Unusable("the answer is empty")
    return Judged(prompt, answer, bool(flag))


def _checked(pair: Pair) -> Pair:
    if not pair.prompt or pair.prompt[-1]["role"] != "user":
        raise Unusable("prompt: must end with a turn of the user")
    for field, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not text.strip():
            raise Unusable(f"{field}: the answer is empty")
    if pair.chosen == pair.rejected:
        raise Unusable("the two answers are identical")
    return pair


def _text(row: Row, field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str):
        raise Unusable(f"{field}: {'must be text' if field in row else 'is missing'}")
    if not value.strip():
        raise Unusable(f"{field}: is empty")
    return value


def _messages(row: Row, field: str, role: str = "assistant") -> list[Message]:
    value = row.get(field)
    if isinstance(value, str):
        return [Message(role=role, content=_text(row, field))]
    if not isinstance(value, list) or not value:
        raise Unusable(f"{field}: must be text or a list of messages")
    for turn in value:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise Unusable(f"{field}: every message needs a role and a content, both text")
    return [Message(role=turn["role"], content=turn["content"]) for turn in value]


def _turns(context: str) -> list[Message]:
    """Split an HH dialogue into messages."""
    first, *parts = re.split(f"({HUMAN}|{ASSISTANT})", context)
    if first.strip():
        raise Unusable("the dialogue does not begin with a turn")
    role = {HUMAN: "user", ASSISTANT: "assistant"}
    return [Message(role=role[mark], content=text.strip()) for mark, text in zip(parts[::2], parts[1::2], strict=True)]


def _bytes_of(source: Path) -> IO[bytes]:
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(source.suffix, open)
    return cast(IO[bytes], opened(source, "rb"))


def _jsonl(source: Path) -> Iterator[Any]:
    with _bytes_of(source) as file:
        for number, line in enumerate(file, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                yield json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                if not text.endswith("\n"):
                    raise BadData(
                        f"{source}: line {number} is cut off; the file is incomplete, copy it again"
                    ) from None
                yield Unusable("not valid JSON")


def _json(source: Path) -> Iterator[Any]:
    with _bytes_of(source) as file:
        try:
            found = json.loads(file.read().decode("utf-8-sig"))
        except json.JSONDecodeError as error:
            raise BadData(f"{source}: not valid JSON at line {error.lineno}: {error.msg}") from error
    if not isinstance(found, list):
        raise BadData(f"{source}: must hold one list of rows")
    yield from found


def _csv(source: Path) -> Iterator[Any]:
    csv.field_size_limit(2**31 - 1)
    with _bytes_of(source) as file:
        try:
            for row in csv.DictReader(TextIOWrapper(file, "utf-8-sig", newline="")):
                broken = None in row or None in row.values()
                yield Unusable("the number of columns differs from the header") if broken else row
        except csv.Error as error:
            raise BadData(f"{source}: not valid CSV ({error})") from error


def _parquet(source: Path) -> Iterator[Any]:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(source).iter_batches(1000):
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise BadData(f"{source}: not a whole Parquet file ({error})") from error


def _folder(source: Path) -> Iterator[Any]:
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(source))
    except (OSError, ValueError) as error:
        raise BadData(f"{source}: not a folder of Dataset.save_to_disk ({error})") from error
    if not isinstance(found, Dataset):
        raise BadData(f"{source}: holds several splits ({', '.join(found)}); give the folder of one")
    yield from found
