"""One policy answers the suites of one split; every answer is scored, and its distance to other policies measured."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import generate, jsonl
from models.artifacts import Evaluation, Policy, Preferences, Sources, content_digest, file_digest
from models.judges import oracle
from models.policy import frozen, load, project
from models.preferences import pairs as read_pairs
from models.recipe import Compute
from models.recipe import Evaluation as Config
from models.tokens import Message, prompt_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLES = ("helpful", "harmless", "over_refusal")
Row = dict[str, Any]


def evaluate(
    policy: Policy,
    others: dict[str, Policy],
    sources: Sources,
    pairs: list[Preferences],
    split: str,
    config: Config,
    seed: int,
    compute: Compute,
    out: Path,
) -> Evaluation:
    """Answer every suite, score the answers, and estimate the KL to each other policy.

    Writes `answers.jsonl` (suite, prompt, category, answer, tokens, and the judge's helpful, harmless, safe, refused)
    and `kl.jsonl` (prompt, tokens, and nats per answer to each of `others`).

    Args:
        others: policies to measure the distance to, by name (`base`, `reference`).
    """
    model, tokenizer = load(policy, compute)
    rows = _asked(sources, pairs, split, config.samples)
    texts = prompt_texts(tokenizer, [messages(row["prompt"]) for row in rows])
    answers: dict[int, generate.Answer] = {}
    with (out / "progress.jsonl").open("w") as progress:
        for i, answer in generate.answer(model, tokenizer, texts, config, seed):
            answers[i] = answer
            if len(answers) % config.batch == 0:
                progress.write(json.dumps({"done": len(answers), "of": len(rows)}) + "\n")
                progress.flush()
    (out / "progress.jsonl").unlink()
    told = []
    for i, row in enumerate(rows):
        verdict = oracle(row["prompt"], answers[i].text)._asdict() if config.judge else {}
        told.append({**row, "answer": answers[i].text, "tokens": len(answers[i].ids), **verdict})
    jsonl.write(out / "answers.jsonl", told)
    sampled = [texts[i] for i in _spread(texts, config.kl_prompts if others else 0)]
    drawn = dict(generate.answer(model, tokenizer, sampled, config.model_copy(update={"temperature": 1.0}), seed))
    prompts = tokenizer(sampled, add_special_tokens=False)["input_ids"] if sampled else []
    walks = [(prompt, drawn[i].ids) for i, prompt in enumerate(prompts)]
    to = {policy.digest: [0.0] * len(walks)}  # by digest: the first step's reference is the base
    for other in others.values():
        if other.digest not in to:
            to[other.digest] = kl(model, load(other, compute)[0], walks)
    distances = {name: to[other.digest] for name, other in others.items()}
    jsonl.write(
        out / "kl.jsonl",
        (
            {"prompt": text, "tokens": len(ids), **{name: nats[i] for name, nats in distances.items()}}
            for i, (text, (_, ids)) in enumerate(zip(sampled, walks, strict=True))
        ),
    )
    digest = content_digest([file_digest(out / name) for name in ("answers.jsonl", "kl.jsonl")])
    return Evaluation(path=out, digest=digest, policy=policy.digest, split=split)


def kl(policy: "PreTrainedModel", other: "PreTrainedModel", walks: list[tuple[list[int], list[int]]]) -> list[float]:
    """Return Σ_t KL(π(·|x,y_<t) ‖ π'(·|x,y_<t)) in nats for each (prompt ids, answer ids) that π sampled.

    The whole vocabulary is summed at every position, so the only noise left is which answers were drawn.
    """
    import torch

    sums = []
    with frozen(policy), frozen(other):
        for prompt, answer in walks:
            ids = torch.tensor([prompt + answer], device=policy.device)
            ours, theirs = (
                project(
                    model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 : -1]
                )
                .double()
                .log_softmax(-1)
                for model in (policy, other)
            )
            sums.append(float((ours.exp() * (ours - theirs)).sum()))
    return sums


def messages(prompt: str | list[Message]) -> list[Message]:
    """Return a prompt as messages; plain text is one turn of the user."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def _asked(sources: Sources, pairs: list[Preferences], split: str, samples: int) -> list[Row]:
    """Return the prompts of the suites; without suites, the first prompts of the held-out comparisons."""
    suites = sources.suites(split)
    rows = [{"suite": role, **row} for role, path in suites.items() for row in jsonl.read(path)]
    if suites:
        return rows
    for comparisons in pairs:
        prompts = {json.dumps(pair.prompt): pair.prompt for pair in read_pairs(comparisons.path / f"{split}.jsonl")}
        rows += [{"suite": comparisons.metric, "prompt": p, "category": ""} for p in list(prompts.values())[:samples]]
    return rows


def _spread(texts: list[str], count: int) -> list[int]:
    """Return up to `count` indices, spread evenly over all suites."""
    count = min(count, len(texts))
    return [i * len(texts) // count for i in range(count)]
