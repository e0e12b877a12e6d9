"""A step in which nothing can be learnt stops with a sentence: its loss stays at ln 2, and looks like a start."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from models.alignment import dpo, sft
from models.artifacts import Policy, Reference, Sources
from models.data import town
from models.errors import BrokenInvariant
from models.policy import weights as policies
from models.recipe import Compute, Data, Sft, Step

Dialogues = list[tuple[str, str, str]]
Scorer = Callable[[Policy, Dialogues, Path], Reference]
SETTINGS = {"batch": 8, "updates": 4, "learning_rate": 1e-2, "warmup": 0}
DROPPING = "{% for m in messages if m.role != 'assistant' %}{{ m.content }} {% endfor %}"


def step(method: str = "dpo") -> Step:
    return Step.model_validate({"metric": "harmless", "data": "town", "method": method, **SETTINGS})


def with_template(template: str, folder: Path) -> Policy:
    folder.mkdir()
    tokenizer = town.tokenizer()
    tokenizer.chat_template = template
    policies.save(town.untrained(0, tokenizer), tokenizer, folder)
    return policies.describe(folder, Policy(path=folder, digest="", name="base", kind="base"))


def refused(policy: Policy, scored: Reference, compute: Compute, out: Path) -> str:
    out.mkdir()
    with pytest.raises(BrokenInvariant) as raised:
        dpo.train(out, policy, scored, step().objective(0.1, 1.0), step().training, 0, compute)
    assert raised.value.exit_code == 3 and "\n" not in str(raised.value)
    assert not list(out.glob("*.safetensors"))
    return str(raised.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (DROPPING, "harmless step: no answer holds a token to learn from"),
        (DROPPING + "{% if not add_generation_prompt %}get{% endif %}", "chosen and rejected are the same tokens"),
    ],
    ids=["nothing", "the same for all"],
)
def test_a_template_that_drops_the_answer_trains_nothing(
    template: str, said: str, dialogues: Dialogues, compute: Compute, reference_of: Scorer, tmp_path: Path
) -> None:
    policy = with_template(template, tmp_path / "policy")
    scored = reference_of(policy, dialogues, tmp_path / "scored")
    assert said in refused(policy, scored, compute, tmp_path / "out")


def test_the_supervised_step_needs_answers_too(compute: Compute, tmp_path: Path) -> None:
    policy = with_template(DROPPING, tmp_path / "policy")
    rows = [{"prompt": "how do i clean my lamp ?", "completion": "get the brush ."}] * 8
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"})
    (tmp_path / "out").mkdir()
    with pytest.raises(BrokenInvariant, match="sft: no answer holds a token"):
        sft.train(tmp_path / "out", policy, sources, Sft(data="c", **SETTINGS), Data(), 0, compute)


def test_a_gradient_of_zero_ends_the_first_update(
    dialogues: Dialogues, compute: Compute, reference_of: Scorer, tmp_path: Path
) -> None:
    """A base whose embeddings are all zero writes every token with the same probability, and can learn nothing."""
    policy = with_template(town.TEMPLATE, tmp_path / "policy")
    file = policy.path / "model.safetensors"
    weights = {n: t * 0 if "embed" in n or "lm_head" in n else t for n, t in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    policy = policies.describe(policy.path, policy)
    scored = reference_of(policy, dialogues, tmp_path / "scored")
    assert "update 1: the gradient is zero" in refused(policy, scored, compute, tmp_path / "out")
