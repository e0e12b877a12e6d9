"""Prompts per second: ours (batched, by length) against one prompt at a time through `generate`, as the paper did.

The same model, prompts and settings in one run, greedy, float32; the answers are compared token by token.

    python benchmarks/generation_speed.py FOLDER PROMPTS [COUNT] [MAX_NEW_TOKENS] [BATCH] [THREADS]

FOLDER is a policy (weights and tokenizer); PROMPTS a suite (`docs/evidence.md`), or `town` for the town's own.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch

from models.artifacts import Policy
from models.data import dialogue, suites, town
from models.files import jsonl
from models.policy import generate
from models.policy.generate import Ask
from models.policy.weights import digest, load
from models.recipe import Compute, Evaluation


def main() -> None:
    """Time both arms and print the ratio."""
    folder, place, *numbers = sys.argv[1:]
    count, longest, batch, threads = [int(n) for n in numbers] + [64, 128, 64, 1][len(numbers) :]
    torch.set_num_threads(threads)
    path = Path(folder)
    model, tokenizer = load(Policy(path=path, digest=digest(path), name="p", kind="base"), Compute(device="cpu"))
    with tempfile.TemporaryDirectory() as made:
        if place == "town":
            files = town.write(Path(made), 0)
            rows = [
                row for role in ("helpful", "harmless") for row in jsonl.read(Path(made) / files[f"suite/{role}/test"])
            ]
        else:
            rows = suites.read(Path(place), "helpful")
    texts = dialogue.prompt_texts(tokenizer, [dialogue.messages(row["prompt"]) for row in rows[:count]])
    asked = [Ask(text) for text in texts]
    config = Evaluation(max_new_tokens=longest, batch=batch)
    list(generate.answer(model, tokenizer, asked[:2], config, 0))  # warm

    started = time.perf_counter()
    alone = [one_at_a_time(model, tokenizer, text, longest) for text in texts]
    theirs = time.perf_counter() - started
    started = time.perf_counter()
    ours = dict(generate.answer(model, tokenizer, asked, config, 0))
    spent = time.perf_counter() - started

    same = sum(ours[i].ids == alone[i] for i in ours)
    excused = sum(ours[i].ids != alone[i] and ours[i].tie >= 0 for i in ours)
    lengths = [len(ids) for ids in alone]
    print(
        f"{len(texts)} prompts, {sum(lengths)} tokens, longest answer {max(lengths)}, batch {batch}, {threads} threads"
    )
    print(f"one at a time: {theirs:.1f} s, {len(texts) / theirs:.2f} prompts per second")
    print(
        f"ours:          {spent:.1f} s, {len(texts) / spent:.2f} prompts per second, {theirs / spent:.1f} times as fast"
    )
    print(f"same tokens: {same} of {len(texts)}; {excused} of the others after a near tie")


@torch.inference_mode()
def one_at_a_time(model, tokenizer, text: str, longest: int) -> list[int]:
    """Answer one prompt with transformers alone."""
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    written = model.generate(
        **encoded, max_new_tokens=longest, do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1,
        repetition_penalty=1.0, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return written[0, encoded["input_ids"].shape[1] :].tolist()


if __name__ == "__main__":
    main()
