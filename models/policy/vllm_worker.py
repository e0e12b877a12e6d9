"""The program for the interpreter that holds vLLM: prompts as token ids in, answers as token ids out, a JSON line each.

It imports the standard library and vllm only, since nothing of sacpo is installed there. First line in: `Settings`.
Every other line in: a `Prompt`. Lines out: a `Reply` each, or one `error`.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from vllm.logprobs import Logprob

AT_ONCE = 8
"""Batches per call: vLLM fills the place of an answer that ended, but for the last batch of a call."""


class Settings(TypedDict):
    """How the policy answers."""

    model: str
    """Folder of the policy."""
    device: str
    """`cpu` or `cuda`."""
    memory: float
    """Share of the GPU's memory that vLLM may take."""
    window: int
    """Tokens of the longest prompt and its answer."""
    ends: list[int]
    """Ids that end an answer."""
    batch: int
    max_new_tokens: int
    temperature: float
    stop: list[str]


class Prompt(TypedDict):
    """One answer that the policy is to give."""

    index: int
    ids: list[int]
    seed: int
    """Of the noise, where the temperature is above 0."""


class Reply(TypedDict):
    """One answer."""

    index: int
    ids: list[int]
    gaps: list[float]
    """By how much the likeliest token led at each step, in nats; empty where answers are sampled."""


def answers(settings: Settings, prompts: list[Prompt]) -> Iterator[Reply]:
    """Yield one reply per prompt, in their order; those of one call of vLLM come together."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if current_platform.device_type != settings["device"]:
        raise ValueError(f"this vLLM computes on {current_platform.device_type}, the recipe on {settings['device']}")
    greedy, stop = settings["temperature"] == 0, settings["stop"]
    engine = LLM(
        model=settings["model"],
        dtype="float32",
        max_model_len=settings["window"],
        max_num_seqs=settings["batch"],
        gpu_memory_utilization=settings["memory"],
        skip_tokenizer_init=not stop,
        generation_config="vllm",  # a base may come with one of its own
        enable_prefix_caching=False,  # so that an answer does not depend on the prompts before it
        enforce_eager=True,
    )
    block = AT_ONCE * settings["batch"]
    for start in range(0, len(prompts), block):
        part = prompts[start : start + block]
        params = [
            SamplingParams(
                temperature=settings["temperature"],
                seed=None if greedy else prompt["seed"],
                max_tokens=settings["max_new_tokens"],
                stop=stop,
                stop_token_ids=settings["ends"],
                ignore_eos=True,  # EOS is among the ids of the line above, which are the only ends
                logprobs=2 if greedy else None,
                detokenize=bool(stop),
            )
            for prompt in part
        ]
        results = engine.generate([{"prompt_token_ids": prompt["ids"]} for prompt in part], params, use_tqdm=False)
        for prompt, (output,) in zip(part, (result.outputs for result in results), strict=True):
            gaps = [_gap(step) for step in output.logprobs or []]
            yield {"index": prompt["index"], "ids": list(output.token_ids), "gaps": gaps}


def _gap(step: "dict[int, Logprob]") -> float:
    """Return by how much the likeliest token leads, in nats."""
    first, second = sorted((token.logprob for token in step.values()), reverse=True)[:2]
    return float(first - second)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone: during a long call of vLLM nothing else would end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Answer the prompts that stand in stdin."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    settings, *prompts = [json.loads(line) for line in sys.stdin]
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # vLLM logs to stdout, which is for the replies: from here on all but those goes to stderr
        try:
            for reply in answers(settings, prompts):
                print(json.dumps(reply), file=out, flush=True)
        except Exception as error:
            # Any error of vLLM, whose architectures and kernels have errors of their own: the parent makes a sentence
            # of it, and the traceback goes to stderr, the log of the worker that started this program
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
            raise


if __name__ == "__main__":
    main()
