"""What the interpreter that holds vLLM runs: prompts as token ids in, answers as token ids out, one JSON line each.

It imports the standard library and vllm only, since nothing of sacpo is installed there. First line in: the settings.
Every other line in: `index`, `ids`, `seed`. Lines out: `index`, `ids`, `gaps` (greedy: log-prob of the likeliest token
minus that of the next, per step), or one `error`.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
AT_ONCE = 8
"""Batches per call: vLLM fills the place of an answer that ended, but for the last batch of a call."""


def answers(settings: Row, asked: list[Row]) -> Iterator[Row]:
    """Yield one line per prompt, each a call's worth after the other."""
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
        generation_config="vllm",  # nothing that the base came with
        enable_prefix_caching=False,  # an answer does not depend on what was asked before
        enforce_eager=True,
    )
    block = AT_ONCE * settings["batch"]
    for start in range(0, len(asked), block):
        rows = asked[start : start + block]
        params = [
            SamplingParams(
                temperature=settings["temperature"],
                seed=None if greedy else row["seed"],
                max_tokens=settings["max_new_tokens"],
                stop=stop,
                stop_token_ids=settings["ends"],
                ignore_eos=True,  # the line above is the only end
                logprobs=2 if greedy else None,
                detokenize=bool(stop),
            )
            for row in rows
        ]
        told = engine.generate([{"prompt_token_ids": row["ids"]} for row in rows], params, use_tqdm=False)
        for row, (one,) in zip(rows, (answer.outputs for answer in told), strict=True):
            gaps = [_gap(step) for step in one.logprobs or []]
            yield {"index": row["index"], "ids": list(one.token_ids), "gaps": gaps}


def _gap(step: dict[int, Any]) -> float:
    """Return by how much the likeliest token leads, in nats."""
    first, second = sorted((told.logprob for told in step.values()), reverse=True)[:2]
    return float(first - second)


def _end_with(parent: int) -> None:
    """End when the process that asked is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """Answer what stands in stdin."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    settings, *asked = [json.loads(line) for line in sys.stdin]
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # vLLM logs to stdout
        try:
            for line in answers(settings, asked):
                print(json.dumps(line), file=out, flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
            raise


if __name__ == "__main__":
    main()
