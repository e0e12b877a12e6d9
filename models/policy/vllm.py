"""Answers from vLLM, which runs in an interpreter of its own.

vLLM and what sacpo needs cannot share one environment (vLLM 0.33: torch 2.14, fastapi below 0.137; Prefect 3.8 as it is
pinned here: fastapi from 0.139). A child process also gives all memory back when the answers are there.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import BadPolicy, SacpoError
from models.policy.generate import NEAR_TIE, Answer, Ask, ended, ends, noise_seed
from models.policy.weights import own_end
from models.recipe import Answering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VARIABLE = "SACPO_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")
ALONE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
"""No telemetry, no network: a policy is a folder."""
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one child, and none of its own that would outlive it
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCH_COMPILE_DISABLE": "1",  # 20 s for a few small functions
}
"""What the user may set otherwise."""
SHARE = 0.9
"""Of the GPU memory that is free: weights and cache."""


def interpreter() -> str:
    """Return the interpreter that vLLM runs in: `SACPO_VLLM_PYTHON`, else our own."""
    return os.environ.get(VARIABLE) or sys.executable


def libraries() -> str:
    """Return the versions of what generates; empty where there is no vLLM."""
    look = "from importlib.metadata import version; print('vllm', version('vllm'), 'torch', version('torch'))"
    with suppress(OSError):
        return subprocess.run(
            [interpreter(), "-I", "-c", look], capture_output=True, check=False, text=True
        ).stdout.strip()
    return ""


def problem() -> str:
    """Return why vLLM cannot be run, and what to do, in one sentence; empty if it can."""
    look = "import sys, importlib.util; sys.exit(not importlib.util.find_spec('vllm'))"
    with suppress(OSError):
        if subprocess.run([interpreter(), "-I", "-c", look], capture_output=True, check=False).returncode == 0:
            return ""
    return (
        f"{interpreter()!r} holds no vllm; install it in an environment of its own (python -m venv vllm; "
        f"vllm/bin/pip install vllm) and set {VARIABLE} to that environment's bin/python"
    )


def answer(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[Ask],
    config: Answering,
    seed: int,
    device: str,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer); what `generate.answer` promises of answers holds here too, with three differences.

    Sampling draws from vLLM's own noise, which follows from the same seed of prompt and sample; of sampled answers vLLM
    does not tell the noise, so their `tie` is −1; and an answer is also cut where the model's window ends.

    Args:
        folder: the policy's, whose tokenizer is given too.
        device: `cpu` or `cuda`; what vLLM was built for must be the same.

    Raises:
        BadPolicy: vLLM cannot run this policy; says why.
        SacpoError: its process was killed.
    """
    if not asked:
        return
    ids = tokenizer([ask.prompt for ask in asked], add_special_tokens=False)["input_ids"]
    last = ends(tokenizer, own_end(folder), config.stop)
    settings = {
        "model": str(folder),
        "device": device,
        "memory": _free_memory(device),
        "window": _window(folder, max(map(len, ids)) + config.max_new_tokens),
        "ends": last,
        **config.model_dump(include={"batch", "max_new_tokens", "temperature", "stop"}),
    }
    rows = [{"index": i, "ids": ids[i], "seed": noise_seed(seed, ask)} for i, ask in enumerate(asked)]
    child = subprocess.Popen(
        [interpreter(), "-I", str(WORKER)],  # -I: the worker's folder is ours, and must not be searched for modules
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET | os.environ | ALONE,
    )  # fmt: skip
    assert child.stdin and child.stdout
    told = 0
    try:
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.writelines(json.dumps(row) + "\n" for row in [settings, *rows])
        for line in child.stdout:
            row = json.loads(line)
            if "error" in row:
                raise BadPolicy(f"{folder}: vLLM cannot answer with it: {(row['error'].splitlines() or ['?'])[0]}")
            text, kept = ended(tokenizer, row["ids"], config.stop, last)
            ties = (t for t, gap in enumerate(row["gaps"][: len(kept)]) if gap < NEAR_TIE)
            told += 1
            yield row["index"], Answer(text, kept, next(ties, -1))
        if told < len(asked):
            raise SacpoError(f"{folder}: vLLM's process ended with {child.wait()}; the same command goes on")
    finally:
        child.kill()
        child.wait()


def _window(folder: Path, wanted: int) -> int:
    """Return for how many tokens vLLM must have room: no more than the model knows positions for."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return min(wanted, config.get("text_config", config).get("max_position_embeddings") or wanted)


def _free_memory(device: str) -> float:
    """Return the share of the GPU's memory that vLLM may take."""
    if device != "cuda":
        return SHARE
    import torch

    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return SHARE * free / total
