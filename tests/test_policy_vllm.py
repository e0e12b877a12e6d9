"""Answers from vLLM: those of transformers, token for token; what is sent to its interpreter, and what comes back."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from models.artifacts import Memory, Policy, Sources, content_digest
from models.data import dialogue, town
from models.data.prompts import ask
from models.errors import BadPolicy, BadRecipe, SacpoError
from models.policy import generate, vllm
from models.policy import weights as policies
from models.policy.answers import answer, answers_to
from models.policy.generate import Answer, Ask
from models.preflight import refuse
from models.recipe import Compute, Engine, Evaluation
from tasks.work.store import content_of

PROMPTS = [
    f"how do i {v} my {t} ?" for v in ("clean", "open", "sell", "tow", "hide") for t in ("lamp", "old boat", "x")
]
needs_vllm = pytest.mark.skipif(bool(vllm.problem()), reason=f"no vllm: {vllm.VARIABLE} names none")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The town's Llama with heads of 32: vLLM's CPU attention knows none of 16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("wide"), town.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.08, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    policies.save(LlamaForCausalLM(config), tokenizer, folder)
    return policies.describe(folder, Policy(path=folder, digest="", name="base", kind="base"))


def asks(policy: Policy, compute: Compute) -> tuple[list[Ask], Any, Any]:
    model, tokenizer = policies.load(policy, compute)
    texts = dialogue.prompt_texts(tokenizer, [[dialogue.Message(role="user", content=prompt)] for prompt in PROMPTS])
    return [Ask(text) for text in texts], model, tokenizer


def by_vllm(policy: Policy, tokenizer: Any, asked: list[Ask], config: Evaluation, seed: int = 0) -> dict[int, Answer]:
    return dict(vllm.answer(policy.path, tokenizer, asked, config, seed, "cpu"))


@needs_vllm
@pytest.mark.parametrize("stop", [[], ["glue", "o"]])
def test_vllm_answers_as_transformers_do(wide: Policy, compute: Compute, stop: list[str]) -> None:
    """Greedy, in float32, token for token, but after a step whose two largest logits nearly tie; ties are the same."""
    asked, model, tokenizer = asks(wide, compute)
    config = Evaluation(max_new_tokens=40, stop=stop, batch=4)
    ours = dict(generate.answer(model, tokenizer, asked, config, 0))
    theirs = by_vllm(wide, tokenizer, asked, config)
    assert theirs.keys() == ours.keys()
    for i, one in ours.items():
        same = len(one.ids) if one.tie < 0 else one.tie
        assert theirs[i].ids[:same] == one.ids[:same] and theirs[i].tie == one.tie
        assert one.tie >= 0 or theirs[i].text == one.text
    ended = [one.ids[-1] == tokenizer.eos_token_id for one in theirs.values()]
    assert stop or (any(ended) and not all(ended))  # those that ended hold their EOS
    assert not any(word in one.text for one in theirs.values() for word in stop)


@needs_vllm
def test_samples_of_vllm_follow_from_prompt_and_sample(wide: Policy, compute: Compute) -> None:
    asked, _, tokenizer = asks(wide, compute)
    config = Evaluation(max_new_tokens=12, temperature=1.0)
    asked = [*asked, Ask(asked[0].prompt, 1), Ask(asked[0].prompt, 2)]
    all_of_them = by_vllm(wide, tokenizer, asked, config)
    assert by_vllm(wide, tokenizer, asked[-1:], config)[0] == all_of_them[len(asked) - 1]
    assert len({tuple(all_of_them[i].ids) for i in (0, len(asked) - 2, len(asked) - 1)}) == 3


@needs_vllm
def test_a_policy_that_vllm_cannot_run_is_told_in_one_line(policy: Policy, compute: Compute) -> None:
    asked, _, tokenizer = asks(policy, compute)
    with pytest.raises(BadPolicy, match=r"vLLM cannot answer with it: RuntimeError: .*head_dim=16"):
        by_vllm(policy, tokenizer, asked, Evaluation(max_new_tokens=2))
    with pytest.raises(BadPolicy, match="this vLLM computes on cpu, the recipe on xpu"):
        list(vllm.answer(policy.path, tokenizer, asked, Evaluation(), 0, "xpu"))


@needs_vllm
def test_a_stage_answers_by_vllm_and_asks_nothing_twice(wide: Policy, compute: Compute, tmp_path: Path) -> None:
    from models.files import jsonl

    jsonl.write(tmp_path / "helpful.jsonl", [{"prompt": prompt, "category": ""} for prompt in PROMPTS[:5]])
    files = {"suite/helpful/test": str(tmp_path / "helpful.jsonl")}
    sources = Sources(path=tmp_path, digest=content_digest(files), files=files)
    config = Evaluation(max_new_tokens=8, engine=Engine.vllm, batch=2)
    memory = Memory(tmp_path / "answers.db")
    prompts = ask(tmp_path, sources, [], "test", 16, 64)
    made = answer(tmp_path, wide, prompts, config.decoding(0), compute, memory)
    assert len(list(jsonl.read(made.path / "answers.jsonl"))) == 5 and not (tmp_path / "progress.jsonl").exists()
    turns = [(dialogue.messages(prompt), 0) for prompt in PROMPTS[:5]]
    assert len(answers_to(wide, None, turns, config.decoding(0), compute, memory, tmp_path)) == 5


# Without vLLM


def test_engines_keep_their_own_answers() -> None:
    plain_one = Evaluation()
    by = plain_one.model_copy(update={"engine": Engine.vllm})
    assert generate.decoding_key(by, 0, "cpu float32") != generate.decoding_key(plain_one, 0, "cpu float32")
    assert content_of(by)["engine"] == "vllm" and Evaluation.model_validate(content_of(by)) == by


def test_an_engine_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(Evaluation())
    for nowhere in ("/nowhere/python", "/bin/false"):
        monkeypatch.setenv(vllm.VARIABLE, nowhere)
        with pytest.raises(BadRecipe) as raised:
            refuse(Evaluation(engine=Engine.vllm))
        (line,) = str(raised.value).splitlines()
        assert line.startswith(f"evaluation.engine: '{nowhere}' holds no vllm; install it in an environment of its own")
        assert "set SACPO_VLLM_PYTHON to" in line


@pytest.mark.parametrize(
    ("python", "error", "said"),
    [("/bin/false", SacpoError, "vLLM's process ended with 1; the same command goes on"),
     (sys.executable, BadPolicy, "cannot answer with it: ModuleNotFoundError: No module named 'vllm'")],
)  # fmt: skip
def test_a_process_that_ends_is_told(
    python: str, error: type[Exception], said: str, policy: Policy, compute: Compute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(vllm.VARIABLE, python)
    asked, _, tokenizer = asks(policy, compute)
    with pytest.raises(error, match=said):
        by_vllm(policy, tokenizer, asked, Evaluation())


def test_what_is_sent_and_what_is_made_of_the_reply(
    policy: Policy, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in the place of the interpreter keeps what it reads, and says what vLLM would say."""
    asked, _, tokenizer = asks(policy, compute)
    words = tokenizer("get the lever then")["input_ids"]
    eos = tokenizer.eos_token_id
    replies = [
        {"index": 1, "ids": [*words, eos], "gaps": [1.0, 5e-5, 2.0, 0.0, 1.0]},
        {"index": 0, "ids": words, "gaps": []},
    ]
    (tmp_path / "replies").write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\ncat > {tmp_path}/seen\ncat {tmp_path}/replies\n')
    program.chmod(0o755)
    monkeypatch.setenv(vllm.VARIABLE, str(program))
    config = Evaluation(max_new_tokens=400, temperature=0.5, stop=["lever"])
    answers = by_vllm(policy, tokenizer, asked[:2], config, seed=7)
    assert list(answers) == [1, 0]
    assert answers[1] == Answer("get the", [*words, eos][:4], 1) and answers[0] == Answer("get the", words, -1)
    settings, *rows = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert settings["window"] == 64 and settings["ends"] == [eos] and settings["stop"] == ["lever"]  # 64: the town's
    assert rows == [
        {"index": i, "ids": tokenizer(ask.prompt)["input_ids"], "seed": generate.noise_seed(7, ask)}
        for i, ask in enumerate(asked[:2])
    ]
    assert (tmp_path / "called").read_text().split() == ["-I", str(vllm.WORKER)]
    (tmp_path / "replies").write_text(json.dumps(replies[0]) + "\n")
    with pytest.raises(SacpoError, match="ended with 0"):
        by_vllm(policy, tokenizer, asked[:2], config)
