"""The optional supervised step before the others."""

import json
import shutil
from pathlib import Path

import pytest

from models.alignment import sft
from models.artifacts import Policy, Sources
from models.errors import BadData, BadPolicy
from models.files import jsonl
from models.policy import weights as policies
from models.recipe import Compute, Contaminated, Data, Sft


@pytest.mark.parametrize("text", ["get the brush .", "get\u2028the brush .", "get\u0085the brush ."])
def test_the_corpus_may_hold_any_character(text: str, policy: Policy, compute: Compute, tmp_path: Path) -> None:
    """JSON leaves U+2028 and U+0085 as they are; only a line feed ends a row."""
    rows = [{"prompt": "how do i clean my lamp ?", "completion": text}] * 8
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    sources = Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"})
    out = tmp_path / "out"
    out.mkdir()
    config = Sft(data="corpus.jsonl", batch=8, updates=3, learning_rate=1e-2, warmup=0)
    made = sft.train(out, policy, sources, config, Data(), 0, compute)
    lines = list(jsonl.read(out / "progress.jsonl"))
    assert made.rows == 8 and made.parents == (policy.digest,) and lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_a_corpus_with_prompts_of_a_suite_is_refused_or_loses_them(
    policy: Policy, compute: Compute, tmp_path: Path
) -> None:
    rows = [{"prompt": f"how do i clean my lamp number {i} ?", "completion": "get the brush ."} for i in range(9)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.jsonl").write_text(json.dumps({"prompt": "How do I clean my lamp number 4?"}) + "\n")
    files = {"sft": "corpus.jsonl", "suite/helpful/test": "suite.jsonl"}
    sources = Sources(path=tmp_path, digest="x", files=files)
    out = tmp_path / "out"
    out.mkdir()
    config = Sft(data="corpus.jsonl", batch=8, updates=1, learning_rate=1e-2, warmup=0)
    with pytest.raises(BadData, match="1 training rows have a prompt that stands in an evaluation suite"):
        sft.train(out, policy, sources, config, Data(near_duplicates=1), 0, compute)
    drop = Data(near_duplicates=1, contaminated=Contaminated.drop)
    assert sft.train(out, policy, sources, config, drop, 0, compute).rows == 8
    (left_out,) = jsonl.read(out / "left_out.jsonl")
    assert left_out == {
        "row": 5,
        "why": "the prompt stands in an evaluation suite, or nearly so",
        "prompt": rows[4]["prompt"],
    }


def test_a_row_that_the_template_refuses_is_named_and_the_others_are_trained_on(
    policy: Policy, compute: Compute, tmp_path: Path
) -> None:
    """Here a template that takes no system message, as Gemma's; the row is found by its number."""
    refuses = tmp_path / "refuses"
    shutil.copytree(policy.path, refuses)
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    (refuses / "chat_template.jinja").write_text(template + (policy.path / "chat_template.jinja").read_text())
    whole = [
        {"role": "user", "content": "how do i clean my lamp ?"}, {"role": "assistant", "content": "get the brush ."},
    ]  # fmt: skip
    rows = [{"messages": whole} for _ in range(9)]
    rows[3] = {"messages": [{"role": "system", "content": "help me"}, *whole]}
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources(path=tmp_path, digest="x", files={"sft": "corpus.jsonl"})
    out = tmp_path / "out"
    out.mkdir()
    config = Sft(data="corpus.jsonl", batch=8, updates=1, learning_rate=1e-2, warmup=0)
    strict = policies.describe(refuses, policy)
    assert sft.train(out, strict, sources, config, Data(), 0, compute).rows == 8
    (left_out,) = jsonl.read(out / "left_out.jsonl")
    assert left_out["row"] == 4 and "no system message" in left_out["why"]
    (tmp_path / "corpus.jsonl").write_text(json.dumps(rows[3]) + "\n")
    with pytest.raises(BadPolicy, match=r"cannot write these messages: no system message"):
        sft.train(out, strict, sources, config, Data(), 0, compute)
