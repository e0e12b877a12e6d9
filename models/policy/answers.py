"""One policy answers the suites of one split."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

from models.artifacts import Answers, Memory, Policy, Prompts, file_digest
from models.data.dialogue import Message, messages, prompt_texts
from models.data.prompts import ALL, PromptRow
from models.files import jsonl
from models.policy import generate, vllm
from models.policy.answer_cache import AnswerTable
from models.policy.answer_rows import ANSWERS, AnswerRow
from models.policy.generate import Answer, Ask
from models.policy.weights import device_kind, load, load_tokenizer, own_eos_ids, precision
from models.recipe import Compute, Decoding, Engine
from models.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


@stage("answering.answer", version=4)
def answer(
    out: Path,
    policy: Policy,
    prompts: Prompts,
    decoding: Decoding,
    compute: Compute,
    memory: Memory,
) -> Answers:
    """Answer every prompt of every suite, `decoding.answers` times.

    Writes `answers.jsonl`, whose rows are `AnswerRow`s: what was asked, the number of the sample, and the answer.
    """
    prompt_rows = cast(Iterator[PromptRow], jsonl.read(prompts.path / f"{ALL}.jsonl"))
    numbered_rows = [(row, sample) for row in prompt_rows for sample in range(decoding.answers)]
    turns = [(messages(row["prompt"]), sample) for row, sample in numbered_rows]
    answers = answers_to(policy, own_model(policy, decoding, compute), turns, decoding, compute, memory, out)
    rows: list[AnswerRow] = [
        {**row, "sample": sample, "answer": answer.text, "tokens": len(answer.ids), "tie": answer.tie}
        for (row, sample), answer in zip(numbered_rows, answers, strict=True)
    ]
    jsonl.write(out / ANSWERS, rows)
    return Answers(path=out, digest=file_digest(out / ANSWERS), policy=policy.digest, split=prompts.split)


def own_model(policy: Policy, decoding: Decoding, compute: Compute) -> Loaded | None:
    """Load the policy that answers; none where vLLM answers, which loads it by itself and needs all the memory."""
    return None if decoding.engine is Engine.vllm else load(policy, compute)


def answers_to(
    policy: Policy,
    loaded: Loaded | None,
    dialogues: list[tuple[list[Message], int]],
    decoding: Decoding,
    compute: Compute,
    memory: Memory,
    out: Path,
) -> list[Answer]:
    """Return the policy's answer to each (messages, number of the sample): from the table, or generated now.

    When a batch is done, its answers go to the table, and a line to `progress.jsonl` in `out`.

    Args:
        loaded: what `own_model` returned.
    """
    tokenizer = loaded[1] if loaded else load_tokenizer(policy)
    texts = prompt_texts(tokenizer, [turns for turns, _ in dialogues])
    asks = [Ask(text, sample) for text, (_, sample) in zip(texts, dialogues, strict=True)]
    device = device_kind(compute.device)
    last = generate.ends(tokenizer, own_eos_ids(policy.path), decoding.stop)
    # EOS alone gets no name, so that answers which were stored before ends were named are still found
    ending = "" if last == [tokenizer.eos_token_id] else f" ends {last}"
    libraries = generate.libraries() if loaded else vllm.libraries()
    setting = generate.decoding_key(decoding, decoding.seed, f"{device} {precision(device)}{ending} {libraries}")
    table = AnswerTable(memory.path, policy.digest, setting)
    # One prompt may stand in several suites
    unique = list(dict.fromkeys(asks))
    answers = {unique[i]: answer for i, answer in table.stored(unique).items()}
    missing = [ask for ask in unique if ask not in answers]
    generated = (
        generate.answer(*loaded, missing, decoding, decoding.seed)
        if loaded
        else vllm.answer(policy.path, tokenizer, missing, decoding, decoding.seed, device)
    )
    batch: list[tuple[Ask, Answer]] = []
    with (out / "progress.jsonl").open("w", encoding="utf-8") as progress:
        for i, answer in generated:
            batch.append((missing[i], answer))
            if len(batch) == decoding.batch or len(answers) + len(batch) == len(unique):
                table.add(batch)
                answers |= dict(batch)
                batch = []
                progress.write(json.dumps({"done": len(answers), "of": len(unique)}) + "\n")
                progress.flush()
    (out / "progress.jsonl").unlink()  # what stays in the folder is part of the result
    return [answers[ask] for ask in asks]
