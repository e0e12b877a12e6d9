"""Every format and file type that people have, and every way in which a row or a file can be bad."""

import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Preferences, Sources
from models.data import preferences
from models.errors import BadData
from models.recipe import Data, Selection

Rows = list[dict[str, Any]]
ALL = Data(validation=0, test=0)
HH = "\n\nHuman: {}\n\nAssistant: {}"


def pku(i: int, **changes: Any) -> dict[str, Any]:
    row = {"prompt": f"question {i} ?", "response_0": f"zero {i}", "response_1": f"one {i}"}
    return row | {"better_response_id": 0, "safer_response_id": 1} | changes


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def as_csv(path: Path, rows: Rows) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: Rows) -> None:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist(rows), path)


def folder(path: Path, rows: Rows) -> None:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(path)


def packed(pack: Callable[[bytes], bytes]) -> Callable[[Path, Rows], object]:
    return lambda path, rows: path.write_bytes(pack(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))


WRITERS: dict[str, Callable[[Path, Rows], object]] = {
    "rows.jsonl": jsonl,
    "rows.jsonl.gz": packed(gzip.compress),
    "rows.jsonl.xz": packed(lzma.compress),
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.csv": as_csv,
    "rows.parquet": parquet,
    "rows": folder,
}


def prepare(
    source: Path, out: Path, metric: str = "harmless", label: str = "", limit: int = 0, config: Data = ALL
) -> Preferences:
    out.mkdir()
    sources = Sources(path=source.parent, digest="x", files={"steps.0": source.name})
    selection = Selection(metric=metric, paired=True, label=label, limit=limit)
    return preferences.prepare(out, sources, "steps.0", selection, config)


def lines(path: Path) -> Rows:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def card(made: Preferences) -> dict[str, Any]:
    return json.loads((made.path / "card.json").read_text())


# File types


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_pairs(name: str, tmp_path: Path) -> None:
    """Blank lines, commas, quotes, line separators and other scripts included."""
    texts = ["plain", 'a, "b"', "two\nlines", "line\u2028separator \x85 ümläut 中文 🙂", " padded "]
    WRITERS[name](tmp_path / name, [pku(i, response_1=text) for i, text in enumerate(texts)])
    made = prepare(tmp_path / name, tmp_path / "out")
    assert made.counts["train"] == 5
    pairs = list(preferences.pairs_of(tmp_path / "out" / "train.jsonl"))
    assert [pair.chosen for pair in pairs] == texts
    assert pairs[2] == ([said("user", "question 2 ?")], "two\nlines", "zero 2")


# Formats


@pytest.mark.parametrize(
    ("metric", "label", "chosen"),
    [("helpful", "", "zero 1"), ("harmless", "", "one 1"), ("helpful", "mine", "one 1")],
)
def test_pku_is_read_by_the_label_of_its_metric(metric: str, label: str, chosen: str, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [pku(1, mine="1")])
    made = prepare(tmp_path / "rows.jsonl", tmp_path / "out", metric, label)
    ((_, found, _),) = preferences.pairs_of(made.path / "train.jsonl")
    assert found == chosen and made.metric == metric and card(made)["helpful_and_harmless_disagree"] == 1


def test_a_metric_of_ones_own_is_read_by_its_own_label(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [pku(1, honest_response_id=1)])
    made = prepare(tmp_path / "rows.jsonl", tmp_path / "out", "honest")
    ((_, found, _),) = preferences.pairs_of(made.path / "train.jsonl")
    assert found == "one 1" and made.metric == "honest"


def test_later_releases_of_pku_tell_severity_and_categories_too(tmp_path: Path) -> None:
    """PKU-SafeRLHF since 2024: category flags, severity and digests beside each answer."""
    columns: dict[str, Any] = {"prompt_source": "BeaverTails"}
    for i, safe in ((0, False), (1, True)):
        columns |= {
            f"response_{i}_source": "Alpaca-7B", f"is_response_{i}_safe": safe, f"response_{i}_sha256": "0" * 64,
            f"response_{i}_harm_category": {"Privacy Violation": not safe, "Violence": False},
            f"response_{i}_severity_level": 0 if safe else 2,
        }  # fmt: skip
    parquet(tmp_path / "rows.parquet", [pku(i, **columns) for i in range(3)])
    made = prepare(tmp_path / "rows.parquet", tmp_path / "out")
    assert [pair.chosen for pair in preferences.pairs_of(made.path / "train.jsonl")] == ["one 0", "one 1", "one 2"]
    assert card(made)["both_answers_unsafe"] == 0 and not card(made)["quarantined"]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"chosen": HH.format("hi", "yes"), "rejected": HH.format("hi", "no")}, [said("user", "hi")]),
        (
            {side: HH.format("hi", "hello") + HH.format("and ?", text) for side, text in
             (("chosen", " yes "), ("rejected", "no"))},
            [said("user", "hi"), said("assistant", "hello"), said("user", "and ?")],
        ),
        ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, [said("user", "hi")]),
        (
            {"prompt": [said("system", "be kind"), said("user", "hi")], "chosen": [said("assistant", "yes")],
             "rejected": [said("assistant", "no")]},
            [said("system", "be kind"), said("user", "hi")],
        ),
        (
            {"chosen": [said("user", "hi"), said("assistant", "yes")],
             "rejected": [said("user", "hi"), said("assistant", "no")]},
            [said("user", "hi")],
        ),
    ],
    ids=["hh", "hh of several turns", "trl", "trl messages", "trl messages, prompt implied"],
)  # fmt: skip
def test_other_formats_are_recognised_by_their_columns(row: dict[str, Any], prompt: Any, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.parquet"):
        WRITERS[name](tmp_path / name, [row])
        made = prepare(tmp_path / name, tmp_path / f"out {name}")
        assert list(preferences.pairs_of(made.path / "train.jsonl")) == [(prompt, "yes", "no")]
        assert card(made)["multi_turn"] == (len(prompt) > 1)


# Bad rows


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (pku(0, safer_response_id=2), "safer_response_id: must be 0 or 1"),
        (pku(0, safer_response_id=None), "safer_response_id: must be 0 or 1"),
        (pku(0, safer_response_id=True), "safer_response_id: must be 0 or 1"),
        (
            {k: v for k, v in pku(0).items() if k != "safer_response_id"},
            "safer_response_id: no such column; name the column that holds the label with `label` in the step",
        ),
        (pku(0, prompt="  "), "prompt: is empty"),
        (pku(0, prompt=None), "prompt: is null"),
        (pku(0, prompt=3), "prompt: must be text or a list of messages"),
        (pku(0, response_0=3), "response_0: must be text"),
        (pku(0, response_1="\n"), "response_1: is empty"),
        (pku(0, response_1="zero 0"), "the two answers are identical"),
        ({}, "prompt: is missing"),
        ([1, 2], "the row is not an object"),
        ("text", "the row is not an object"),
        (None, "the row is not an object"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_number_and_reason(bad: Any, reason: str, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [*(pku(i) for i in range(1, 4)), bad, *(pku(i) for i in range(4, 100))])
    made = prepare(tmp_path / "rows.jsonl", tmp_path / "out")
    assert lines(made.path / "quarantine.jsonl") == [{"file": "rows.jsonl", "row": 4, "reason": reason}]
    assert made.counts["train"] == 99 and made.counts["quarantined"] == 1 and card(made)["quarantined"] == {reason: 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"chosen": "no turn", "rejected": HH.format("hi", "no")}, "chosen: has no 'Assistant:' turn"),
        ({"chosen": HH.format("hi", "yes"), "rejected": HH.format("you", "no")},
         "chosen and rejected have different contexts"),
        ({"chosen": HH.format("hi", ""), "rejected": HH.format("hi", "no")}, "chosen: the answer is empty"),
        ({"chosen": "hi\n\nAssistant: yes", "rejected": "hi\n\nAssistant: no"},
         "the dialogue does not begin with a turn"),
        ({"chosen": HH.format("a\0b", "yes"), "rejected": HH.format("a\0b", "no")}, None),
    ],
)  # fmt: skip
def test_a_bad_dialogue_is_quarantined(bad: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    good = [{"chosen": HH.format(i, "yes"), "rejected": HH.format(i, "no")} for i in range(99)]
    jsonl(tmp_path / "rows.jsonl", [good[0], bad, *good[1:]])
    made = prepare(tmp_path / "rows.jsonl", tmp_path / "out")
    held = lines(made.path / "quarantine.jsonl")
    if reason:
        assert held == [{"file": "rows.jsonl", "row": 2, "reason": reason}] and made.counts["train"] == 99
    else:  # a control character in a text is no reason to stop, whether the row is kept or not
        assert made.counts["train"] + len(held) == 100


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"prompt": "hi", "chosen": [], "rejected": "no"}, "chosen: must be text or a list of messages"),
        ({"prompt": "hi", "chosen": [said("assistant", "a"), said("assistant", "b")], "rejected": "no"},
         "chosen: is a dialogue that does not hold the prompt"),
        ({"prompt": "hi", "chosen": [{"role": "assistant"}], "rejected": "no"},
         "chosen: every message needs a role and a content, both text"),
        ({"prompt": [said("assistant", "hi")], "chosen": "yes", "rejected": "no"},
         "prompt: must end with a turn of the user"),
        ({"prompt": "hi", "chosen": "yes", "rejected": " "}, "rejected: is empty"),
        ({side: [said("user", side), said("assistant", side)] for side in ("chosen", "rejected")},
         "chosen and rejected have different contexts"),
    ],
)  # fmt: skip
def test_bad_messages_are_quarantined(bad: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = [{"prompt": f"{i}", "chosen": "yes", "rejected": "no"} for i in range(99)]
    jsonl(tmp_path / "rows.jsonl", [*good, bad])
    made = prepare(tmp_path / "rows.jsonl", tmp_path / "out")
    assert lines(made.path / "quarantine.jsonl") == [{"file": "rows.jsonl", "row": 100, "reason": reason}]


def test_three_bad_rows_of_a_thousand_go_on_and_four_hundred_stop(tmp_path: Path) -> None:
    for name, bad in (("few", 3), ("many", 400)):
        rows = [pku(i, **({"response_0": ""} if i % 1000 < bad else {})) for i in range(1000)]
        jsonl(tmp_path / f"{name}.jsonl", rows)
    assert prepare(tmp_path / "few.jsonl", tmp_path / "few").counts["train"] == 997
    with pytest.raises(BadData) as error:
        prepare(tmp_path / "many.jsonl", tmp_path / "many")
    assert str(error.value).startswith(
        f"{tmp_path}/many.jsonl: 400 of 1000 rows cannot be used, over data.bad_rows = 0.02; "
        "most often (400 times, first in rows 1, 2, 3): response_0: is empty"
    )
    assert len(lines(tmp_path / "many" / "quarantine.jsonl")) == 400


@pytest.mark.parametrize(("bad", "stops"), [(2, False), (3, True)])
def test_the_share_of_bad_rows_may_reach_but_not_exceed_the_limit(bad: int, stops: bool, tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [pku(i, **({"prompt": ""} if i < bad else {})) for i in range(100)])
    if stops:
        with pytest.raises(BadData, match="3 of 100 rows cannot be used"):
            prepare(tmp_path / "rows.jsonl", tmp_path / "out")
    else:
        assert prepare(tmp_path / "rows.jsonl", tmp_path / "out").counts["quarantined"] == 2


# Bad files


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


GOOD = b"".join(json.dumps(pku(i)).encode() + b"\n" for i in range(200))


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"{}", "must hold one list of rows"),
        ("a.json", b'[{"a": 1},', "not valid JSON at line 1"),
        ("a.jsonl", GOOD[:-20], "line 200 is cut off; the file is incomplete, copy it again"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-30], r"the compressed file is cut off after row \d+; copy it again"),
        ("a.jsonl.xz", lzma.compress(GOOD)[:-30], r"the compressed file is cut off after row \d+; copy it again"),
        ("a.jsonl.gz", GOOD, "the name ends in .gz but the file is not gzip"),
        ("a.jsonl.xz", GOOD, "the name ends in .xz but the file is not xz"),
        ("a.jsonl", gzip.compress(GOOD), "the file is gzip; add .gz to its name"),
        ("a.parquet", b"PAR1 and no more", "not a whole Parquet file"),
        ("a.csv", b"prompt,response_0\n", "holds no rows"),
        ("a.txt", GOOD, "unknown type; give .jsonl"),
        ("a.jsonl", b'{"b": "hi", "a": "yes"}\n', "no known format has the columns a, b; the nearest is "),
        ("a.csv", b"prompt,chosen\nhi,yes\n", "no known format has the columns chosen, prompt"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_a_sentence(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    source = write(tmp_path / name, content)
    with pytest.raises(BadData, match=sentence) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value).startswith(f"{source}: ") and "\n" not in str(error.value)


def test_a_parquet_file_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "rows.parquet", [pku(i) for i in range(50)])
    whole = (tmp_path / "rows.parquet").read_bytes()
    with pytest.raises(BadData, match="not a whole Parquet file"):
        prepare(write(tmp_path / "rows.parquet", whole[: len(whole) // 2]), tmp_path / "out")


def test_text_that_is_not_utf_8_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = GOOD.splitlines(keepends=True)
    rows[7] = rows[7].replace(b"zero", b"z\xe9ro")
    with pytest.raises(BadData, match=r"row 8 is not UTF-8 text"):
        prepare(write(tmp_path / "rows.jsonl", b"".join(rows)), tmp_path / "out")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_is_no_part_of_the_text(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name, [pku(i) for i in range(100)])
    write(tmp_path / name, b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    assert prepare(tmp_path / name, tmp_path / "out").counts["train"] == 100


def test_a_long_answer_fits_into_a_csv_file(tmp_path: Path) -> None:
    as_csv(tmp_path / "rows.csv", [pku(0, response_0="word " * 50_000), pku(1)])
    assert prepare(tmp_path / "rows.csv", tmp_path / "out").counts["train"] == 2


def test_a_broken_line_in_the_middle_is_one_bad_row(tmp_path: Path) -> None:
    rows = GOOD.splitlines(keepends=True)
    rows[4] = b'{"prompt": "hi", \n'
    made = prepare(write(tmp_path / "rows.jsonl", b"".join(rows)), tmp_path / "out")
    assert lines(made.path / "quarantine.jsonl") == [{"file": "rows.jsonl", "row": 5, "reason": "not valid JSON"}]


def test_a_csv_row_of_another_width_is_one_bad_row(tmp_path: Path) -> None:
    as_csv(tmp_path / "rows.csv", [pku(i) for i in range(200)])
    text = (tmp_path / "rows.csv").read_text().splitlines()
    text[3], text[5] = "only,two", text[5] + ",more"
    made = prepare(write(tmp_path / "rows.csv", "\n".join(text).encode()), tmp_path / "out")
    reason = "the number of columns differs from the header"
    assert [(row["row"], row["reason"]) for row in lines(made.path / "quarantine.jsonl")] == [(3, reason), (5, reason)]
