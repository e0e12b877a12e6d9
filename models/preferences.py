"""Raw comparisons in; validated, split, fingerprinted pairs out.

A row that cannot be used goes to `quarantine.jsonl` with file, row number and reason, never silently. A prompt's
split is a salted hash of the prompt alone: new data never move a test prompt into training.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from models.artifacts import Preferences, Sources, content_digest, file_digest
from models.errors import BadData
from models.recipe import Data, Metric
from models.tokens import Message

SPLITS = ("train", "validation", "test")
PKU_LABEL = {Metric.helpful: "better_response_id", Metric.harmless: "safer_response_id"}
DUPLICATE = "exact duplicate of an earlier row"
"""Dropped and counted, but no sign of a broken file: it does not count as a bad row."""


class Pair(NamedTuple):
    """One comparison: the answer `chosen` was preferred to `rejected` for this prompt."""

    prompt: list[Message]
    chosen: str
    rejected: str


class Unusable(Exception):
    """Why a row goes to quarantine."""


def prepare(sources: Sources, metric: str, config: Data, out: Path) -> Preferences:
    """Read, check, split and write the pairs of one metric to `out`.

    Writes `train.jsonl`, `validation.jsonl`, `test.jsonl` (rows: prompt, chosen, rejected), `quarantine.jsonl` and the
    data card `card.json`.

    Raises:
        BadData: the file is missing, empty, of another format, or has more bad rows than the recipe allows.
    """
    source, wanted = sources.file(metric), Metric(metric)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    seen: set[bytes] = set()
    longer_chosen = 0
    files = {split: (out / f"{split}.jsonl").open("w", encoding="utf-8") for split in (*SPLITS, "quarantine")}
    try:
        for number, raw in _rows(source):
            try:
                if isinstance(raw, Unusable):
                    raise raw
                pair = _pku(raw, wanted)
                identity = hashlib.sha256(json.dumps(pair).encode()).digest()
                if identity in seen:
                    raise Unusable(DUPLICATE)
                seen.add(identity)
            except Unusable as reason:
                reasons[str(reason)] += 1
                _write(files["quarantine"], {"file": source.name, "row": number, "reason": str(reason)})
                continue
            longer_chosen += len(pair.chosen) > len(pair.rejected)
            split = split_of(pair.prompt, config)
            counts[split] += 1
            _write(files[split], pair._asdict())
    finally:
        for file in files.values():
            file.close()
    duplicates = reasons.pop(DUPLICATE, 0)
    bad, good = sum(reasons.values()), sum(counts.values())
    if not good + bad:
        raise BadData(f"{source}: no rows; expected one JSON object per line")
    if bad > config.bad_rows * (good + bad):
        why, times = reasons.most_common(1)[0]
        raise BadData(
            f"{source}: {bad} of {good + bad} rows cannot be used, more than data.bad_rows = {config.bad_rows:g}; "
            f"most often ({times}): {why}"
        )
    if not counts["train"]:
        raise BadData(f"{source}: no row is left to train on; lower data.validation and data.test")
    content = content_digest({split: file_digest(out / f"{split}.jsonl") for split in SPLITS})
    splits = {split: counts[split] for split in SPLITS}
    card = {
        "source": source.name,
        "source_sha256": file_digest(source),
        "metric": metric,
        "rows": good + bad + duplicates,
        "splits": splits,
        "quarantined": dict(reasons),
        "duplicates": duplicates,
        "chosen_is_longer": longer_chosen / good,
        "content_sha256": content,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1))
    return Preferences(path=out, digest=content, metric=metric, counts={**splits, "quarantined": bad})


def pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of one split file."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Pair(**json.loads(line))


def split_of(prompt: list[Message], config: Data) -> str:
    """Return train, validation or test for a prompt, whatever else the data hold."""
    text = config.salt + "\n" + " ".join("\n".join(m["content"] for m in prompt).lower().split())
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"


def _rows(source: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, parsed row), or the reason why a line cannot be parsed."""
    if not source.is_file():
        raise BadData(f"{source}: no such data file")
    with source.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError:
                yield number, Unusable("not valid JSON" if line.endswith("\n") else "line is cut off")


def _pku(row: Any, metric: Metric) -> Pair:
    """Read one row of PKU-SafeRLHF (Dai et al. 2024): two answers, one label per metric."""
    if not isinstance(row, dict):
        raise Unusable("row is not a JSON object")
    label = PKU_LABEL[metric]
    for field in ("prompt", "response_0", "response_1"):
        if not isinstance(row.get(field), str):
            raise Unusable(f"{field}: must be text")
        if not row[field].strip():
            raise Unusable(f"{field}: is empty")
    if row.get(label) not in (0, 1) or isinstance(row[label], bool):
        raise Unusable(f"{label}: must be 0 or 1")
    answers = (row["response_0"], row["response_1"])
    if answers[0] == answers[1]:
        raise Unusable("the two answers are identical")
    winner = int(row[label])
    return Pair([Message(role="user", content=row["prompt"])], answers[winner], answers[1 - winner])


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
