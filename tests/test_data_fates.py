"""Rows in = rows used + rows named with a reason, whatever the format and the method."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.artifacts import Preferences, Sources
from models.data import preferences, readers, sft_corpus, suites
from models.data import sources as origins
from models.data.formats import CORPORA, FORMATS
from models.errors import BadData
from models.files import jsonl
from models.recipe import Data, Selection

Row = dict[str, Any]
DOCUMENT = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")
EXAMPLES: dict[str, Row] = {
    name: json.loads(row) for name, row in re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|", DOCUMENT, re.MULTILINE)
}
TRL = EXAMPLES["TRL preference"]
UNPAIRED = [one.name for one in FORMATS if one.unpaired]
ALL = Data(validation=0, test=0, near_duplicates=1)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def prepared(
    folder: Path, rows: list[Any], method: str, config: Data, limit: int = 0, name: str = "rows.jsonl"
) -> Preferences:
    (folder / "out").mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    sources = Sources(path=folder, digest="x", files={"steps.0": name})
    return preferences.prepare(
        folder / "out", sources, "steps.0", Selection(metric="harmless", paired=method == "dpo", limit=limit), config
    )


def card(made: Preferences) -> dict[str, Any]:
    return json.loads((made.path / "card.json").read_text("utf-8"))


def quarantined(made: Preferences) -> list[Row]:
    return list(jsonl.read(made.path / "quarantine.jsonl"))


# Held-out rows of unpaired data


def unpaired(prompts: int, each: int) -> list[Row]:
    """Rows whose prompts have `each` answers, desirable and undesirable in turn."""
    return [
        {"prompt": f"question {i}", "completion": f"answer {i} {j}", "label": j % 2 == 0}
        for j in range(each) for i in range(prompts)
    ]  # fmt: skip


def test_every_unpaired_row_is_counted_and_partners_make_heldout_pairs(tmp_path: Path) -> None:
    """1,000 rows once gave 789 to train, and 211 stood nowhere."""
    made = prepared(tmp_path / "x", unpaired(200, 3) + unpaired(600, 1)[200:], "kto", Data(near_duplicates=1))
    data_card = card(made)
    became = data_card["rows_became"]
    assert data_card["rows"] == 1000 == sum(became.values()) and became["train"] == made.counts["train"]
    held = [pair for split in ("validation", "test") for pair in preferences.pairs_of(made.path / f"{split}.jsonl")]
    assert became["validation"] + became["test"] == 2 * len(held) > 40
    assert data_card["splits_hold"] == {"train": "answers", "validation": "pairs", "test": "pairs"}
    for pair in held:
        number = pair.prompt[0]["content"].split()[1]
        assert pair.chosen in (f"answer {number} 0", f"answer {number} 2") and pair.rejected == f"answer {number} 1"
    alone = [row for row in quarantined(made) if row["reason"] == preferences.ALONE]
    assert len(alone) == became[preferences.ALONE] and not (made.path / "partners.tmp").exists()
    assert made.counts["quarantined"] == 0


def test_kto_from_pairs_counts_rows_as_rows(tmp_path: Path) -> None:
    made = prepared(tmp_path / "x", [TRL | {"prompt": f"number {i}"} for i in range(100)], "kto", Data(heldout=3))
    data_card = card(made)
    assert sum(data_card["rows_became"].values()) == data_card["rows"] == 100
    assert data_card["splits"]["train"] == 2 * data_card["rows_became"]["train"] and data_card["splits"]["test"] == 3
    assert data_card["answers_given"] == 200 and data_card["answers_desirable"] == 0.5


def test_an_answer_meets_only_another_of_the_other_kind(tmp_path: Path) -> None:
    """In whatever order they come; the same answer, judged both ways, is no pair."""
    answers = [("a", False), ("a", True), ("b", False), ("c", True), ("d", True), ("e", True)]
    rows = [{"prompt": "the one", "completion": answer, "label": label} for answer, label in answers]
    config = Data(near_duplicates=1, test=0.999, validation=0, salt="any")
    for i, ordered_rows in enumerate((rows, rows[::-1])):
        trained = [{"prompt": f"to train {j}", "completion": "x", "label": True} for j in range(9000)][::9]
        made = prepared(tmp_path / str(i), [*ordered_rows, *trained], "kto", config)
        every_pair = preferences.pairs_of(made.path / "test.jsonl")
        pairs = [pair for pair in every_pair if pair.prompt[0]["content"] == "the one"]
        good, bad = {pair.chosen for pair in pairs}, {pair.rejected for pair in pairs}
        assert len(pairs) == 2 and bad == {"a", "b"} and len(good) == 2 and good <= {"a", "c", "d", "e"}
        assert all(pair.chosen != pair.rejected for pair in pairs) and card(made)["rows_became"]["test"] == 4


def test_a_row_counts_as_used_if_one_of_its_answers_is(tmp_path: Path) -> None:
    made = prepared(tmp_path / "x", [TRL | {"prompt": f"number {i}"} for i in range(30)], "kto", ALL, limit=20)
    prompts = {row.prompt[0]["content"] for row in preferences.answers_of(made.path / "train.jsonl")}
    assert made.counts["train"] == 20 > len(prompts) == card(made)["rows_became"]["train"]
    assert card(made)["rows_became"]["over the limit steps.0.pairs"] == 30 - len(prompts)
    assert card(made)["over_the_limit"] == {"validation": 0, "test": 0, "train": 40}


def test_the_plan_says_what_became_of_every_row(tmp_path: Path) -> None:
    from models.plan import _rows_in_words

    rows = [*unpaired(200, 3), {"prompt": "x", "completion": "", "label": True}, unpaired(1, 1)[0] | {"score": 1}]
    line = _rows_in_words(card(prepared(tmp_path / "x", rows, "kto", Data(near_duplicates=1))))
    numbers = [int(number) for number in re.findall(r"(\d+) (?:to train|held out|not used)", line)]
    assert line.startswith("602 rows given: ") and sum(numbers) == 602
    assert "completion: is empty" in line and "exact duplicate" in line


# For every reader: rows in = rows used + rows named with a reason

TEXT = st.one_of(
    st.sampled_from(["hi", "yes", "no", "", " ", "\n\nHuman: a\n\nAssistant: b", "[{"]), st.text(max_size=8)
)
VALUE = st.one_of(
    TEXT, st.none(), st.booleans(), st.integers(-4, 4), st.just([]),
    st.lists(st.builds(said, st.sampled_from(["user", "assistant", "tool"]), TEXT), max_size=3),
)  # fmt: skip
COLUMNS = sorted({column for row in EXAMPLES.values() for column in row})


@st.composite
def files(draw: st.DrawFn) -> tuple[list[Any], str]:
    """Rows that begin as a documented example does, then changed, cut, repeated or replaced."""
    name = draw(st.sampled_from(list(EXAMPLES)))
    rows: list[Any] = [EXAMPLES[name]]
    for _ in range(draw(st.integers(0, 12))):
        row: Any = dict(EXAMPLES[draw(st.sampled_from([name, name, name, *EXAMPLES]))])
        change = draw(st.sampled_from(["none", "prompt", "value", "value", "cut", "junk"]))
        if change == "prompt":
            row[next(iter(row))] = draw(TEXT)
        elif change == "value":
            row[draw(st.sampled_from(sorted(row)))] = draw(VALUE)
        elif change == "cut":
            del row[draw(st.sampled_from(sorted(row)))]
        elif change == "junk":
            row = draw(st.one_of(VALUE, st.dictionaries(st.sampled_from(COLUMNS), VALUE, max_size=4)))
        rows.append(row)
    return rows, "kto" if name in UNPAIRED else draw(st.sampled_from(["dpo", "kto"]))


@settings(max_examples=100, deadline=None, database=None)
@given(files(), st.sampled_from([0, 2]), st.sampled_from([0.0, 0.3]), st.sampled_from(["rows.jsonl", "rows.json"]))
def test_no_row_is_lost(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[list[Any], str], limit: int, share: float, name: str
) -> None:
    rows, method = case
    folder = tmp_path_factory.mktemp("rows")
    config = Data(validation=share, test=share, near_duplicates=1, bad_rows=0.99, heldout=limit)
    try:
        made = prepared(folder / "x", rows, method, config, name=name, limit=limit)
    except BadData as error:
        assert re.search("no row is left to train on|rows cannot be used", str(error))
        return
    became = card(made)["rows_became"]
    named = {row["row"] for row in quarantined(made)}
    used = sum(became.get(split, 0) for split in preferences.SPLITS)
    over = sum(count for reason, count in became.items() if reason.startswith("over the limit"))
    assert sum(became.values()) == len(rows) == card(made)["rows"]
    assert used + over + len(named) == len(rows)
    for split in preferences.SPLITS:
        for pair in jsonl.read(made.path / f"{split}.jsonl"):
            assert pair["prompt"][-1]["role"] == "user" and all(
                pair[k].strip() for k in ("chosen", "answer") if k in pair
            )


TABLES = [name for name, row in EXAMPLES.items() if name not in ("OpenAI preference",)]  # whose request is an object


@settings(max_examples=30, deadline=None, database=None)
@given(st.sampled_from(TABLES), st.lists(st.dictionaries(st.integers(0, 4), TEXT, max_size=2), max_size=8), st.data())
def test_no_row_of_a_table_is_lost(
    tmp_path_factory: pytest.TempPathFactory, name: str, changes: list[dict[int, str]], data: st.DataObject
) -> None:
    """CSV and Parquet, whose cells are text: messages stand in them as JSON."""
    folder = tmp_path_factory.mktemp("rows")
    first = {column: cell if isinstance(cell, str) else json.dumps(cell) for column, cell in EXAMPLES[name].items()}
    rows = [first, *({**first, **{list(first)[i % len(first)]: text for i, text in one.items()}} for one in changes)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(first))
        writer.writeheader()
        writer.writerows(rows)
    file_name = data.draw(st.sampled_from(["rows.csv", "rows.parquet"]))
    sources = Sources(path=folder, digest="x", files={"steps.0": file_name})
    (folder / "out").mkdir()
    method = "kto" if name in UNPAIRED else "dpo"
    config = ALL.model_copy(update={"bad_rows": 0.99})
    try:
        made = preferences.prepare(
            folder / "out", sources, "steps.0", Selection(metric="harmless", paired=method == "dpo"), config
        )
    except BadData as error:
        assert re.search("no row is left to train on|rows cannot be used|not valid CSV", str(error))
        return
    became = card(made)["rows_became"]
    assert sum(became.values()) == len(rows) == card(made)["rows"]
    assert became["train"] + len({row["row"] for row in quarantined(made)}) == len(rows)


@st.composite
def texts(draw: st.DrawFn) -> list[Any]:
    """Rows of a corpus, a suite or a labelled sample, good ones and spoilt ones."""
    columns = draw(st.sampled_from([*CORPORA, ("prompt", "answer", "good"), ("prompt", "type", "label")]))
    good = {
        "prompt": "q", "instruction": "q", "completion": "a", "response": "a", "output": "a", "answer": "a",
        "good": True, "type": "homonyms", "label": "safe",
        "messages": [said("user", "q"), said("assistant", "a")],
        "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
    }  # fmt: skip
    rows: list[Any] = []
    for i in range(draw(st.integers(1, 8))):
        row: Any = {column: good[column] for column in columns}
        if isinstance(row[columns[0]], str) and draw(st.booleans()):
            row[columns[0]] = f"q{i % 4}"
        change = draw(st.sampled_from(["none"] * 12 + ["value", "label", "junk"]))
        if change == "value":
            row[draw(st.sampled_from(columns))] = draw(VALUE)
        elif change == "label":
            row["label"] = draw(st.sampled_from(["safe", "unsafe", "true", "false", "?"]))
        elif change == "junk":
            row = draw(VALUE)
        rows.append(row)
    return rows


@settings(max_examples=150, deadline=None, database=None)
@given(texts(), st.booleans())
def test_no_row_of_a_corpus_a_suite_or_a_sample_is_lost(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], whole: bool
) -> None:
    """Each of them is used, counted as left out, or the first that cannot be used is named."""
    folder = tmp_path_factory.mktemp("rows")
    path = folder / ("rows.json" if whole else "rows.jsonl")
    path.write_text(json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "suite.jsonl").write_text(json.dumps({"prompt": "q1"}) + "\n")
    files = Sources(path=folder, digest="x", files={"sft": path.name, "suite/harmless/test": "suite.jsonl"})
    named = re.compile(rf"{re.escape(str(path))}: row ([1-{len(rows)}]): ")
    try:
        kept, left_out = sft_corpus.examples(files, Data(contaminated="drop"))
        assert sorted([row.row for row in kept] + [row["row"] for row in left_out]) == [*range(1, len(rows) + 1)]
    except BadData as error:
        assert named.match(str(error)) or "nothing is left to train on" in str(error)
    for role in ("harmless", "over_refusal"):
        try:
            used = suites.read(path, role)
            counts = re.findall(r"(\d+) (?:duplicates? dropped|rows? left out)", " ".join(suites.oddities(path, role)))
            assert len(used) + sum(map(int, counts)) == len(rows)
        except BadData as error:
            assert named.match(str(error)) or "holds no prompt for the role" in str(error)
    try:
        assert len(suites.labels(path)) == len(rows)
    except BadData as error:
        assert named.match(str(error))


def test_rows_of_another_split_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "suite.json"
    path.write_text(json.dumps({"train": [{"prompt": "a"}], "test": [{"prompt": "b"}, {"prompt": "c"}]}))
    assert [row["prompt"] for row in suites.read(path, "harmless")] == ["a"] and readers.count_unread_rows(path) == 2
    assert list(origins.oddities({"suite/harmless": str(path)})) == [
        f"suite/harmless: {path}: 2 rows not used, since only those of train are"
    ]
