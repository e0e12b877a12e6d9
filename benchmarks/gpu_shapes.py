"""Bases and pairs of a real shape with random content, and the arms that train on them; units of `gpu.py`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arms import Task
    from gpu import Tell

    from models.artifacts import Preferences

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256},
}  # fmt: skip
"""SmolLM2-135M (134,515,008 parameters) and Llama-3.2-1B (1,235,814,400), tied embeddings."""
UPDATES = {"tiny": 3, "135m": 20, "1b": 8}
BATCH = {"tiny": (4, 2), "135m": (16, 16), "1b": (16, 8)}
"""Pairs per update, and at once."""


def make(tell: Tell, folder: Path, shape: str, tiny: bool) -> None:
    """Write a base with random weights, and random pairs, for the other units of the part."""
    with tell.stage("base and pairs") as facts:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        from models.artifacts import Policy
        from models.policy import weights

        tokenizer = words(SHAPES[shape]["vocab_size"])
        config = LlamaConfig(
            **SHAPES[shape], max_position_embeddings=2048, rope_theta=100000.0, tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config).float()
        (folder / "base").mkdir()
        weights.save(model, tokenizer, folder / "base")
        base = weights.describe(folder / "base", Policy(path=folder / "base", digest="", name="base", kind="base"))
        count = UPDATES[shape] * BATCH[shape][0]
        (folder / "base.json").write_text(json.dumps(base.facts()))
        (folder / "pairs.json").write_text(json.dumps(pairs(folder / "pairs", shape, count).facts()))
        facts |= {"parameters": weights.parameters(folder / "base"), "pairs": count}


def words(vocabulary: int) -> Any:
    """Return a tokenizer of `vocabulary` words `w3` `w4` …, so that texts have as many tokens as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from models.data import town

    names = [*town.SPECIAL, *(f"w{i}" for i in range(len(town.SPECIAL), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        clean_up_tokenization_spaces=False, model_max_length=2048, chat_template=town.TEMPLATE,
    )  # fmt: skip


def pairs(folder: Path, shape: str, count: int) -> Preferences:
    """Write random pairs: prompts and answers of 32 to 256 tokens each, 3 to 24 for the tiny shape."""
    from models.artifacts import Preferences, file_digest
    from models.files import jsonl

    draw, top = Random(0), 24 if shape == "tiny" else 256

    def text() -> str:
        return " ".join(
            f"w{draw.randrange(3, SHAPES[shape]['vocab_size'])}" for _ in range(draw.randint(top // 8, top))
        )

    folder.mkdir()
    rows = [
        {"prompt": [{"role": "user", "content": text()}], "chosen": text(), "rejected": text()} for _ in range(count)
    ]
    jsonl.write(folder / "train.jsonl", rows)
    digest = file_digest(folder / "train.jsonl")
    return Preferences(path=folder, digest=digest, metric="helpful", counts={"train": count})


def task(folder: Path, shape: str, adapter: str, updates: int = 0) -> Task:
    """Return what the arms are given: what `make` wrote, and the settings of a step."""
    from arms import Task

    from models.artifacts import Policy, Preferences
    from models.recipe import Compute, Data, Step

    batch, micro = BATCH[shape]
    step = Step(
        metric="helpful", data="-", adapter_rank=16 if adapter == "lora" else 0, batch=batch, micro_batch=micro,
        learning_rate=1e-4 if adapter == "lora" else 1e-6, updates=updates or UPDATES[shape], similar_lengths=True,
        save_every=10**6,
    )  # fmt: skip
    base = Policy(path=folder / "base", **json.loads((folder / "base.json").read_text()))
    found = Preferences(path=folder / "pairs", **json.loads((folder / "pairs.json").read_text()))
    return Task(
        base, found, step, Compute(threads=1 if shape == "tiny" else min(8, os.cpu_count() or 1)), Data(max_tokens=1024)
    )


def arm(tell: Tell, folder: Path, shape: str, adapter: str, name: str, number: str, tiny: bool) -> None:
    """Run one arm of the comparison."""
    with tell.stage("arm") as facts:
        import arms

        from models import costs
        from models.policy import weights

        job, out = task(folder, shape, adapter), folder / f"{adapter}-{name}-{number}"
        estimate = costs.training_memory(weights.parameters(job.base.path), adapter == "full") / 2**30
        facts |= {"batch": job.config.batch, "plan_gib": round(estimate, 3)}
        try:
            facts |= arms.run(name, job, out)
        finally:
            shutil.rmtree(out, ignore_errors=True)
