"""Duplicates, contradictions, splits and limits: which of the rows that could be read are used, and for what."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.alignment import methods
from models.artifacts import Preferences, Sources
from models.data import preferences
from models.data.dialogue import Message
from models.errors import BadData
from models.recipe import Contaminated, Data, Method, Selection
from tasks.work.store import content_of

ALL = Data(validation=0, test=0)


def pku(i: int, **changes: Any) -> dict[str, Any]:
    row = {"prompt": f"question {i} ?", "response_0": f"zero {i}", "response_1": f"one {i}"}
    return row | {"better_response_id": 0, "safer_response_id": 1} | changes


def jsonl(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(source: Path, out: Path, limit: int = 0, config: Data = ALL) -> Preferences:
    out.mkdir()
    sources = Sources(path=source.parent, digest="x", files={"steps.0": source.name})
    return preferences.prepare(out, sources, "steps.0", Selection(metric="harmless", paired=True, limit=limit), config)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def card(made: Preferences) -> dict[str, Any]:
    return json.loads((made.path / "card.json").read_text())


def test_exact_duplicates_are_dropped_and_contradictions_kept_and_counted(tmp_path: Path) -> None:
    same, swapped = pku(1), pku(1, safer_response_id=0)
    order = pku(1, response_0="one 1", response_1="zero 1", safer_response_id=0)  # the same pair, the other way round
    jsonl(tmp_path / "rows.jsonl", [same, same, order, swapped, pku(2), swapped])
    made = prepare(tmp_path / "rows.jsonl", tmp_path / "out")
    data_card = card(made)
    assert (data_card["duplicates"], data_card["contradictions"], data_card["rows"]) == (3, 1, 6)
    assert made.counts["train"] == 3 and made.counts["quarantined"] == 0
    assert [row["row"] for row in lines(made.path / "quarantine.jsonl")] == [2, 3, 6]


def test_every_loss_has_a_file_and_says_whether_it_compares_pairs(tmp_path: Path) -> None:
    """What is not KTO was once prepared for KTO: a loss of its own would have trained on the wrong rows."""
    assert methods.TRAIN.keys() == set(Method)
    assert {method.value: method.paired for method in Method} == {"dpo": True, "kto": False}
    jsonl(tmp_path / "rows.jsonl", [pku(1), pku(2)])
    for paired, columns in ((True, {"prompt", "chosen", "rejected"}), (False, {"prompt", "answer", "desirable"})):
        out = tmp_path / str(paired)
        out.mkdir()
        sources = Sources(path=tmp_path, digest="x", files={"steps.0": "rows.jsonl"})
        made = preferences.prepare(out, sources, "steps.0", Selection(metric="helpful", paired=paired), ALL)
        assert {column for row in lines(made.path / "train.jsonl") for column in row} == columns


def splits(made: Preferences) -> dict[str, str]:
    return {
        pair.prompt[0]["content"]: split
        for split in preferences.SPLITS
        for pair in preferences.pairs_of(made.path / f"{split}.jsonl")
    }


def test_new_rows_never_move_a_prompt_to_another_split(tmp_path: Path) -> None:
    rows = [pku(i) for i in range(400)]
    jsonl(tmp_path / "few.jsonl", rows[100:300])
    jsonl(tmp_path / "all.jsonl", rows[::-1])
    few, all_ = (splits(prepare(tmp_path / f"{n}.jsonl", tmp_path / n, config=Data())) for n in ("few", "all"))
    assert len(few) == 200 and len(all_) == 400
    assert all(all_[prompt] == split for prompt, split in few.items())
    shares = [list(all_.values()).count(split) / 400 for split in preferences.SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.05)
    assert splits(prepare(tmp_path / "all.jsonl", tmp_path / "salted", config=Data(salt="other"))) != all_


def test_all_pairs_of_a_prompt_share_its_split_however_it_is_spelled(tmp_path: Path) -> None:
    rows = [pku(i, prompt=text, response_0=f"{i} {j}") for i in range(60) for j, text in
            enumerate([f"Question {i} ?", f"question  {i} ?\n", f"QUESTION {i} ?"])]  # fmt: skip
    jsonl(tmp_path / "rows.jsonl", rows)
    found: dict[str, set[str]] = {}
    for prompt, split in splits(prepare(tmp_path / "rows.jsonl", tmp_path / "out", config=Data())).items():
        found.setdefault(" ".join(prompt.lower().split()), set()).add(split)
    assert len(found) == 60 and all(len(split) == 1 for split in found.values())


def test_limits_keep_the_same_rows_whatever_their_order(tmp_path: Path) -> None:
    rows = [pku(i) for i in range(400)]
    config = Data(heldout=10)
    jsonl(tmp_path / "forth.jsonl", rows)
    jsonl(tmp_path / "back.jsonl", rows[::-1])
    forth = prepare(tmp_path / "forth.jsonl", tmp_path / "forth", limit=50, config=config)
    back = prepare(tmp_path / "back.jsonl", tmp_path / "back", limit=50, config=config)
    assert forth.counts == back.counts == {"train": 50, "validation": 10, "test": 10, "quarantined": 0}
    assert splits(forth) == splits(back) and forth.digest != back.digest
    assert sum(card(forth)["over_the_limit"].values()) == 330
    kept = [int(prompt.split()[1]) for prompt, split in splits(forth).items() if split == "train"]
    assert kept == sorted(kept) and max(kept) > 100  # in their order, and not simply the first ones
    assert set(splits(prepare(tmp_path / "forth.jsonl", tmp_path / "more", limit=60, config=config))) > set(
        splits(forth)
    )


def test_no_file_and_no_row_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match=r"nowhere\.jsonl: no such data file"):
        prepare(tmp_path / "nowhere.jsonl", tmp_path / "none")
    jsonl(tmp_path / "rows.jsonl", [pku(0)])
    with pytest.raises(BadData, match=r"no row is left to train on; lower data\.validation and data\.test"):
        prepare(tmp_path / "rows.jsonl", tmp_path / "out", config=Data(validation=0.4999, test=0.5))


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", [pku(i) for i in range(20)])
    jsonl(tmp_path / "b.jsonl", [*(pku(i, unused=i) for i in range(20)), pku(3)])
    jsonl(tmp_path / "c.jsonl", [pku(i, response_0=f"zero {i} .") for i in range(20)])
    a, b, c = (prepare(tmp_path / f"{n}.jsonl", tmp_path / n, config=Data(bad_rows=0.1)) for n in "abc")
    assert a.digest == b.digest != c.digest


def test_rows_near_a_heldout_prompt_or_in_a_suite_are_dropped_and_named(tmp_path: Path) -> None:
    config = Data(validation=0, test=0.2, near_duplicates=0.7, contaminated=Contaminated.drop)

    def of_split(split: str, texts: list[str]) -> str:
        return next(t for t in texts if preferences.split_of([Message(role="user", content=t)], config) == split)

    held = of_split("test", [f"how do i clean lamp {i} of the ones that stand in my garden" for i in range(60)])
    near = of_split("train", [f"{held} , and {i}" for i in range(60)])
    other = "what is the tallest mountain"
    rows = [pku(0, prompt=held), pku(1, prompt=near), pku(2, prompt=other), *(pku(i) for i in range(3, 20))]
    (tmp_path / "suite.jsonl").write_text(json.dumps({"prompt": other.upper()}) + "\n")
    jsonl(tmp_path / "rows.jsonl", rows)
    files = {"steps.0": "rows.jsonl", "suite/harmless/test": "suite.jsonl"}
    sources = Sources(path=tmp_path, digest="x", files=files)
    (tmp_path / "out").mkdir()
    made = preferences.prepare(
        tmp_path / "out",
        sources,
        "steps.0",
        Selection(metric="harmless", paired=False, label="safer_response_id"),
        config,
    )
    data_card = card(made)
    became = data_card["rows_became"]
    assert (data_card["near_a_heldout_prompt"], data_card["inside_a_suite"]) == (1, 1)
    assert sum(became.values()) == 20 and made.counts["train"] == 2 * became["train"]
    assert [(row["row"], row["reason"]) for row in lines(made.path / "quarantine.jsonl")] == [
        (2, preferences.NEAR), (3, preferences.INSIDE),
    ]  # fmt: skip
    with pytest.raises(BadData, match="1 training rows have a prompt that stands in an evaluation suite"):
        refusing = config.model_copy(update={"contaminated": Contaminated.fail})
        preferences.prepare(tmp_path / "out", sources, "steps.0", Selection(metric="harmless", paired=True), refusing)


def test_a_system_message_moves_no_prompt_to_another_split(tmp_path: Path) -> None:
    config = Data(validation=0.3, test=0.3)
    jsonl(tmp_path / "plain.jsonl", [pku(i) for i in range(60)])
    jsonl(tmp_path / "behind.jsonl", [pku(i, system=f"You are assistant {i % 7}.") for i in range(60)])
    plain, behind = (prepare(tmp_path / f"{n}.jsonl", tmp_path / n, config=config) for n in ("plain", "behind"))

    def asked(made: Preferences) -> dict[str, str]:
        return {
            pair.prompt[-1]["content"]: split
            for split in preferences.SPLITS
            for pair in preferences.pairs_of(made.path / f"{split}.jsonl")
        }

    assert asked(plain) == asked(behind) and len(set(asked(plain).values())) == 3


def test_a_limit_on_the_training_rows_asks_for_no_heldout_log_probs_again(tmp_path: Path) -> None:
    config = Data(validation=0.3, test=0.3, near_duplicates=1)
    jsonl(tmp_path / "rows.jsonl", [pku(i) for i in range(60)])
    whole, few = (prepare(tmp_path / "rows.jsonl", tmp_path / f"{n}", n, config) for n in (0, 5))
    assert (len(lines(few.path / "train.jsonl")), few.counts["train"]) == (5, 5) and whole.counts["train"] > 5
    for splits, same in ((preferences.HELDOUT, True), (preferences.TRAIN, False), (preferences.SPLITS, False)):
        assert (content_of(whole.of(*splits)) == content_of(few.of(*splits))) is same, splits
    assert content_of(few.of(*preferences.SPLITS)) == content_of(few)
