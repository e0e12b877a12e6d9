"""The formats in use: docs/data.md's own examples, what stands beside them, and that no row is lost or misread."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Preferences, Sources
from models.data import preferences, sft_corpus
from models.data.dialogue import Message
from models.data.formats import FORMATS
from models.errors import BadData
from models.files import jsonl
from models.recipe import Columns, Data, Selection

Row = dict[str, Any]
DOCUMENT = (Path(__file__).parent.parent / "docs" / "data.md").read_text("utf-8")
EXAMPLES: dict[str, Row] = {
    name: json.loads(row) for name, row in re.findall(r"^\| ([^|]+) \| `(\{.*\})` \|", DOCUMENT, re.MULTILINE)
}
QUESTION, GOOD, BAD = "How do I reset my router?", "Hold its button for ten seconds.", "Buy a new one."
UNPAIRED = [one.name for one in FORMATS if one.unpaired]
ALL = Data(validation=0, test=0, near_duplicates=1)


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def prepared(
    folder: Path,
    rows: list[Any],
    method: str = "dpo",
    config: Data = ALL,
    metric: str = "harmless",
) -> Preferences:
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return from_file(folder / "rows.jsonl", method, config, metric)


def from_file(source: Path, method: str = "dpo", config: Data = ALL, metric: str = "harmless") -> Preferences:
    out = source.parent / f"out of {source.name}"
    out.mkdir()
    sources = Sources(path=source.parent, digest="x", files={"steps.0": source.name})
    return preferences.prepare(out, sources, "steps.0", Selection(metric=metric, paired=method == "dpo"), config)


def card(made: Preferences) -> dict[str, Any]:
    return json.loads((made.path / "card.json").read_text("utf-8"))


def quarantined(made: Preferences) -> list[Row]:
    return list(jsonl.read(made.path / "quarantine.jsonl"))


def only(made: Preferences) -> preferences.Pair:
    (pair,) = preferences.pairs_of(made.path / "train.jsonl")
    return pair


# What the document shows


def test_the_document_shows_every_format() -> None:
    assert list(EXAMPLES) == [one.name for one in FORMATS]


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in UNPAIRED])
def test_each_example_of_two_answers_is_the_same_pair(name: str, tmp_path: Path) -> None:
    made = prepared(tmp_path / "x", [EXAMPLES[name]])
    asked = QUESTION if name != "Alpaca preference" else "How do I reset\nmy router?"
    assert only(made) == ([said("user", asked)], GOOD, BAD) and card(made)["formats"] == {name: 1}


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("flag", [True, False, 1, 0, "True", "False", "1", "no"])
def test_each_example_of_one_answer_is_the_same_answer(name: str, flag: Any, tmp_path: Path) -> None:
    known = next(one for one in FORMATS if one.name == name)
    made = prepared(tmp_path / "x", [EXAMPLES[name] | {known.columns[-1]: flag}], "kto")
    (answer,) = preferences.answers_of(made.path / "train.jsonl")
    assert answer == ([said("user", QUESTION)], GOOD, flag in (True, 1, "True", "1"))
    with pytest.raises(BadData, match='the row holds one answer, DPO needs two; use method = "kto"'):
        prepared(tmp_path / "y", [EXAMPLES[name]])


# What changes the meaning, and must not be lost

WHOLE = [said("user", QUESTION), said("assistant", GOOD)]
OTHER = [said("user", QUESTION), said("assistant", BAD)]
SYSTEM = said("system", "Be brief.")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"system": "Be brief.", **EXAMPLES["TRL preference"]}, [SYSTEM, said("user", QUESTION)]),
        ({"system_prompt": "Be brief.", **EXAMPLES["HH-RLHF"]}, [SYSTEM, said("user", QUESTION)]),
        ({"system": None, **EXAMPLES["TRL preference"]}, [said("user", QUESTION)]),
        ({**EXAMPLES["Orca"], "system": "Be brief."}, [SYSTEM, said("user", QUESTION)]),
        (
            {"prompt": f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {QUESTION}\n\nAssistant:",
             "chosen": " " + GOOD, "rejected": " " + BAD, "response": GOOD},
            [said("user", "hi"), said("assistant", "hello"), said("user", QUESTION)],
        ),
        ({"prompt": QUESTION, "chosen": WHOLE, "rejected": OTHER, "messages": WHOLE}, [said("user", QUESTION)]),
        (
            {"prompt": QUESTION, "chosen": [SYSTEM, *WHOLE], "rejected": [SYSTEM, *OTHER]},
            [SYSTEM, said("user", QUESTION)],
        ),
        (
            {"prompt": QUESTION, **{side: [said("user", "hi"), said("assistant", "hello"), *answer]
                                    for side, answer in (("chosen", WHOLE), ("rejected", OTHER))}},
            [said("user", "hi"), said("assistant", "hello"), said("user", QUESTION)],
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}], "chosen": GOOD,
             "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}]},
            [said("user", QUESTION)],
        ),
        (
            {"instruction": QUESTION, "input": None, "history": [["hi", "hello"]], "chosen": GOOD, "rejected": BAD},
            [said("user", "hi"), said("assistant", "hello"), said("user", QUESTION)],
        ),
        (
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": QUESTION}],
             "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD}},
            [SYSTEM, said("user", QUESTION)],
        ),
    ],
    ids=["system", "system_prompt", "no system", "orca system", "old hh", "ultrafeedback", "whole, system", "tulu",
         "parts", "history", "sharegpt system"],
)  # fmt: skip
def test_what_changes_the_meaning_is_read(row: Row, prompt: list[Message], tmp_path: Path) -> None:
    pair = only(prepared(tmp_path / "x", [row]))
    assert pair.prompt == prompt and (pair.chosen.strip(), pair.rejected.strip()) == (GOOD, BAD)


@pytest.mark.parametrize(("strength", "chosen"), [(-3, BAD), (-1, BAD), (1.0, GOOD), ("2", GOOD)])
def test_helpsteer_prefers_the_first_below_zero(strength: Any, chosen: str, tmp_path: Path) -> None:
    assert only(prepared(tmp_path / "x", [EXAMPLES["HelpSteer3"] | {"overall_preference": strength}])).chosen == chosen


def test_a_tie_is_counted_and_no_bad_row(tmp_path: Path) -> None:
    tie = EXAMPLES["HelpSteer3"] | {"overall_preference": 0}
    made = prepared(tmp_path / "x", [EXAMPLES["HelpSteer3"], tie, tie])
    reason = "a tie: neither answer is preferred"
    assert card(made)["rows_became"] == {"train": 1, reason: 2} and made.counts["quarantined"] == 0
    assert [row["row"] for row in quarantined(made)] == [2, 3]


@pytest.mark.parametrize(("label", "chosen"), [(1, BAD), (0, GOOD), ("0", GOOD)])
def test_shp_prefers_the_first_where_its_label_is_one(label: Any, chosen: str, tmp_path: Path) -> None:
    assert only(prepared(tmp_path / "x", [EXAMPLES["SHP"] | {"labels": label}])).chosen == chosen


def test_arena_has_a_winner_ties_and_dialogues_that_part(tmp_path: Path) -> None:
    arena = EXAMPLES["Chatbot Arena"]
    longer = {side: [*arena[side], said("user", "And then?"), said("assistant", "It works.")]
              for side in ("conversation_a", "conversation_b")}  # fmt: skip
    ties = [arena | {"winner": winner} for winner in ("tie", "tie (bothbad)", "both_bad")]
    made = prepared(tmp_path / "x", [arena, *ties, arena | longer])
    tie, parted = "a tie: neither answer is preferred", "the two dialogues differ before their last answers"
    assert card(made)["rows_became"] == {"train": 1, tie: 3, parted: 1} and made.counts["quarantined"] == 0
    assert only(prepared(tmp_path / "y", [arena | {"winner": "model_a"}])).chosen == BAD


@pytest.mark.parametrize(
    ("cells", "answers"),
    [
        ([json.dumps(said("assistant", GOOD)), json.dumps({"value": BAD, "from": "gpt"})], [GOOD, BAD]),
        ([json.dumps(said("assistant", GOOD)), BAD], [json.dumps(said("assistant", GOOD)), BAD]),
        (['{"role": "admin", "content": ""}', '{"from": "Berlin", "value": "3"}'], None),
        (['{"value": 3', '{"value": 4'], None),
    ],
)
def test_cells_may_hold_one_message_each(cells: list[str], answers: list[str] | None, tmp_path: Path) -> None:
    row = EXAMPLES["TRL preference"] | {"chosen": cells[0], "rejected": cells[1]}
    assert [*only(prepared(tmp_path / "x", [row]))[1:]] == (answers or cells)


def test_a_rejected_message_may_stand_without_what_was_asked(tmp_path: Path) -> None:
    row = EXAMPLES["ms-swift preference, two dialogues"]
    made = prepared(tmp_path / "x", [row | {"rejected_messages": row["rejected_messages"][-1:]}])
    assert only(made) == ([said("user", QUESTION)], GOOD, BAD)


TRL, HH = EXAMPLES["TRL preference"], EXAMPLES["HH-RLHF"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (HH | {"chosen": HH["chosen"] + "\n\nHuman: thanks"},
         "chosen: ends with a turn of the user; the last turn must be the assistant's"),
        ({side: text + "\n\nHuman: " for side, text in HH.items()},
         "chosen: ends with a turn of the user; the last turn must be the assistant's"),
        (TRL | {"rejected": BAD + "\n\nHuman: thanks"},
         "rejected: the answer goes on with a turn of the user ('Human:')"),
        (TRL | {"system": "Be brief.", "prompt": [said("system", "Be long."), said("user", QUESTION)]},
         "system: the dialogue begins with another system message"),
        (TRL | {"prompt": "<|im_start|>user\nhi<|im_end|>"},
         "prompt: was rendered by a chat template; give the messages, without its markup"),
        (TRL | {"prompt": "something else", "chosen": WHOLE, "rejected": OTHER},
         "chosen: is a dialogue that does not hold the prompt"),
        (TRL | {"prompt": [said("tool", "42")]}, "prompt: a turn of 'tool'; known are system, user, assistant"),
        (TRL | {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
         "prompt: a message holds a part that is no text"),
        (TRL | {"prompt": "[{'role': 'user', 'content': 'hi'}]"},
         "prompt: looks like a list of messages, but is not JSON"),
        (TRL | {side: f"{{'role': 'assistant', 'content': {side!r}}}" for side in ("chosen", "rejected")},
         "chosen: looks like a message, but is not JSON"),
        (TRL | {"chosen": None}, "chosen: is null"),
        (EXAMPLES["OpenAI preference"] | {"input": {"messages": WHOLE[:1], "tools": [{"type": "function"}]}},
         "input: tools are not supported"),
        (EXAMPLES["HelpSteer3"] | {"overall_preference": 7}, "overall_preference: must be a number from -3 to 3"),
        (EXAMPLES["SHP"] | {"labels": 2}, "labels: must be true or false"),
        (EXAMPLES["Chatbot Arena"] | {"winner": "a"}, "winner: must be model_a, model_b or a tie"),
        (EXAMPLES["Chatbot Arena"] | {"conversation_b": [said("user", "another"), said("assistant", GOOD)]},
         "conversation_b and conversation_a have different contexts"),
    ],
)  # fmt: skip
def test_a_row_that_would_be_misread_is_refused(bad: Row, reason: str, tmp_path: Path) -> None:
    good = [TRL | {"prompt": f"number {i}"} for i in range(99)]
    made = prepared(tmp_path / "x", [*good, bad])
    assert quarantined(made) == [{"file": "rows.jsonl", "row": 100, "reason": reason}]
    assert card(made)["rows_became"] == {"train": 99, reason: 1}


def test_is_safe_says_nothing_of_helpfulness(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="is_safe: says what is safe, not what is helpful"):
        prepared(tmp_path / "x", [EXAMPLES["BeaverTails"]], "kto", metric="helpful")


def test_columns_that_are_not_used_are_said(tmp_path: Path) -> None:
    made = prepared(
        tmp_path / "x",
        [
            TRL | {"score": 3, "images": ["a.png"], "note": ""},
            {"score": 4, **{side: text.replace("Human: ", "Human: again, ") for side, text in HH.items()}},
        ],
    )
    assert card(made)["columns_not_used"] == {"score": 2, "images": 1}
    assert card(made)["formats"] == {"TRL preference": 1, "HH-RLHF": 1}


# Other layouts


@pytest.mark.parametrize("of_step", [False, True])
def test_a_mapping_names_the_columns(of_step: bool, tmp_path: Path) -> None:
    row = {"q": QUESTION, "a": GOOD, "b": BAD, "sys": "Be brief.", "prompt": "not this", "score": 1}
    row |= {"response_0": "", "response_1": ""}
    columns = Columns(prompt="q", chosen="a", rejected="b", system="sys")
    made = prepared(tmp_path / "x", [row], config=ALL.model_copy(update={"columns": columns}))
    assert only(made) == ([SYSTEM, said("user", QUESTION)], GOOD, BAD)
    assert card(made)["columns_not_used"] == {"prompt": 1, "score": 1}


def test_a_mapping_names_what_one_answer_needs(tmp_path: Path) -> None:
    config = ALL.model_copy(update={"columns": Columns(prompt="q", completion="a", label="up")})
    (tmp_path / "x.csv").write_text("q,a,up\nhi,yes,True\nhi,no,FALSE\nhi,who,maybe\n" + "".join(
        f"hi {i},yes,True\n" for i in range(60)))  # fmt: skip
    made = from_file(tmp_path / "x.csv", "kto", config)
    assert [answer.desirable for answer in preferences.answers_of(made.path / "train.jsonl")][:3] == [True, False, True]
    assert quarantined(made) == [{"file": "x.csv", "row": 3, "reason": "up: must be true or false"}]


def test_a_step_may_have_columns_of_its_own() -> None:
    from models.recipe.toml import read

    recipe = read("quickstart", ['data.columns={prompt="q"}', 'steps.1.columns={prompt="asked"}'])
    assert [recipe.data_of(step).columns.named for step in recipe.steps] == [{"prompt": "q"}, {"prompt": "asked"}]


@pytest.mark.parametrize(
    ("row", "columns", "sentence"),
    [
        ({"question": "a", "answer_a": "b", "answer_b": "c"}, {},
         r"no known format has the columns answer_a, answer_b, question; the nearest is .*; name the columns in the "
         r'recipe: columns = { prompt = "question", chosen = "answer_a", rejected = "answer_b" } \(docs/data.md\)'),
        ({"query": "a", "answer": "b", "thumbs_up": True}, {},
         r'columns = { prompt = "query", completion = "answer", label = "thumbs_up" }'),
        (TRL, {"prompt": "question"},
         "columns.prompt: no column 'question'; the file has chosen, prompt, rejected"),
    ],
)  # fmt: skip
def test_an_unknown_format_is_told_with_the_mapping_to_write(
    row: Row, columns: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    config = ALL.model_copy(update={"columns": Columns(**columns)})
    with pytest.raises(BadData, match=sentence) as error:
        prepared(tmp_path / "x", [row], config=config)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "x" / "rows.jsonl"))


def test_a_label_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(TRL))
    sources = Sources(path=tmp_path, digest="x", files={"steps.0": "rows.jsonl"})
    with pytest.raises(BadData, match="label 'mine': TRL preference needs none"):
        preferences.prepare(tmp_path, sources, "steps.0", Selection(metric="harmless", paired=True, label="mine"), ALL)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": QUESTION, "completion": GOOD},
        {"prompt": [said("user", QUESTION)], "completion": [said("assistant", GOOD)]},
        {"messages": WHOLE},
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": GOOD}]},
        {"instruction": QUESTION, "input": "", "output": GOOD},
        {"prompt": QUESTION, "response": GOOD, "system": ""},
    ],
)
def test_a_corpus_holds_prompts_with_answers_or_messages(row: Row, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps(row))
    found = sft_corpus.examples(Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"}), Data())
    assert found == ([(1, [said("user", QUESTION)], GOOD)], [])


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, "row 2: needs prompt and completion, or messages; its columns are text"),
        ({"prompt": "x", "completion": None}, "row 2: completion: is null"),
        ({"messages": WHOLE[:1]}, "row 2: messages: ends with a turn of the user"),
    ],
)
def test_a_row_of_a_corpus_that_teaches_nothing_is_named(row: Row, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"messages": WHOLE}) + "\n" + json.dumps(row))
    with pytest.raises(BadData, match=sentence):
        sft_corpus.examples(Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"}), Data())


@pytest.mark.parametrize(("better", "worse", "tie"), [("4.0", "4", True), ("4.0", "3.9", False), ("", "", False)])
def test_equal_scores_of_a_table_are_a_tie(better: str, worse: str, tie: bool, tmp_path: Path) -> None:
    lines = "prompt,chosen,rejected,score_chosen,score_rejected\nfirst,a,b,2,1\n"
    (tmp_path / "rows.csv").write_text(f"{lines}second,a,b,{better},{worse}\n")
    made = from_file(tmp_path / "rows.csv")
    assert card(made)["rows_became"].get("a tie: neither answer is preferred", 0) == tie
    assert card(made)["scores_prefer_the_rejected"] == 0


def test_scores_that_prefer_the_rejected_answer_are_counted(tmp_path: Path) -> None:
    lines = "prompt,chosen,rejected,chosen_rating,rejected_rating\nfirst,a,b,2,1\nsecond,a,b,1.5,9\nthird,a,b,,9\n"
    (tmp_path / "rows.csv").write_text(lines)
    assert card(from_file(tmp_path / "rows.csv"))["scores_prefer_the_rejected"] == 1


def test_a_bad_row_of_a_folder_is_named_by_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    (folder / "more").mkdir(parents=True)
    for name, count in (("a.jsonl", 60), ("more/b.jsonl", 50)):
        rows = [TRL | {"prompt": f"{name} {i}"} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in [*rows, TRL | {"chosen": ""}]))
    made = from_file(folder)
    named = [(row["file"], row["row"]) for row in quarantined(made)]
    assert named == [("a.jsonl", 61), ("more/b.jsonl", 51)]
    with pytest.raises(BadData, match=r"first in rows a\.jsonl 61, more/b\.jsonl 51\)"):
        from_file(Path(shutil.copytree(folder, tmp_path / "again")), config=ALL.model_copy(update={"bad_rows": 0}))
