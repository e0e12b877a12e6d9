"""Raw comparisons in; validated, split, fingerprinted pairs out.

A row that cannot be used goes to `quarantine.jsonl` with file, row number and reason, never silently. A prompt's
split is a salted hash of the prompt alone: new data never move a test prompt into training.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from models import jsonl
from models.artifacts import Preferences, Sources, content_digest, file_digest
from models.errors import BadData
from models.neighbours import Neighbourhood, text_of
from models.readers import PKU_LABEL, Judged, Pair, Row, Unusable, alone, format_of, label_of, rows, unpaired
from models.recipe import Contaminated, Data
from models.tokens import Message, messages

TRAIN, HELDOUT = ("train",), ("validation", "test")
SPLITS = TRAIN + HELDOUT
DUPLICATE = "exact duplicate of an earlier row"
"""Dropped and counted, but no sign of a broken file: it does not count as a bad row."""


KEPT = "; all of them stand in "


def prepare(
    sources: Sources, role: str, metric: str, method: str, label: str, limit: int, config: Data, out: Path
) -> Preferences:
    """Read, check, split and write the comparisons of one step to `out`.

    Writes `train.jsonl` (pairs: prompt, chosen, rejected; for KTO: prompt, answer, desirable), `validation.jsonl` and
    `test.jsonl` (always pairs), `quarantine.jsonl` and the data card `card.json`. Memory grows by some hundred bytes
    per row, not with the texts.

    Raises:
        BadData: the file is missing, empty, of another format, or has more bad rows than the recipe allows.
    """
    source = sources.file(role)
    read: Callable[[Row, str], Pair] | None = None
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    seen: dict[bytes, int] = {}
    files = {split: (out / f"{split}.jsonl").open("w", encoding="utf-8") for split in (*SPLITS, "quarantine")}
    try:
        for number, row in rows(source):
            try:
                if isinstance(row, Unusable):
                    raise row
                read = read or format_of(row, source)
                pair = None if read is alone and method == "kto" else read(row, label or label_of(metric))
                told = [pair] if method == "dpo" and pair else unpaired(row, metric, label, read)
                split = split_of(told[0].prompt, config)
                fresh = [one for one in told if _remember(one, seen, noted)]
                if not fresh:
                    raise Unusable(DUPLICATE)
            except Unusable as reason:
                reasons[str(reason)] += 1
                _write(files["quarantine"], {"file": source.name, "row": number, "reason": str(reason)})
                continue
            if pair:
                _note(row, pair, noted)
            kept = fresh if split == "train" else [pair] if pair else []
            counts[split] += len(kept)
            for one in kept:
                _write(files[split], one._asdict())
    finally:
        for file in files.values():
            file.close()
    _limit(out, HELDOUT, config.heldout, counts)
    near, inside = _kept_apart(out, sources, config)
    counts["train"] -= near + inside
    _limit(out, TRAIN, limit, counts)
    duplicates = reasons.pop(DUPLICATE, 0)
    bad, good = sum(reasons.values()), sum(counts.values()) + near + inside
    if bad > config.bad_rows * (good + bad):
        why, times = reasons.most_common(1)[0]
        numbers = [str(row["row"]) for row in jsonl.read(out / "quarantine.jsonl") if row["reason"] == why][:3]
        raise BadData(
            f"{source}: {bad} of {good + bad} rows cannot be used, over data.bad_rows = {config.bad_rows:g}; "
            f"most often ({times} times, first in rows {', '.join(numbers)}): {why}{KEPT}{out / 'quarantine.jsonl'}"
        )
    if not counts["train"]:
        raise BadData(f"{source}: no row is left to train on; lower data.validation and data.test")
    content = content_digest({split: file_digest(out / f"{split}.jsonl") for split in SPLITS})
    splits = {split: counts[split] for split in SPLITS}
    card = {
        "source": source.name,
        "metric": metric,
        "rows": good + bad + duplicates,
        "splits": splits,
        "over_the_limit": {split: counts[f"{split}, over the limit"] for split in SPLITS},
        "quarantined": dict(reasons),
        "duplicates": duplicates,
        "near_a_heldout_prompt": near,
        "inside_a_suite": inside,
        "contradictions": noted["contradictions"],
        "multi_turn": _share(noted["multi_turn"], noted["pairs"]),
        "chosen_is_longer": _share(noted["longer"], noted["pairs"]),
        "mean_characters": {side: _share(noted[side], noted["pairs"]) for side in ("chosen", "rejected")},
        "helpful_and_harmless_disagree": _share(noted["disagree"], noted["both_labels"]),
        "both_answers_unsafe": _share(noted["unsafe"], noted["safe_labels"]),
        "content_sha256": content,
    }
    (out / "card.json").write_text(json.dumps(card, indent=1))
    return Preferences(path=out, digest=content, metric=metric, counts={**splits, "quarantined": bad})


def pairs(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a split file."""
    return (Pair(**row) for row in jsonl.read(path))


def judged(path: Path) -> Iterator[Judged]:
    """Yield the answers of a KTO training file."""
    return (Judged(**row) for row in jsonl.read(path))


def split_of(prompt: list[Message], config: Data) -> str:
    """Return train, validation or test for a prompt, whatever else the data hold."""
    text = config.salt + "\n" + text_of(prompt)
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"


def _kept_apart(out: Path, sources: Sources, config: Data) -> tuple[int, int]:
    """Drop training rows whose prompt is nearly a held-out prompt, or stands in a suite; return how many of each.

    Raises:
        BadData: a training prompt stands in a suite, and the recipe says to fail.
    """
    suite = suite_prompts(sources, config)
    held = (text_of(pair.prompt) for split in HELDOUT for pair in pairs(out / f"{split}.jsonl"))
    apart = Neighbourhood(held, config.near_duplicates)
    near, inside, first = 0, 0, ""
    dropped = out / "train.new"
    with (out / "train.jsonl").open("rb") as old, dropped.open("wb") as new:
        for line in old:
            text = text_of(json.loads(line)["prompt"])
            in_suite, is_near = suite.holds(text), apart.holds(text)
            inside += in_suite
            first = first or (text if in_suite else "")
            near += is_near and not in_suite
            if not (in_suite or is_near):
                new.write(line)
    refuse_contamination(inside, first, config)
    dropped.rename(out / "train.jsonl")
    return near, inside


def suite_prompts(sources: Sources, config: Data) -> Neighbourhood:
    """Return the prompts of all suites, which nothing may be trained on."""
    suites = [path for split in HELDOUT for path in sources.suites(split).values()]
    asked = (row["prompt"] for path in suites for row in jsonl.read(path))
    return Neighbourhood((text_of(messages(p)) for p in asked), config.near_duplicates)


def refuse_contamination(inside: int, first: str, config: Data) -> None:
    """Raise BadData if training prompts stand in a suite, unless the recipe says to drop them."""
    if inside and config.contaminated is Contaminated.fail:
        raise BadData(
            f"{inside} training rows have a prompt that stands in an evaluation suite, or nearly so, first "
            f"{' '.join(first.split())[:80]!r}; take them out, or set data.contaminated = 'drop' to leave them out of "
            "training"
        )


def _limit(out: Path, splits: tuple[str, ...], most: int, counts: Counter[str]) -> None:
    """Keep the `most` rows of each split with the smallest hash (all, if 0), in their order, and count the others."""
    for split in splits if most else ():
        path, new = out / f"{split}.jsonl", out / f"{split}.new"
        with path.open("rb") as old:
            smallest = set(heapq.nsmallest(most, (hashlib.sha256(line).digest() for line in old)))
        with path.open("rb") as old, new.open("wb") as kept:
            kept.writelines(line for line in old if hashlib.sha256(line).digest() in smallest)
        new.rename(path)
        counts[f"{split}, over the limit"] = max(0, counts[split] - most)
        counts[split] -= counts[f"{split}, over the limit"]


def _remember(told: Pair | Judged, seen: dict[bytes, int], noted: Counter[str]) -> bool:
    """Return whether this is new; a contradiction (the same answers, the other label) is counted and kept."""
    if isinstance(told, Pair):
        said, label = [told.prompt, *sorted((told.chosen, told.rejected))], told.chosen < told.rejected
    else:
        said, label = [told.prompt, told.answer], told.desirable
    identity = hashlib.sha256(json.dumps(said).encode()).digest()[:16]
    before = seen.get(identity, 0)
    seen[identity] = before | (2 if label else 1)  # which of the two labels were seen
    noted["contradictions"] += before in (1, 2) and seen[identity] == 3
    return seen[identity] != before


def _note(row: Row, pair: Pair, noted: Counter[str]) -> None:
    """Count what the data card tells."""
    noted["pairs"] += 1
    noted["longer"] += len(pair.chosen) > len(pair.rejected)
    noted["chosen"] += len(pair.chosen)
    noted["rejected"] += len(pair.rejected)
    noted["multi_turn"] += len(pair.prompt) > 1
    if all(label in row for label in PKU_LABEL.values()):
        noted["both_labels"] += 1
        noted["disagree"] += len({str(row[label]) for label in PKU_LABEL.values()}) == 2
    if "is_response_0_safe" in row and "is_response_1_safe" in row:
        noted["safe_labels"] += 1
        noted["unsafe"] += not (row["is_response_0_safe"] or row["is_response_1_safe"])


def _share(count: int, of: int) -> float | None:
    return count / of if of else None


def _write(file: Any, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
