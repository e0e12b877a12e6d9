"""Raw comparisons in; validated, split, fingerprinted pairs out.

Every row that is given is used, or named with a reason: one that cannot be used goes to `quarantine.jsonl` with file,
row number and reason, and the data card counts what became of all of them. A prompt's split is a salted hash of the
prompt alone: new data never move a test prompt into training.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.artifacts import Preferences, Sources, content_digest, file_digest
from models.data import readers
from models.data.dialogue import Message, messages
from models.data.fields import Fields, number
from models.data.formats import PKU_LABEL, SCORES, Example, Format, JudgedAnswer, Pair, example, format_of
from models.data.near_duplicates import NearDuplicates, text_of
from models.data.splits import DataCard, Fates, Partners, Quarantined, Split
from models.data.suites import stored
from models.errors import BadData
from models.files import jsonl
from models.files.raw_rows import Dropped, Row, Unusable
from models.recipe import Contaminated, Data, Selection
from models.stage import stage

TRAIN, HELDOUT = ("train",), ("validation", "test")
SPLITS = TRAIN + HELDOUT
DUPLICATE = "exact duplicate of an earlier row"
ALONE = "held out, but no answer of the other kind to the same prompt makes a pair with it"
NEAR = "the prompt is nearly a held-out prompt"
INSIDE = "the prompt stands in an evaluation suite, or nearly so"
KEPT = "; all of them stand in "


@stage("preferences.prepare", version=6)
def prepare(out: Path, sources: Sources, role: str, selection: Selection, config: Data) -> Preferences:
    """Read, check, split and write the comparisons of one step to `out`.

    Writes `train.jsonl` (pairs: prompt, chosen, rejected; for KTO: prompt, answer, desirable), `validation.jsonl` and
    `test.jsonl` (always pairs; held-out unpaired answers of both kinds to one prompt make a pair), `quarantine.jsonl`
    and the data card `card.json`. Memory grows by some hundred bytes per row, not with the texts.

    Args:
        role: which of the sources; also the key of the step in the recipe.

    Raises:
        BadData: the file is missing, empty, of another format, or has more bad rows than the recipe allows.
    """
    source = sources.file(role)
    reading = _Reading(source, selection, config)
    splits = {name: Split(out, name) for name in SPLITS}
    parts: dict[str, int] = {}
    fates = Fates(out, parts)
    partners = Partners(out / "partners.tmp")
    try:
        for number, row in readers.rows(source, parts):
            _place(reading, number, row, splits, fates, partners)
        for number in partners.unmatched():
            fates.drop(number, ALONE)
        # the held-out splits are limited first, then rows too near to them go, then the limit counts what is left
        over = {name: splits[name].limit(config.heldout, "data.heldout", fates) for name in HELDOUT}
        first = _keep_apart(splits, sources, config, fates)
        over["train"] = splits["train"].limit(selection.limit, f"{role}.pairs", fates)
        for split in splits.values():
            split.settle(fates)
    finally:
        for split in splits.values():
            split.close()
        partners.close()
        fates.close()
    became = fates.counts()
    # a share of the rows that differ: copies of good rows must not make a broken file look good enough
    repeated = became.get(DUPLICATE, 0)
    _refuse_bad_rows(source, out, reading.bad, sum(became.values()) - repeated, repeated, config)
    refuse_contamination(source, became.get(INSIDE, 0), first, config)
    if not len(splits["train"]):
        raise BadData(
            f"{source}: no row is left to train on; lower data.validation and data.test; rows in which the user says "
            "the same count as one prompt, whatever the system says: put what differs into the user's turn"
        )
    digests = {name: file_digest(splits[name].path) for name in SPLITS}
    content = content_digest(digests)
    lines = {name: len(splits[name]) for name in SPLITS}
    card = reading.card(lines, became, over, content)
    (out / "card.json").write_text(json.dumps(card, indent=1, ensure_ascii=False), "utf-8")
    bad = sum(reading.bad.values())
    return Preferences(
        path=out, digest=content, metric=selection.metric, counts={**lines, "quarantined": bad}, splits=digests
    )


def pairs_of(path: Path) -> Iterator[Pair]:
    """Yield the pairs of a split file."""
    return (Pair(**row) for row in jsonl.read(path))


def answers_of(path: Path) -> Iterator[JudgedAnswer]:
    """Yield the answers of a KTO training file."""
    return (JudgedAnswer(**row) for row in jsonl.read(path))


def refuse_one_kind(preferences: Preferences, labels: Sequence[bool] | None = None) -> None:
    """Raise BadData if all answers to train on are desirable, or all undesirable: KTO learns from the difference.

    Args:
        labels: of the answers that are left of them; of all of them if none are given.
    """
    if labels is None:
        labels = [answer.desirable for answer in answers_of(preferences.path / "train.jsonl")]
    if len(set(labels)) == 1:
        kind = "desirable" if labels[0] else "undesirable"
        raise BadData(f"{preferences.metric}: all {len(labels)} rows are {kind}; KTO needs answers of both kinds")


def split_of(prompt: list[Message], config: Data) -> str:
    """Return train, validation or test for a prompt, whatever else the data hold."""
    text = config.salt + "\n" + text_of(prompt)
    place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
    if place < config.test:
        return "test"
    return "validation" if place < config.test + config.validation else "train"


class _Reading:
    """The rows of one file being read: their format, what was seen before, and what the data card tells."""

    def __init__(self, source: Path, selection: Selection, config: Data) -> None:
        self.source, self.selection, self.config = source, selection, config
        self.columns = config.columns.named  # kept, since the property builds a new dictionary each time
        self.format: Format | None = None
        # a file may mix formats, but has few sets of columns: FORMATS is searched once for each set, not for each row
        self.format_by_columns: dict[tuple[str, ...], Format] = {}
        self.bad: Counter[str] = Counter()
        self.noted: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.seen: dict[bytes, int] = {}

    def read(self, row: Row | Unusable) -> tuple[Example, list[Pair | JudgedAnswer]]:
        """Return what a row gives, and what of it was not seen before.

        Raises:
            Unusable: the row cannot be used, or says nothing new.
        """
        if isinstance(row, Unusable):
            raise row
        fields = Fields(row, self.columns, self.selection.metric, self.selection.label)
        columns = tuple(row)
        layout = self.format_by_columns.get(columns) or format_of(fields, str(self.source), self.format)
        self.format, self.format_by_columns[columns] = self.format or layout, layout
        parts = example(fields, layout, self.selection.paired)
        records: Sequence[Pair | JudgedAnswer] = parts.answers or [pair for pair in (parts.pair,) if pair]
        fresh = [record for record in records if _remember(record, self.seen, self.noted)]
        if not fresh:
            raise Dropped(DUPLICATE)
        if parts.answers:
            self.noted["answers"] += len(records)
            self.noted["desirable"] += sum(answer.desirable for answer in parts.answers)
            self.noted["repeated"] += len(records) - len(fresh)
        self.formats[layout.name] += 1
        self.unused.update(fields.unused)
        if parts.pair:
            _note(fields, parts.pair, self.noted)
        return parts, fresh

    def card(self, lines: dict[str, int], became: dict[str, int], over: dict[str, int], content: str) -> DataCard:
        """Return the data card.

        Args:
            lines: split → lines of its file.
            became: fate → rows.
            over: split → lines that a limit of the recipe has left out.
            content: the digest over the files of all splits.
        """
        noted = self.noted
        return {
            "source": self.source.name,
            "formats": dict(self.formats),
            "metric": self.selection.metric,
            "rows": sum(became.values()),
            "rows_became": became,
            "splits": lines,
            "splits_hold": {"train": "pairs" if self.selection.paired else "answers"} | dict.fromkeys(HELDOUT, "pairs"),
            "over_the_limit": over,
            "quarantined": dict(self.bad),
            "duplicates": became.get(DUPLICATE, 0),
            "near_a_heldout_prompt": became.get(NEAR, 0),
            "inside_a_suite": became.get(INSIDE, 0),
            "columns_not_used": dict(self.unused),
            "files_not_read": readers.unread_files(self.source),
            "contradictions": noted["contradictions"],
            "scores_prefer_the_rejected": noted["against"],
            "answers_given": noted["answers"],
            "answers_repeated": noted["repeated"],
            "answers_desirable": _share(noted["desirable"], noted["answers"]),
            "multi_turn": _share(noted["multi_turn"], noted["pairs"]),
            "chosen_is_longer": _share(noted["longer"], noted["pairs"]),
            "mean_characters": {side: _share(noted[side], noted["pairs"]) for side in ("chosen", "rejected")},
            "helpful_and_harmless_disagree": _share(noted["disagree"], noted["both_labels"]),
            "both_answers_unsafe": _share(noted["unsafe"], noted["safe_labels"]),
            "content_sha256": content,
        }


def _place(
    reading: _Reading, number: int, row: Row | Unusable, splits: dict[str, Split], fates: Fates, partners: Partners
) -> None:
    """Write what a row gives to the split of its prompt, or say why not."""
    try:
        parts, fresh = reading.read(row)
    except Unusable as reason:
        fates.drop(number, str(reason))
        if not isinstance(reason, Dropped):
            reading.bad[str(reason)] += 1
        return
    split = splits[split_of(fresh[0].prompt, reading.config)]
    fates.take(number, split.name)
    if split.name in TRAIN:
        for record in fresh:
            split.add(record, number)
    # held-out lines are always pairs, for KTO too: margins compare two answers
    elif parts.pair:
        split.add(parts.pair, number)
    elif match := partners.meet(parts.answers[0], number):
        pair, partner = match
        split.add(pair, number, partner)


def _refuse_bad_rows(source: Path, out: Path, reasons: Counter[str], rows: int, repeated: int, config: Data) -> None:
    """Raise BadData if more rows are bad than the recipe allows; `rows` leaves out those that are `repeated`."""
    bad = reasons.total()
    if bad > config.bad_rows * rows:
        common = dict(reasons.most_common(3))
        first: dict[str, list[str]] = {why: [] for why in common}
        for line in jsonl.read(out / "quarantine.jsonl"):
            row = Quarantined(**line)
            if row.reason in first and len(first[row.reason]) < 3:
                first[row.reason].append(f"{row.file} {row.row}" if source.is_dir() else str(row.row))
        sentences = [f"({times} times, first in rows {', '.join(first[why])}): {why}" for why, times in common.items()]
        raise BadData(
            f"{source}: {bad} of {rows} {'different ' if repeated else ''}rows cannot be used, over data.bad_rows = "
            f"{config.bad_rows:g}; most often {', then '.join(sentences)}{KEPT}{out / 'quarantine.jsonl'}"
        )


def _keep_apart(splits: dict[str, Split], sources: Sources, config: Data, fates: Fates) -> str:
    """Drop training rows whose prompt is nearly a held-out one, or stands in a suite; return the first in a suite."""
    for name in HELDOUT:
        splits[name].close()
    suite = suite_prompts(sources, config)
    heldout_prompts = (text_of(pair.prompt) for name in HELDOUT for pair in pairs_of(splits[name].path))
    heldout = NearDuplicates(heldout_prompts, config.near_duplicates)
    first: list[str] = []

    def why_not(line: bytes) -> str:
        prompt = json.loads(line)["prompt"]
        if suite.asks(prompt):
            first.append(prompt[-1]["content"])
            return INSIDE
        return NEAR if heldout.asks(prompt) else ""

    splits["train"].sift(why_not, fates)
    return next(iter(first), "")


def suite_prompts(sources: Sources, config: Data) -> NearDuplicates:
    """Return the prompts of all suites, which nothing may be trained on."""
    suites = [path for split in HELDOUT for path in sources.suites(split).values()]
    prompts = (row["prompt"] for path in suites for row in stored(path))
    return NearDuplicates((text_of(messages(p)) for p in prompts), config.near_duplicates)


def refuse_contamination(source: Path, inside: int, first: str, config: Data) -> None:
    """Raise BadData if training prompts stand in a suite, unless the recipe says to drop them."""
    if inside and config.contaminated is Contaminated.fail:
        raise BadData(
            f"{source}: {inside} training rows have a prompt that stands in an evaluation suite, or nearly so, first "
            f"{' '.join(first.split())[:80]!r}; take them out, or set data.contaminated = 'drop' to leave them out of "
            "training"
        )


def _remember(record: Pair | JudgedAnswer, seen: dict[bytes, int], noted: Counter[str]) -> bool:
    """Return whether this is new; a contradiction (the same answers, the other label) is counted and kept."""
    if isinstance(record, Pair):
        # sorted, so that a pair and its contradiction are one key; the label says which order it had
        content = [record.prompt, *sorted((record.chosen, record.rejected))]
        label = record.chosen < record.rejected
    else:
        content, label = [record.prompt, record.answer], record.desirable
    key = hashlib.sha256(json.dumps(content).encode()).digest()[:16]
    before = seen.get(key, 0)
    seen[key] = before | (2 if label else 1)  # two bits: which of the two labels were seen
    noted["contradictions"] += before in (1, 2) and seen[key] == 3
    return seen[key] != before


def _note(row: Fields, pair: Pair, noted: Counter[str]) -> None:
    """Count what the data card tells; columns that are looked up for it alone do not count as read."""
    noted["pairs"] += 1
    noted["longer"] += len(pair.chosen) > len(pair.rejected)
    noted["chosen"] += len(pair.chosen)
    noted["rejected"] += len(pair.rejected)
    noted["multi_turn"] += len(pair.prompt) > 1
    noted["against"] += any(number(row.cell(rejected)) > number(row.cell(chosen)) for chosen, rejected in SCORES)
    if row.file_columns >= {*PKU_LABEL.values()}:
        noted["both_labels"] += 1
        noted["disagree"] += len({str(row.cell(label)) for label in PKU_LABEL.values()}) == 2
    if row.file_columns >= {"is_response_0_safe", "is_response_1_safe"}:
        noted["safe_labels"] += 1
        noted["unsafe"] += not (row.cell("is_response_0_safe") or row.cell("is_response_1_safe"))


def _share(count: int, of: int) -> float | None:
    return count / of if of else None
