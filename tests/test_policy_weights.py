"""Bases as people have them: a hub's layout, a hub's cache, bfloat16 weights; and what the digest covers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from models.alignment import reference
from models.artifacts import Policy, Sources
from models.data import preferences
from models.errors import BadInput, BadPolicy, BrokenInvariant
from models.files import hub
from models.policy import examination
from models.policy import weights as policies
from models.recipe import Compute, Data, Selection


def as_on_a_hub(policy: Policy, folder: Path) -> Path:
    """Lay the policy out as older hub repositories do: the template inside tokenizer_config.json, bfloat16 weights."""
    model, tokenizer = policies.load(policy, Compute(device="cpu"))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    return folder


def taken(place: str, out: Path, template: str = "") -> Policy:
    out.mkdir()
    return policies.base(out, place, template, 0, policies.base_digest(place))


def test_a_base_in_hub_layout_keeps_its_vocabulary_through_a_save(policy: Policy, tmp_path: Path) -> None:
    base = taken(str(as_on_a_hub(policy, tmp_path / "hub")), tmp_path / "base")
    model, tokenizer = policies.load(base, Compute(device="cpu"))
    (tmp_path / "again").mkdir()
    policies.save(model, tokenizer, tmp_path / "again")
    assert policies.vocabulary_digest(tmp_path / "again") == base.vocabulary
    assert model.dtype is torch.float32 and tokenizer.chat_template


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_of_another_layout_beside_the_shards_are_left_alone(
    sharded: bool, policy: Policy, tmp_path: Path
) -> None:
    """As `consolidated.safetensors` lies in Mistral's own folders: the same weights under other names."""
    model, tokenizer = policies.load(policy, Compute(device="cpu"))
    model.save_pretrained(tmp_path / "given", max_shard_size="100KB" if sharded else "1GB")
    tokenizer.save_pretrained(tmp_path / "given")
    assert (tmp_path / "given" / "model.safetensors.index.json").exists() is sharded
    before = policies.digest(tmp_path / "given")
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, tmp_path / "given" / "consolidated.safetensors")
    assert policies.digest(tmp_path / "given") == before
    base = taken(str(tmp_path / "given"), tmp_path / "base")
    assert not (base.path / "consolidated.safetensors").exists() and base.digest == policies.digest(base.path)
    assert policies.parameters(tmp_path / "given") == policies.parameters(policy.path)
    examination.examine(str(tmp_path / "given"), "", [])


def test_a_hub_name_finds_what_the_hub_cache_holds(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "cache" / "models--someone--tiny"
    (cache / "snapshots").mkdir(parents=True)
    as_on_a_hub(policy, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("someone/tiny", f"someone/tiny@{commit}"):
        assert hub.is_name(name) and hub.local(name, "model") == cache / "snapshots" / commit
    assert taken("someone/tiny", tmp_path / "base").digest
    with pytest.raises(BadInput, match="neither on this disk nor to be had from the hub"):
        hub.local("someone/else", "model")


@pytest.mark.parametrize("place", ["data/rows.jsonl", "models/x.gguf", "./a/b", "/a/b", "a", "a/b/c"])
def test_a_path_is_no_hub_name(place: str) -> None:
    assert not hub.is_name(place)


@pytest.mark.parametrize(("file", "key"), [("config.json", "rope_theta"), ("generation_config.json", "top_k")])
def test_the_digest_covers_the_configuration(policy: Policy, tmp_path: Path, file: str, key: str) -> None:
    shutil.copytree(policy.path, tmp_path / "copy")
    assert policies.digest(tmp_path / "copy") == policy.digest
    settings = json.loads((tmp_path / "copy" / file).read_text())
    (tmp_path / "copy" / file).write_text(json.dumps(settings | {"transformers_version": "0"}))
    assert policies.digest(tmp_path / "copy") == policy.digest  # who wrote it does not matter
    (tmp_path / "copy" / file).write_text(json.dumps(settings | {key: 3}))
    assert policies.digest(tmp_path / "copy") != policy.digest
    with pytest.raises(BrokenInvariant, match="the record says"):
        policies.load(policy.at(tmp_path / "copy"), Compute(device="cpu"))


def test_a_template_in_the_recipe_replaces_the_tokenizers(policy: Policy, tmp_path: Path) -> None:
    folder = as_on_a_hub(policy, tmp_path / "hub")
    base = taken(str(folder), tmp_path / "base", "{% for m in messages %}Q {{ m.content }} A {% endfor %}")
    _, tokenizer = policies.load(base, Compute(device="cpu"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.startswith("Q hi A") and base.vocabulary != taken(str(folder), tmp_path / "plain").vocabulary


@pytest.mark.parametrize("what", ["missing", "empty folder", "not a gguf"])
def test_a_base_that_cannot_be_used_is_said_in_one_sentence(what: str, tmp_path: Path) -> None:
    place = {"missing": "nowhere", "empty folder": str(tmp_path), "not a gguf": str(tmp_path / "x.gguf")}[what]
    (tmp_path / "x.gguf").write_bytes(b"GGUF nothing")
    with pytest.raises(BadPolicy, match="base ") as raised:
        taken(place, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "clip")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BadPolicy, match="cannot read this GGUF file"):
        taken(str(tmp_path / "other.gguf"), tmp_path / "out")


def test_unpaired_rows_train_kto_and_hold_nothing_out(policy: Policy, compute: Compute, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"how do i clean my lamp {i} ?", "completion": "get the brush .", "label": i % 3 > 0}
        for i in range(60)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = Sources(path=tmp_path, digest="", files={"steps.0": "rows.jsonl"})
    (tmp_path / "pairs").mkdir()
    made = preferences.prepare(
        tmp_path / "pairs", sources, "steps.0", Selection(metric="harmless", paired=False), Data(near_duplicates=1)
    )
    assert made.counts["train"] > 40 and made.counts["validation"] == made.counts["test"] == 0
    (tmp_path / "held").mkdir()
    held = reference.score(tmp_path / "held", policy, made, ["validation", "test"], 512, compute)
    assert held.counts["test"] == 0
