"""Answers from vLLM, which runs in an interpreter of its own.

vLLM and the libraries of sacpo cannot share one environment (vLLM 0.33: torch 2.14, fastapi below 0.137; Prefect 3.8 as
it is pinned here: fastapi from 0.139). A child process also gives all memory back when the answers are there.
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
from models.policy.generate import NEAR_TIE, Answer, Ask, cut_at_end, ends, noise_seed
from models.policy.weights import own_eos_ids
from models.recipe import Answering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VARIABLE = "SACPO_VLLM_PYTHON"
WORKER = Path(__file__).with_name("vllm_worker.py")
ALONE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
"""No telemetry, no network: a policy is a folder."""
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a child of the child could outlive it
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCH_COMPILE_DISABLE": "1",  # compiling takes 20 s, for a few small functions
}
"""Defaults: a variable that the user has set stays as it is."""
SHARE = 0.9
"""Share of the free GPU memory that vLLM may take for weights and cache."""


def interpreter() -> str:
    """Return the interpreter that vLLM runs in: `SACPO_VLLM_PYTHON`, else our own."""
    return os.environ.get(VARIABLE) or sys.executable


def libraries() -> str:
    """Return the versions of what generates; empty where there is no vLLM."""
    code = "from importlib.metadata import version; print('vllm', version('vllm'), 'torch', version('torch'))"
    with suppress(OSError):
        return subprocess.run(
            [interpreter(), "-I", "-c", code], capture_output=True, check=False, text=True
        ).stdout.strip()
    return ""


def problem() -> str:
    """Return why vLLM cannot be run, and what to do, in one sentence; empty if it can."""
    # Found, not imported: importing vllm takes many seconds
    code = "import sys, importlib.util; sys.exit(not importlib.util.find_spec('vllm'))"
    with suppress(OSError):
        if subprocess.run([interpreter(), "-I", "-c", code], capture_output=True, check=False).returncode == 0:
            return ""
    return (
        f"{interpreter()!r} holds no vllm; install it in an environment of its own (python -m venv vllm; "
        f"vllm/bin/pip install vllm) and set {VARIABLE} to that environment's bin/python"
    )


def answer(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    asks: Sequence[Ask],
    config: Answering,
    seed: int,
    device: str,
) -> Iterator[tuple[int, Answer]]:
    """Yield (index, answer); what `generate.answer` promises of answers holds here too, with three differences.

    Sampling draws from vLLM's own noise, which follows from the same seed of prompt and sample; of sampled answers vLLM
    does not tell the noise, so their `tie` is −1; and an answer is also cut where the model's window ends.

    Args:
        folder: of the policy.
        tokenizer: of the policy.
        device: `cpu` or `cuda`; vLLM must have been built for the same.

    Raises:
        BadPolicy: vLLM cannot run this policy; says why.
        SacpoError: its process was killed.
    """
    if not asks:
        return
    ids = tokenizer([ask.prompt for ask in asks], add_special_tokens=False)["input_ids"]
    last = ends(tokenizer, own_eos_ids(folder), config.stop)
    # The keys are those of `Settings` and `Prompt` in vllm_worker.py, which runs in another interpreter
    settings = {
        "model": str(folder),
        "device": device,
        "memory": _free_memory(device),
        "window": _window(folder, max(map(len, ids)) + config.max_new_tokens),
        "ends": last,
        **config.model_dump(include={"batch", "max_new_tokens", "temperature", "stop"}),
    }
    prompts = [{"index": i, "ids": ids[i], "seed": noise_seed(seed, ask)} for i, ask in enumerate(asks)]
    child = subprocess.Popen(
        [interpreter(), "-I", str(WORKER)],  # -I: else Python also looks for vLLM's imports in this folder
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=QUIET | os.environ | ALONE,
    )  # fmt: skip
    assert child.stdin and child.stdout
    replies = 0
    try:
        # A child that has ended already does not read; why it ended is told below, by its error or its exit code
        with suppress(BrokenPipeError), child.stdin:
            child.stdin.writelines(json.dumps(line) + "\n" for line in [settings, *prompts])
        for line in child.stdout:
            reply = json.loads(line)
            if "error" in reply:
                raise BadPolicy(f"{folder}: vLLM cannot answer with it: {(reply['error'].splitlines() or ['?'])[0]}")
            text, answer_ids = cut_at_end(tokenizer, reply["ids"], config.stop, last)
            ties = (step for step, gap in enumerate(reply["gaps"][: len(answer_ids)]) if gap < NEAR_TIE)
            replies += 1
            yield reply["index"], Answer(text, answer_ids, next(ties, -1))
        if replies < len(asks):
            raise SacpoError(f"{folder}: vLLM's process ended with {child.wait()}; the same command goes on")
    finally:
        child.kill()
        child.wait()


def _window(folder: Path, needed: int) -> int:
    """Return the number of tokens that vLLM must have room for: those needed, or as many as the model has positions."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return min(needed, config.get("text_config", config).get("max_position_embeddings") or needed)


def _free_memory(device: str) -> float:
    """Return the share of the GPU's memory that vLLM may take."""
    if device != "cuda":
        return SHARE
    import torch

    # vLLM is told a share of all memory, and this process may still hold blocks that it does not use
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return SHARE * free / total
