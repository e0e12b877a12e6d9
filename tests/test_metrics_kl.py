"""KL between policies: exact per position, and only where both speak in the same tokens."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from models.artifacts import Memory, Policy, Sources
from models.data.prompts import ask
from models.files import jsonl
from models.metrics import kl
from models.policy.weights import describe, load
from models.recipe import Compute, Decoding


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    jsonl.write(tmp_path / "asked.jsonl", [{"prompt": f"how do i clean my {thing} ?"} for thing in ("lamp", "desk")])
    return Sources(path=tmp_path, digest="", files={"suite/harmless/test": "asked.jsonl"})


def measured(policy: Policy, others: dict[str, Policy], sources: Sources, compute: Compute) -> list[jsonl.Row]:
    out = sources.path / "out"
    out.mkdir()
    decoding, memory = Decoding(max_new_tokens=6, seed=0).sampled(), Memory(sources.path / "answers.db")
    asked = sources.path / "asked"
    asked.mkdir()
    made = kl.measure(out, policy, others, ask(asked, sources, [], "test", 16, 64), decoding, compute, memory)
    return list(jsonl.read(made.path / "kl.jsonl"))


def test_kl_is_the_sum_over_the_vocabulary_at_every_position(
    policy: Policy, other_policy: Policy, compute: Compute
) -> None:
    ours, theirs = load(policy, compute)[0], load(other_policy, compute)[0]
    prompt, answer = [5, 6, 7], [8, 9]
    (row,) = kl.kl(ours, theirs, [(prompt, answer)])
    import torch

    with torch.inference_mode():
        p, q = (model(torch.tensor([prompt + answer])).logits[0, 2:4].double().softmax(-1) for model in (ours, theirs))
    assert row == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5) and row > 0
    assert kl.kl(ours, ours, [(prompt, answer)]) == [pytest.approx(0, abs=1e-9)]


def test_a_vocabulary_that_is_padded_further_changes_nothing(
    policy: Policy, other_policy: Policy, compute: Compute
) -> None:
    """Qwen2.5 pads its 151,665 words to 151,936 rows or, from 7B on, to 152,064."""
    ours, theirs = load(policy, compute)[0], load(other_policy, compute)[0]
    walks = [([5, 6, 7], [8, 9])]
    expected = kl.kl(ours, theirs, walks)
    theirs.resize_token_embeddings(theirs.config.vocab_size + 8)
    assert kl.kl(ours, theirs, walks) == pytest.approx(expected, rel=1e-5)


def test_a_prompt_of_several_suites_counts_once_and_an_incident_never(
    policy: Policy, other_policy: Policy, sources: Sources, compute: Compute
) -> None:
    """As independent draws they would narrow the bound that gates."""
    jsonl.write(sources.path / "incidents.jsonl", [{"prompt": "how do i open the safe ?"}])
    files = {"suite/must_pass/test": "incidents.jsonl", **sources.files, "suite/helpful/test": "asked.jsonl"}
    rows = measured(policy, {"base": other_policy}, replace(sources, files=files), compute)
    assert [row["prompt"] for row in rows] == ["how do i clean my lamp ?", "how do i clean my desk ?"]
    assert {row["suite"] for row in rows} <= {"harmless", "helpful"}


def test_policies_of_other_words_have_no_kl(
    policy: Policy, other_policy: Policy, sources: Sources, compute: Compute, tmp_path: Path
) -> None:
    shutil.copytree(policy.path, tmp_path / "foreign")
    tokenizer = tmp_path / "foreign" / "tokenizer.json"
    tree = json.loads(tokenizer.read_text("utf-8"))
    tree["model"]["vocab"]["one word more"] = len(tree["model"]["vocab"])
    tokenizer.write_text(json.dumps(tree), "utf-8")
    foreign = describe(tmp_path / "foreign", Policy(path=tmp_path / "foreign", digest="", name="foreign", kind="base"))
    rows = measured(policy, {"base": foreign, "reference": other_policy}, sources, compute)
    assert len(rows) == 2 and all("base" not in row and row["reference"] > 0 for row in rows)
