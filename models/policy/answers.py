"""One policy answers the suites of one split."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.artifacts import Answers, Memory, Policy, Prompts, file_digest
from models.data.dialogue import Message, messages, prompt_texts
from models.data.prompts import ALL
from models.files import jsonl
from models.policy import generate, vllm
from models.policy.answer_cache import AnswerTable
from models.policy.generate import Answer, Ask
from models.policy.weights import device_kind, load, load_tokenizer, own_end, precision
from models.recipe import Compute, Decoding, Engine
from models.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Row = dict[str, Any]
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

    Writes `answers.jsonl`: suite, prompt, category, reference answer where there is one, sample, answer, tokens, and
    tie (the first token where rounding decides, −1 if none).
    """
    asked = jsonl.read(prompts.path / f"{ALL}.jsonl")
    rows = [{**row, "sample": k} for row in asked for k in range(decoding.answers)]
    turns = [(messages(row["prompt"]), row["sample"]) for row in rows]
    told = answered(policy, own_model(policy, decoding, compute), turns, decoding, compute, memory, out)
    jsonl.write(
        out / "answers.jsonl",
        (
            {**row, "answer": one.text, "tokens": len(one.ids), "tie": one.tie}
            for row, one in zip(rows, told, strict=True)
        ),
    )
    return Answers(path=out, digest=file_digest(out / "answers.jsonl"), policy=policy.digest, split=prompts.split)


def own_model(policy: Policy, decoding: Decoding, compute: Compute) -> Loaded | None:
    """Load what answers; none where vLLM loads it by itself, and needs all the memory for it."""
    return None if decoding.engine is Engine.vllm else load(policy, compute)


def answered(
    policy: Policy,
    loaded: Loaded | None,
    dialogues: list[tuple[list[Message], int]],
    decoding: Decoding,
    compute: Compute,
    memory: Memory,
    out: Path,
) -> list[Answer]:
    """Return the policy's answer to each (messages, number of the sample): from the table, or generated now.

    Each batch goes to the table when it is done, and a line to `progress.jsonl` in `out`.

    Args:
        loaded: what `own_model` returned.
    """
    tokenizer = loaded[1] if loaded else load_tokenizer(policy)
    texts = prompt_texts(tokenizer, [turns for turns, _ in dialogues])
    wanted = [Ask(text, sample) for text, (_, sample) in zip(texts, dialogues, strict=True)]
    device = device_kind(compute.device)
    last = generate.ends(tokenizer, own_end(policy.path), decoding.stop)
    ending = "" if last == [tokenizer.eos_token_id] else f" ends {last}"
    libraries = generate.libraries() if loaded else vllm.libraries()
    setting = generate.decoding(decoding, decoding.seed, f"{device} {precision(device)}{ending} {libraries}")
    table = AnswerTable(memory.path, policy.digest, setting)
    unique = list(dict.fromkeys(wanted))
    told = {unique[i]: one for i, one in table.known(unique).items()}
    missing = [ask for ask in unique if ask not in told]
    drawn = (
        generate.answer(*loaded, missing, decoding, decoding.seed)
        if loaded
        else vllm.answer(policy.path, tokenizer, missing, decoding, decoding.seed, device)
    )
    batch: list[tuple[Ask, Answer]] = []
    with (out / "progress.jsonl").open("w", encoding="utf-8") as progress:
        for i, one in drawn:
            batch.append((missing[i], one))
            if len(batch) == decoding.batch or len(told) + len(batch) == len(unique):
                table.add(batch)
                told |= dict(batch)
                batch = []
                progress.write(json.dumps({"done": len(told), "of": len(unique)}) + "\n")
                progress.flush()
    (out / "progress.jsonl").unlink()
    return [told[ask] for ask in wanted]
