"""Rows in real use that are easily misread: a turn lost, a side or a label turned round, markup taken for words."""

import json
from pathlib import Path
from typing import Any

import pytest

from models import starter
from models.artifacts import Preferences, Sources
from models.data import preferences, readers, sft_corpus, suites
from models.data import sources as origins
from models.data.dialogue import Message
from models.data.fields import Fields
from models.data.formats import example, format_of
from models.errors import BadData
from models.files.raw_rows import Unusable
from models.recipe import Data, Selection

Row = dict[str, Any]
ALL = Data(validation=0, test=0, near_duplicates=1, bad_rows=0.999)


def said(role: str, text: str) -> Message:
    return Message(role=role, content=text)


def prepared(folder: Path, rows: list[Row], method: str = "dpo", config: Data = ALL) -> Preferences:
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    sources, out = Sources(path=folder, digest="x", files={"steps.0": source.name}), folder / "out"
    out.mkdir()
    return preferences.prepare(out, sources, "steps.0", Selection(metric="harmless", paired=method == "dpo"), config)


def read(row: Row, columns: dict[str, str] | None = None, method: str = "dpo") -> Any:
    """Return the pair or the answer that a row alone gives."""
    fields = Fields(row, columns or {}, "harmless", "")
    found = example(fields, format_of(fields, "x.jsonl"), method)
    return found.pair or found.answers[0]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "response": "a", "unsafe": True},
        {"prompt": "q", "response": "a", "thumbs_down": 1},
        {"prompt": "q", "response_a": "x", "response_b": "y", "preference": "B"},
        {"prompt": "q", "answer_a": "x", "answer_b": "y", "winner": "model_b"},
        {"prompt": "q", "response_1": "x", "response_2": "y", "label": 1},
        {"question_id": "7", "answer_a": "x", "answer_b": "y", "winner": "tie"},
        {"instruction": "q", "chosen_model": "gpt-4", "rejected_model": "llama", "chosen_rating": 5},
    ],
)
def test_no_mapping_is_suggested_that_turns_a_label_round_or_takes_what_is_no_text(row: Row) -> None:
    with pytest.raises(BadData, match=r"columns = \{.*….*; where … stands, make a column") as refused:
        read(row)
    mapping = str(refused.value).partition("columns = {")[2]
    for name in ("unsafe", "thumbs_down", "preference", "winner", "_model", "_rating", "question_id", "response_a"):
        assert name not in mapping


def test_what_belongs_to_an_instruction_follows_its_column_under_another_name() -> None:
    row = {"instruction": "Translate to French", "input": "Good morning", "answer_a": "Bonjour", "answer_b": "Salut"}
    mapped = {"prompt": "instruction", "chosen": "answer_a", "rejected": "answer_b"}
    assert read(row, mapped).prompt == [said("user", "Translate to French\nGood morning")]
    again = {"query": "and 3+3?", "response": "6", "rejected_response": "7", "history": [["2+2?", "4"]]}
    pair = read(again, {"prompt": "query", "chosen": "response", "rejected": "rejected_response"})
    assert pair.prompt == [said("user", "2+2?"), said("assistant", "4"), said("user", "and 3+3?")]
    turns = [said("user", "hi"), said("assistant", "hello"), said("user", "Translate")]
    row = {"instruction": turns, "input": "Good morning", "chosen": "Bonjour", "rejected": "Salut"}
    assert read(row).prompt == [*turns[:2], said("user", "Translate\nGood morning")]


def test_each_row_is_read_by_its_own_columns(tmp_path: Path) -> None:
    rows = [
        {"chosen": "\n\nHuman: hi\n\nAssistant: a", "rejected": "\n\nHuman: hi\n\nAssistant: b"},
        {"input": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "Translate", "input": "Good morning", "chosen": "Bonjour", "rejected": "Salut"},
        {"prompt": "q2", "chosen": "a", "rejected": "b"},
    ]
    made = prepared(tmp_path, rows)
    questions = [pair.prompt[-1]["content"] for pair in preferences.pairs_of(made.path / "train.jsonl")]
    assert questions == ["hi", "q", "Translate\nGood morning", "q2"]


def test_a_system_message_before_whole_dialogues_is_kept() -> None:
    system, hi = said("system", "Answer as a pirate."), said("user", "Hi")
    sides = {"chosen": [hi, said("assistant", "Arr")], "rejected": [hi, said("assistant", "Hello")]}
    assert read({"prompt": [system, hi], **sides}).prompt == [system, hi]
    other = {side: [said("system", "Be kind."), *turns] for side, turns in sides.items()}
    with pytest.raises(Unusable, match="chosen: begins with another system message than the prompt"):
        read({"prompt": [system, hi], **other})


def test_the_system_column_of_a_suite_is_part_of_its_prompts(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    rows = [{"prompt": "hi", "system": "You are a pirate."}, {"prompt": "hi", "system": "Be kind."}, {"prompt": "hi"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row["prompt"] for row in suites.read(path, "harmless")]
    assert found == [[said("system", row["system"]), said("user", "hi")] for row in rows[:2]] + ["hi"]
    path.write_text(json.dumps({"messages": [said("system", "a"), said("user", "b")], "system": "c"}))
    with pytest.raises(BadData, match="row 1: `system`: the messages begin with another system message"):
        suites.read(path, "harmless")


@pytest.mark.parametrize(
    "text",
    [
        'prompt,chosen,rejected\nq1,a1,"b1 opens\nq2,a2,b2\nq3,a3,b3\nq4,a4,"b4 opens\nq5,a5,b5\n',
        'prompt,chosen,rejected\nq1,a1,b1\nq2,a2,"a long answer that is cu',
        'prompt,chosen,rejected\nq1,a1,"say \\"hi\\""\n',
    ],
)
def test_a_table_whose_quotes_do_not_close_is_refused_whole(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(BadData, match=r"t\.csv: not valid CSV"):
        list(readers.rows(tmp_path / "t.csv"))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("t.csv", "prompt;chosen;rejected\nq;a;b\n", "its columns are separated by ';'; write it with commas"),
        ("t.csv", "prompt\tchosen\nq\ta\n", r"its columns are separated by '\\t'; write it with commas"),
        ("t.jsonl", '[\n  {"prompt": "a"}\n]\n', "is one value of JSON over many lines; name it .json"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_what_to_do(
    name: str, text: str, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadData, match=sentence):
        list(readers.rows(tmp_path / name))


@pytest.mark.parametrize("text", ['{"prompt": "a"}\n{"prompt": "b"}\n', '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}'])
def test_rows_by_line_are_read_under_the_name_json_too(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text)
    assert [row for _, row in readers.rows(tmp_path / "t.json")] == [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize("flag", [{"is_safe": False}, {"label": False}, {"kto_tag": "false"}])
def test_a_corpus_teaches_no_answer_that_is_marked_as_bad(flag: Row, tmp_path: Path) -> None:
    row = {"prompt": "How to make a bomb?", "response": "Take …"}
    files = Sources(path=tmp_path, digest="x", files={"sft": "c.jsonl"})
    (tmp_path / "c.jsonl").write_text(json.dumps(row | dict.fromkeys(flag, True)) + "\n" + json.dumps(row | flag))
    with pytest.raises(BadData, match=f"row 2: {next(iter(flag))}: is false, so the answer is not one to be taught"):
        sft_corpus.examples(files, ALL)


@pytest.mark.parametrize(
    "tie", [{"status": "tie"}, {"score_chosen": 7.0, "score_rejected": 7}, {"chosen_rating": 5, "rejected_rating": 5}]
)
def test_a_tie_is_no_preference(tie: Row, tmp_path: Path) -> None:
    row = {"input": "q", "chosen": "a", "rejected": "b"}
    made = prepared(tmp_path, [row, {**row, "input": "q2", "score_chosen": 7, "score_rejected": 3}, {**row, **tie}])
    card = json.loads((made.path / "card.json").read_text())
    assert card["rows_became"] == {"train": 2, "a tie: neither answer is preferred": 1} and not card["quarantined"]


@pytest.mark.parametrize(
    "prompt",
    [
        "Below is an instruction that describes a task.\n\n### Instruction:\nHi\n\n### Response:",
        "A chat between a curious user and an assistant. USER: hi ASSISTANT:",
        "### Human: hi\n### Assistant:",
        "Human: hi\nAssistant:",
        "[gMASK]<sop><|user|>\nhi",
        "<｜User｜>hi<｜Assistant｜>",
    ],
)
def test_a_prompt_that_was_rendered_is_refused(prompt: str) -> None:
    with pytest.raises(Unusable, match="prompt: was rendered by a chat template"):
        read({"prompt": prompt, "chosen": "a", "rejected": "b"})


@pytest.mark.parametrize(
    "answer", ["<|im_start|>assistant\nHello<|im_end|>", "Hello<|eot_id|>", "\n\nAssistant: Hello", "Hello</s>"]
)
def test_an_answer_with_the_markup_of_a_template_is_refused(answer: str) -> None:
    with pytest.raises(Unusable, match="chosen: was rendered by a chat template"):
        read({"prompt": "q", "chosen": answer, "rejected": "b"})


def test_two_answers_beside_a_prompt_of_another_name_are_no_dialogues() -> None:
    with pytest.raises(BadData, match=r'columns = \{ prompt = "query", chosen = "chosen", rejected = "rejected" \}'):
        read({"query": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(Unusable, match="chosen: has no 'Assistant:' turn"):
        read({"chosen": "a", "rejected": "b"})


def test_whole_dialogues_may_stand_in_columns_of_other_names() -> None:
    """In HH-RLHF's markup or as messages; a column of the prompt that is not named leaves them two answers."""
    mapping = {"chosen": "good", "rejected": "bad"}
    texts = {"good": "\n\nHuman: hi\n\nAssistant: a", "bad": "\n\nHuman: hi\n\nAssistant: b"}
    turns = {name: [said("user", "hi"), said("assistant", text)] for name, text in (("good", "a"), ("bad", "b"))}
    for row in (texts, turns):
        assert read(row, mapping) == ([said("user", "hi")], "a", "b")
    with pytest.raises(BadData, match="no known format has the columns bad, good, query"):
        read({"query": "q", "good": "a", "bad": "b"}, mapping)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": [said("user", " ")], "chosen": "a", "rejected": "b"}, "the last turn of the user is empty"),
        ({"instruction": "q", "history": 5, "chosen": "a", "rejected": "b"}, "history: must be a list of"),
        (
            {"instruction": "\n\nHuman:", "input": "x", "chosen": "a", "rejected": "b"},
            "must end with a turn of the user",
        ),
        (
            {"context": "q", "response1": "a", "response2": "b", "overall_preference": 10**400},
            "overall_preference: must be a number from -3 to 3",
        ),
        (
            {
                "prompt": "q",
                "chosen": {"role": "assistant", "content": "42", "reasoning_content": "6*7"},
                "rejected": "b",
            },
            "chosen: a turn with reasoning_content",
        ),
    ],
)
def test_a_row_that_says_too_little_or_too_much_is_named(row: Row, sentence: str) -> None:
    with pytest.raises(Unusable, match=sentence):
        read(row)


def test_init_says_that_a_column_is_of_no_use_for_a_metric(tmp_path: Path) -> None:
    path = tmp_path / "beaver.jsonl"
    path.write_text(json.dumps({"prompt": "q", "response": "a", "is_safe": True}) + "\n")
    assert starter.inspect_data("harmless", str(path)).method == "kto"
    assert starter.inspect_data("helpful", str(path)).words.startswith("not usable yet: is_safe: says what is safe")


def test_several_sets_of_data_in_one_folder_are_told(tmp_path: Path) -> None:
    """As a hub has them: a step for harmlessness would be trained on helpful pairs, too."""
    for name in ("harmless-base", "helpful-base"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    sentence = f"{tmp_path}: harmless-base, helpful-base are read as one; give one of them if they differ in kind"
    assert list(origins.oddities({"steps.1": str(tmp_path)})) == [f"steps.1: {sentence}"]
    assert not list(origins.oddities({"steps.1": str(tmp_path / "harmless-base")}))


def test_data_of_a_type_that_nobody_reads_are_told(tmp_path: Path) -> None:
    for name in ("train.jsonl", "more.json.gz", "more.ndjson", "rest.TSV", "README.md"):
        (tmp_path / name).write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n')
    assert readers.unread_files(tmp_path) == ["more.json.gz", "more.ndjson", "rest.TSV"]
