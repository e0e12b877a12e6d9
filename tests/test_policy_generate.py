"""Answers: the same in a batch as alone, kept by content, never drawn twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Answers, Memory, Policy, Sources, content_digest
from models.data import dialogue, prompts
from models.files import jsonl
from models.policy import answers as answering
from models.policy import generate
from models.policy import weights as policies
from models.policy.answer_cache import AnswerTable
from models.policy.answers import answer
from models.policy.generate import Answer, Ask
from models.recipe import Compute, Evaluation

PROMPTS = [f"how do i {verb} my {thing} ?" for verb in ("clean", "open", "sell") for thing in ("lamp", "old boat", "x")]


def asks(policy: Policy, compute: Compute) -> tuple[list[Ask], object, object]:
    model, tokenizer = policies.load(policy, compute)
    turns = [[dialogue.Message(role="user", content=prompt)] for prompt in PROMPTS]
    return [Ask(text) for text in dialogue.prompt_texts(tokenizer, turns)], model, tokenizer


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_answers_as_one_prompt_alone_does(policy: Policy, compute: Compute, temperature: float) -> None:
    """Token for token in float32, but after a step whose two largest logits nearly tie (science 8.36)."""
    asked, model, tokenizer = asks(policy, compute)
    config = Evaluation(max_new_tokens=24, temperature=temperature, batch=len(asked))
    together = dict(generate.answer(model, tokenizer, asked, config, 3))
    for i, ask in enumerate(asked):
        ((_, alone),) = generate.answer(model, tokenizer, [ask], config, 3)
        same = len(alone.ids) if alone.tie < 0 else alone.tie
        assert together[i].ids[:same] == alone.ids[:same]
    assert len({tuple(one.ids) for one in together.values()}) > 3
    assert all(one.tie == -1 for one in together.values())


def test_ties_are_seen(policy: Policy, compute: Compute, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, model, tokenizer = asks(policy, compute)
    config = Evaluation(max_new_tokens=6)
    ((_, plain),) = generate.answer(model, tokenizer, asked[:1], config, 0)
    monkeypatch.setattr(generate, "NEAR_TIE", 1e9)
    ((_, answer),) = generate.answer(model, tokenizer, asked[:1], config, 0)
    assert (plain.tie, answer.tie) == (-1, 0) and plain.ids == answer.ids


def test_an_answer_ends_before_a_stop_string_and_never_at_a_blank_line(policy: Policy, compute: Compute) -> None:
    asked, model, tokenizer = asks(policy, compute)
    config = Evaluation(max_new_tokens=24, batch=4)
    free = dict(generate.answer(model, tokenizer, asked, config, 0))
    word = free[0].text.split()[3]
    stopped = dict(generate.answer(model, tokenizer, asked, config.model_copy(update={"stop": [word]}), 0))
    for i in free:
        whole = tokenizer.decode(free[i].ids, skip_special_tokens=True)
        assert stopped[i].text == whole.partition(word)[0].strip()
        assert stopped[i].ids == free[i].ids[: len(stopped[i].ids)]
    assert stopped[0].text != free[0].text and len(stopped[0].ids) == 4
    ids = tokenizer("clean\n\nlamp")["input_ids"]
    text, kept = generate.cut_at_end(tokenizer, [*ids, tokenizer.eos_token_id, 5], [], [tokenizer.eos_token_id])
    assert kept == [*ids, tokenizer.eos_token_id] and text == tokenizer.decode(ids)


def test_an_answer_ends_where_the_model_and_its_template_end_a_turn(policy: Policy, compute: Compute) -> None:
    """Of some models that is another token than EOS; who was not aligned here would go on with the next turns."""
    asked, model, tokenizer = asks(policy, compute)
    eos, unknown = tokenizer.eos_token_id, tokenizer.unk_token_id
    config = Evaluation(max_new_tokens=24, batch=4)
    free = dict(generate.answer(model, tokenizer, asked, config, 0))
    word = free[0].ids[3]
    for own, last in ((None, [eos]), (eos, [eos]), (word, [eos, word]), ([word, eos], [eos, word])):
        assert generate.ends(tokenizer, own, []) == last
        model.generation_config.eos_token_id = own
        for i, one in generate.answer(model, tokenizer, asked, config, 0):
            end = next((place for place, token in enumerate(free[i].ids) if token in last), len(free[i].ids))
            assert one.ids == free[i].ids[: end + 1]
            assert one.text == tokenizer.decode(free[i].ids[:end], skip_special_tokens=True).strip()
    assert generate.ends(tokenizer, None, ["the", tokenizer.unk_token]) == [eos, unknown]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}<unk> {% endfor %}"
    assert generate.ends(tokenizer, None, []) == [eos, unknown]
    tokenizer.chat_template += "{% if add_generation_prompt %}how {% endif %}"  # as one that begins a thought
    assert generate.ends(tokenizer, None, []) == [eos, unknown]


def test_where_a_turn_ends_is_read_from_the_folder_as_it_is_from_the_model(policy: Policy, tmp_path: Path) -> None:
    for name, own in (("config.json", 7), ("generation_config.json", [1, 7])):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": own}))
        assert policies.own_eos_ids(tmp_path) == own
    assert policies.own_eos_ids(tmp_path / "nothing") is None


def test_samples_of_one_prompt_differ_and_do_not_depend_on_each_other(policy: Policy, compute: Compute) -> None:
    asked, model, tokenizer = asks(policy, compute)
    config = Evaluation(max_new_tokens=12, temperature=1.0)
    three = dict(generate.answer(model, tokenizer, [Ask(asked[0].prompt, k) for k in range(3)], config, 0))
    ((_, last),) = generate.answer(model, tokenizer, [Ask(asked[0].prompt, 2)], config, 0)
    assert three[2] == last and len({tuple(one.ids) for one in three.values()}) == 3


def test_the_table_tells_policies_settings_prompts_and_samples_apart(tmp_path: Path) -> None:
    table = AnswerTable(tmp_path / "a.db", "policy", "greedy")
    ask, answer = Ask("how ?"), Answer("so\n\nand so", [1, 2, 3], 1)
    table.add([(ask, answer), (Ask("why ?"), answer._replace(text="because"))])
    assert table.stored([Ask("what ?"), ask, Ask("how ?", 1), Ask("why ?")]) == {
        1: answer,
        3: answer._replace(text="because"),
    }
    assert not AnswerTable(table.path, "other", "greedy").stored([ask])
    assert not AnswerTable(table.path, "policy", "sampled").stored([ask])
    config = Evaluation(temperature=1)
    names = [
        generate.decoding_key(config, 0, "cpu float32"),
        generate.decoding_key(config, 1, "cpu float32"),
        generate.decoding_key(config, 0, "cuda bfloat16"),
        generate.decoding_key(config.model_copy(update={"stop": ["x"]}), 0, "cpu float32"),
        generate.decoding_key(config.model_copy(update={"max_new_tokens": 3}), 0, "cpu float32"),
        generate.decoding_key(config.model_copy(update={"temperature": 0.0}), 0, "cpu float32"),
    ]
    assert len(set(names)) == len(names)
    greedy = config.model_copy(update={"temperature": 0.0, "batch": 3})
    assert generate.decoding_key(greedy, 7, "cpu float32") == names[-1]


def test_answers_of_another_library_are_not_taken_for_ours(
    policy: Policy, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialogues: list[tuple[list[dialogue.Message], int]] = [
        ([{"role": "user", "content": "how do i open my lamp ?"}], 0)
    ]
    config, memory = Evaluation(max_new_tokens=4), Memory(tmp_path / "a.db")
    drawn: list[int] = []
    draw = generate.answer

    def counted(model: Any, tokenizer: Any, missing: Any, *rest: Any) -> Any:
        drawn.append(len(missing))
        return draw(model, tokenizer, missing, *rest)

    monkeypatch.setattr(generate, "answer", counted)
    for libraries in (generate.libraries(), generate.libraries(), "torch 1.0 transformers 1.0"):
        monkeypatch.setattr(generate, "libraries", lambda text=libraries: text)
        answering.answers_to(
            policy, policies.load(policy, compute), dialogues, config.decoding(0), compute, memory, tmp_path
        )
    assert drawn == [1, 0, 1]


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    """Two suites that share a prompt; one prompt is a dialogue."""
    turns = [
        {"role": "user", "content": "how do i open my lamp ?"},
        {"role": "assistant", "content": "get the lever ."},
    ]
    rows = {
        "helpful": [{"prompt": p, "category": "c"} for p in PROMPTS],
        "over_refusal": [
            {"prompt": PROMPTS[0], "category": ""},
            {"prompt": [*turns, {"role": "user", "content": "my lamp ?"}], "category": ""},
        ],
    }
    for role, rows_of_role in rows.items():
        jsonl.write(tmp_path / f"{role}.jsonl", rows_of_role)
    files = {f"suite/{role}/test": str(tmp_path / f"{role}.jsonl") for role in rows}
    return Sources(path=tmp_path, digest=content_digest(rows), files=files)


def test_a_killed_run_goes_on_after_its_last_batch(
    policy: Policy, compute: Compute, sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is generated twice, by a later run or for another suite, and the result is the same."""
    config = Evaluation(max_new_tokens=8, batch=3)
    drawn: list[Ask] = []
    whole = generate.answer

    def counted(model, tokenizer, asked, config, seed):  # type: ignore[no-untyped-def]
        for i, one in whole(model, tokenizer, asked, config, seed):
            drawn.append(asked[i])
            if len(drawn) == stop_at:
                raise KeyboardInterrupt
            yield i, one

    monkeypatch.setattr(generate, "answer", counted)

    def answers(name: str) -> Answers:
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        memory = Memory(tmp_path / f"{name}.db")
        asked = prompts.ask(out, sources, [], "test", 16, 64)
        return answer(out, policy, asked, config.decoding(0), compute, memory)

    stop_at = -1
    straight = answers("straight")
    assert len(drawn) == len(PROMPTS) + 1  # one prompt stands in both suites
    assert [*answers("straight").path.iterdir()] and len(drawn) == len(PROMPTS) + 1
    drawn.clear()
    stop_at = 5  # in the second batch: the first is kept
    with pytest.raises(KeyboardInterrupt):
        answers("killed")
    drawn.clear()
    stop_at = -1
    assert answers("killed").digest == straight.digest and len(drawn) == len(PROMPTS) + 1 - 3
    rows = [json.loads(line) for line in (straight.path / "answers.jsonl").read_text().splitlines()]
    assert [row["suite"] for row in rows] == ["helpful"] * len(PROMPTS) + ["over_refusal"] * 2
    assert rows[0]["answer"] == rows[len(PROMPTS)]["answer"] and rows[-1]["prompt"][-1]["content"] == "my lamp ?"


def test_a_caller_who_stops_asking_leaves_the_model_as_it_was(policy: Policy, compute: Compute) -> None:
    asked, model, tokenizer = asks(policy, compute)
    own = model.generation_config
    generated = generate.answer(model, tokenizer, asked, Evaluation(max_new_tokens=2, batch=1), 0)
    next(generated)
    assert model.generation_config is not own
    generated.close()
    assert model.generation_config is own
