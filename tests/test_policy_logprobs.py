"""From messages to token ids, and from token ids to the log-probs of an answer."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from models.alignment import fused_head, kto, reference
from models.artifacts import Policy, Preferences, Reference
from models.data import dialogue as tokens
from models.data import town
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy import generate, logprobs, shared_prompt
from models.policy import weights as policies
from models.policy.generate import Ask
from models.recipe import Compute, Step
from models.recipe import Evaluation as Decoding

Dialogues = list[tuple[str, str, str]]
PAD = 0
CHATML = (
    "{% for m in messages %}<s> {{ m['role'] }} : {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)
"""Ends every turn, the answer's too; `</s>` is EOS or not."""


def tokenizer(template: str = town.TEMPLATE, eos: str = "<eos>") -> PreTrainedTokenizerBase:
    found = town.tokenizer()
    found.add_special_tokens({"eos_token": eos, "additional_special_tokens": ["<s>", "</s>", "assistant", "user", ":"]})
    found.chat_template = template
    return found


def ask(*turns: str) -> list[tokens.Message]:
    """Messages of the user and the assistant in turn."""
    return [tokens.Message(role=("user", "assistant")[i % 2], content=text) for i, text in enumerate(turns)]


# Messages to ids


def test_the_prompt_is_what_the_template_writes_before_an_answer() -> None:
    plain, chat = tokenizer(), tokenizer(CHATML)
    assert tokens.prompt_texts(plain, [ask("how do i ?")]) == ["how do i ? "]
    assert tokens.prompt_texts(chat, [ask("how", "get", "do"), ask("i")]) == [
        "<s> user : how </s> <s> assistant : get </s> <s> user : do </s> <s> assistant : ",
        "<s> user : i </s> <s> assistant : ",
    ]
    assert tokens.prompt_texts(plain, []) == [] == tokens.encode(plain, [])


@pytest.mark.parametrize("eos", ["<eos>", "</s>"])
@pytest.mark.parametrize("template", [town.TEMPLATE, CHATML])
def test_an_answer_ends_with_one_eos_whatever_the_template_writes_after_it(template: str, eos: str) -> None:
    chosen = tokenizer(template, eos)
    encoded = tokens.encode(
        chosen, [(ask("how do i ?"), ["get the brush", "sorry ."]), (ask("how", "get", "do"), ["the"])]
    )
    assert [len(answers) for _, answers in encoded] == [2, 1]
    for (prompt, answers), texts in zip(encoded, [["get the brush", "sorry ."], ["the"]], strict=True):
        for ids, text in zip(answers, texts, strict=True):
            assert ids.count(chosen.eos_token_id) == 1 and ids[-1] == chosen.eos_token_id
            words = chosen.convert_ids_to_tokens(ids[:-1])
            ended = (
                ["</s>"] if template == CHATML and eos != "</s>" else []
            )  # a mark that is not EOS belongs to the answer
            assert words == text.split() + ended
        assert chosen.eos_token_id not in prompt or eos == "</s>"


def test_prompt_and_answers_are_each_tokenised_as_their_own_text() -> None:
    chosen = tokenizer(CHATML, "</s>")
    ((prompt, _),) = tokens.encode(chosen, [(ask("how do i ?"), ["get", "the"])])
    (text,) = tokens.prompt_texts(chosen, [ask("how do i ?")])
    assert prompt == chosen(text, add_special_tokens=False).input_ids
    assert chosen.convert_ids_to_tokens(prompt) == [
        "<s>",
        "user",
        ":",
        "how",
        "do",
        "i",
        "?",
        "</s>",
        "<s>",
        "assistant",
        ":",
    ]


def test_an_answer_that_the_template_moves_is_taken_as_it_stands() -> None:
    """Some templates strip earlier turns as soon as an answer follows; then the plain text is the answer."""
    moving = "{% if messages[-1]['role'] == 'assistant' %}{{ messages[-1]['content'] }} </s>{% else %}<s> {% endif %}"
    ((prompt, (answer,)),) = tokens.encode(tokenizer(moving), [(ask("how"), ["get the brush"])])
    chosen = tokenizer(moving)
    assert chosen.convert_ids_to_tokens(answer) == ["get", "the", "brush", "<eos>"]
    assert chosen.convert_ids_to_tokens(prompt) == ["<s>"]


def test_a_tokenizer_without_a_template_is_refused_with_a_remedy() -> None:
    bare = town.tokenizer()
    bare.chat_template = None
    with pytest.raises(BadPolicy, match="the tokenizer has no chat template; give one in the recipe"):
        tokens.encode(bare, [(ask("how"), ["get"])])


def test_a_policy_is_trained_on_the_very_ids_that_it_answers_to(policy: Policy, compute: Compute) -> None:
    model, words = policies.load(policy, compute)
    prompts = [ask("how do i clean my lamp ?"), ask("how do i ?")]
    trained = [prompt for prompt, _ in tokens.encode(words, [(prompt, []) for prompt in prompts])]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        seen.append((inputs["input_ids"], inputs["attention_mask"]))

    hook = model.model.register_forward_pre_hook(note, with_kwargs=True)
    texts = tokens.prompt_texts(words, prompts)
    answers = dict(generate.answer(model, words, list(map(Ask, texts)), Decoding(max_new_tokens=3, batch=2), seed=0))
    hook.remove()
    ids, mask = seen[0]
    answered = [
        [i for i, kept in zip(*row, strict=True) if kept] for row in zip(ids.tolist(), mask.tolist(), strict=True)
    ]
    assert sorted(answered) == sorted(trained) and set(answers) == {0, 1}


def test_ids_survive_the_disk(policy: Policy) -> None:
    loaded = AutoTokenizer.from_pretrained(policy.path)
    dialogue = [(ask("how do i clean my lamp ?"), ["get the brush ."])]
    assert tokens.encode(loaded, dialogue) == tokens.encode(town.tokenizer(), dialogue)


# What the log-probs count (science 8.21)


def test_only_the_answer_and_its_eos_count(policy: Policy, compute: Compute) -> None:
    """By hand: the full log-softmax of one row, summed over the positions that predict the answer."""
    model, tokenizer = policies.load(policy, compute)
    prompt, answer = tokenizer("how do i").input_ids, [*tokenizer("get the brush").input_ids, tokenizer.eos_token_id]
    table = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    by_hand = sum(table[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
    assert logprobs.answer_logps(model, [(prompt, [answer])], PAD).item() == pytest.approx(by_hand, abs=1e-5)


def test_batching_padding_and_order_change_no_log_prob(policy: Policy, scored: Reference, compute: Compute) -> None:
    model, _ = policies.load(policy, compute)
    rows = list(jsonl.read(scored.path / "train.jsonl"))
    alone = [logprobs.pair_logps(model, [row], PAD)[0] for row in rows]
    together, backwards = (logprobs.pair_logps(model, ordered_rows, PAD) for ordered_rows in (rows, rows[::-1]))
    longest = logprobs.answer_logps(model, [(r["prompt_ids"], [r["chosen_ids"]]) for r in rows], PAD).tolist()
    for one, two, three, long, row in zip(alone, together, backwards[::-1], longest, rows, strict=True):
        assert one == pytest.approx(two, abs=1e-5) and one == pytest.approx(three, abs=1e-5)
        assert one == pytest.approx((row["ref_chosen_logps"], row["ref_rejected_logps"]), abs=1e-5)
        assert one[0] == pytest.approx(long, abs=1e-5)


def test_padding_on_either_side_changes_no_log_prob_of_the_training_head(policy: Policy, compute: Compute) -> None:
    """The head that training uses finds the answer by its labels, wherever the padding lies."""
    model, tokenizer = policies.load(policy, compute)
    fused_head.add(model)
    words = tokenizer("how do i clean my lamp ?").input_ids
    labels, found = [-100] * 3 + words[3:], []
    for left, right in ((0, 0), (0, 4), (4, 0), (2, 3)):
        ids = torch.tensor([[PAD] * left + words + [PAD] * right])
        target = torch.tensor([[-100] * left + labels + [-100] * right])
        mask = torch.tensor([[0] * left + [1] * len(words) + [0] * right])
        place = torch.arange(ids.shape[1])[None] - left
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": place.clamp(min=0), "labels": target}
        output = model(**inputs, fused_lm_head=True)
        found.append(output.log_probs.sum().item())
    assert found == pytest.approx([found[0]] * 4, abs=1e-5)


def test_a_uniform_policy_gives_minus_t_ln_v(policy: Policy, compute: Compute) -> None:
    model, tokenizer = policies.load(policy, compute)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = logprobs.answer_logps(model, [([3, 4], [[5] * t]) for t in (1, 2, 7)], PAD).tolist()
    assert found == pytest.approx([-t * math.log(len(tokenizer)) for t in (1, 2, 7)], rel=1e-6)


def test_a_pair_that_is_too_long_is_dropped_whole_and_named(
    policy: Policy, dialogues: Dialogues, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    pairs = Preferences(path=scored.path.parent / "pairs", digest="x", metric="harmless", counts={})
    tokens = [len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in
              jsonl.read(scored.path / "train.jsonl")]  # fmt: skip
    most = sorted(tokens)[len(tokens) // 2]
    kept = reference.score(tmp_path, policy, pairs, ["train"], most, compute)
    fit = sum(n <= most for n in tokens)
    assert kept.counts == {"train": fit, "dropped": len(tokens) - fit} and 0 < fit < len(tokens)
    prompts = [row["prompt"][-1]["content"] for row in jsonl.read(pairs.path / "train.jsonl")]
    assert list(jsonl.read(tmp_path / "too_long.jsonl")) == [
        {"split": "train", "line": line, "tokens": n, "prompt": prompts[line - 1]}
        for line, n in enumerate(tokens, 1)
        if n > most
    ]
    assert all(row["chosen_ids"][-1] == row["rejected_ids"][-1] == 1 for row in jsonl.read(tmp_path / "train.jsonl"))
    with pytest.raises(BadData, match=r"no pair of harmless fits into data.max_tokens = 8"):
        reference.score(tmp_path, policy, pairs, ["train"], 8, compute)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_rows_that_a_template_refuses_are_left_out_and_named(
    method: str, policy: Policy, scored: Reference, compute: Compute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's, Mistral's and Llama 2's want user and assistant in turn; a long training may lie behind us."""
    pairs = scored.path.parent / "pairs" / "train.jsonl"
    rows = list(jsonl.read(pairs))[:20]
    rows[1]["prompt"] = [*rows[1]["prompt"], *rows[1]["prompt"]]
    rows[4]["prompt"] = [{"role": "system", "content": "get"}, *rows[4]["prompt"]]
    if method == "kto":
        rows = [{"prompt": r["prompt"], "answer": r["chosen"], "desirable": i % 2 == 0} for i, r in enumerate(rows)]
    jsonl.write(tmp_path / "train.jsonl", rows)
    strict = "{% if messages[0].role != 'user' or messages|length > 2 %}{{ raise_exception('in turn') }}{% endif %}"
    real = reference.load

    def load(policy: Policy, compute: Compute) -> Any:
        model, tokenizer = real(policy, compute)
        tokenizer.chat_template = strict + tokenizer.chat_template
        return model, tokenizer

    monkeypatch.setattr(kto if method == "kto" else reference, "load", load)
    made = Preferences(path=tmp_path, digest="x", metric="harmless", counts={})
    (tmp_path / "out").mkdir()
    if method == "kto":
        step = Step(metric="harmless", method="kto", data="town", batch=8)
        kept = kto.score(tmp_path / "out", policy, made, step.training, 0, 512, compute)
    else:
        kept = reference.score(tmp_path / "out", policy, made, ["train"], 512, compute)
    assert kept.counts["train"] == len(rows) - 2 and kept.counts["dropped"] == 2
    named = list(jsonl.read(tmp_path / "out" / "unwritable.jsonl"))
    assert [(row["split"], row["line"]) for row in named] == [("train", 2), ("train", 5)]
    assert all("cannot write these messages: in turn" in row["why"] and row["prompt"] for row in named)
    assert json.loads((tmp_path / "out" / "card.json").read_text())["dropped_as_unwritable"] == 2


def test_heldout_pairs_that_are_all_too_long_stop_a_run_before_it_trains(
    policy: Policy, scored: Reference, compute: Compute, tmp_path: Path
) -> None:
    """The base scores the held-out pairs first."""
    pairs = Preferences(path=tmp_path, digest="x", metric="harmless", counts={})
    shutil.copy(scored.path.parent / "pairs" / "train.jsonl", tmp_path / "test.jsonl")
    (tmp_path / "validation.jsonl").touch()
    (tmp_path / "out").mkdir()
    with pytest.raises(BadData, match=r"no pair of harmless fits into data.max_tokens = 8; raise it, or give shorter"):
        reference.score(tmp_path / "out", policy, pairs, ["validation", "test"], 8, compute)


def test_the_card_tells_how_long_the_rows_are(policy: Policy, scored: Reference) -> None:
    assert reference.histogram([0, 1, 2, 3, 16, 17, 32, 33]) == {
        "0–1": 2,
        "2–2": 1,
        "3–4": 1,
        "9–16": 1,
        "17–32": 2,
        "33–64": 1,
    }
    card = json.loads((scored.path / "card.json").read_text())
    rows = list(jsonl.read(scored.path / "train.jsonl"))
    assert card["dropped_as_too_long"] == 0
    for side in ("prompt", "chosen", "rejected"):
        assert card["tokens"]["train"][side] == reference.histogram(len(row[f"{side}_ids"]) for row in rows)


@pytest.mark.parametrize("comparisons", [False, True])
def test_our_head_equals_trls_in_values_and_gradients(comparisons: bool, policy: Policy, compute: Compute) -> None:
    """On any labels; and on a batch of comparisons of unequal lengths, whose prompts are computed once."""
    from trl.trainer.utils import add_fused_lm_head

    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (6, 20), generator=draw)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.4, -100)
    attended = torch.ones_like(ids)
    if comparisons:
        ids[3:, :8] = ids[:3, :8]
        prompts, ends = torch.tensor([3, 8, 5] * 2), torch.tensor([9, 20, 6, 14, 11, 20])
        attended = (torch.arange(20) < ends[:, None]).long()
        labels = ids.masked_fill((torch.arange(20) < prompts[:, None]) | (attended == 0), -100)
        assert len(fused_head.comparisons(labels, ids, attended)) == 3
    fields = ("loss", "log_probs", "entropy", "mean_logits", "is_top1", "label_mask")
    found = []
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    for add in (fused_head.add, lambda model: add_fused_lm_head(model, outputs=outputs)):
        model, _ = policies.load(policy, compute)
        add(model)
        output = model(input_ids=ids, attention_mask=attended, labels=labels, fused_lm_head=True)
        (output.log_probs * torch.linspace(-1, 1, output.log_probs.numel()).view_as(output.log_probs)).sum().backward()
        found.append(([getattr(output, name) for name in fields], [p.grad for p in model.parameters()]))
        assert torch.equal(model(input_ids=ids).logits, policies.load(policy, compute)[0](input_ids=ids).logits)
    (ours, our_slopes), (theirs, their_slopes) = found
    assert [name for name, value in zip(fields, ours, strict=True) if value.requires_grad] == ["loss", "log_probs"]
    for name, a, b in zip(fields, ours, theirs, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for a, b in zip(our_slopes, their_slopes, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
    ],
)
def test_a_policy_that_scales_or_caps_its_logits_is_scored_as_it_answers(kind: str, settings: dict[str, float]) -> None:
    """Gemma 2 caps its logits, Granite and Cohere scale them, after the output embedding."""
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, initializer_range=1.0, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt, answer = [5, 6, 7], [8, 9, 10, 11]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        own = model(input_ids=ids).logits[0].float().log_softmax(-1)
        by_hand = sum(own[len(prompt) + t - 1, token].item() for t, token in enumerate(answer))
        assert logprobs.answer_logps(model, [(prompt, [answer])], PAD).item() == pytest.approx(by_hand, abs=1e-4)
        fused_head.add(model)
        labels = torch.tensor([[-100] * len(prompt) + answer])
        assert model(input_ids=ids, labels=labels, fused_lm_head=True).log_probs.sum().item() == pytest.approx(
            by_hand, abs=1e-4
        )


@pytest.mark.parametrize("kind", shared_prompt.ARCHITECTURES)
@pytest.mark.parametrize("heads", [4, 2])
def test_a_shared_prompt_changes_no_log_prob_and_no_gradient(kind: str, heads: int) -> None:
    """Chosen and rejected in one row behind their prompt, against one row for each."""
    config = AutoConfig.for_model(
        kind, vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=heads, pad_token_id=0, initializer_range=0.3, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(1)
    groups = [
        tuple(torch.randint(1, 50, (n,), generator=draw).tolist() for n in lengths)
        for lengths in ((5, 3, 7), (1, 9, 1), (12, 1, 4))
    ]
    assert shared_prompt.supports(model)
    alone = torch.cat([logprobs.answer_logps(model, [(p, [a]) for a in answers], PAD) for p, *answers in groups])
    together = logprobs.answer_logps(model, [(p, answers) for p, *answers in groups], PAD)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    slopes = [torch.autograd.grad((v * torch.arange(6)).sum(), list(model.parameters())) for v in (alone, together)]
    for a, b in zip(*slopes, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_an_architecture_with_a_window_gets_one_row_per_answer() -> None:
    config = AutoConfig.for_model(
        "mistral", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, pad_token_id=0, initializer_range=0.3, sliding_window=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not shared_prompt.supports(model)
    prompt, answers = [4, 5, 6, 7, 8], [[9, 10, 11, 12], [13, 14]]
    alone = [logprobs.answer_logps(model, [(prompt, [answer])], PAD).item() for answer in answers]
    assert logprobs.answer_logps(model, [(prompt, answers)], PAD).tolist() == pytest.approx(alone, abs=1e-5)


def test_the_training_head_finds_the_comparisons_of_a_batch() -> None:
    """Row i + n answers the prompt of row i; padding on either side, and other batches, are seen as what they are."""
    ids = torch.tensor([[3, 4, 5, 6], [0, 7, 8, 9], [3, 4, 5, 0], [7, 8, 0, 0]])
    labels = torch.tensor([[-100, -100, 5, 6], [-100, -100, 8, 9], [-100, -100, 5, -100], [-100, 8, -100, -100]])
    found = fused_head.comparisons(labels, ids, ids != 0)
    assert found == [([3, 4], [[5, 6], [5]]), ([7], [[8, 9], [8]])]
    assert fused_head.comparisons(labels[[0, 1, 3, 2]], ids[[0, 1, 3, 2]], ids[[0, 1, 3, 2]] != 0) == []
    assert fused_head.comparisons(labels[:3], ids[:3], ids[:3] != 0) == []
    labels[0, 0] = 3
    assert fused_head.comparisons(labels, ids, ids != 0) == []
