"""One policy answers the suites of one split; every answer is scored, and its distance to other policies measured."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models import generate
from models.artifacts import Evaluation, Policy, Preferences, Sources, content_digest, file_digest
from models.judges import oracle
from models.policy import frozen, load
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
    with (out / "answers.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            told = {**row, "answer": answers[i].text, "tokens": len(answers[i].ids)}
            if config.judge:
                told |= oracle(row["prompt"], answers[i].text)._asdict()
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
    sampled = _spread(texts, config.kl_prompts)
    drawn = config.model_copy(update={"temperature": 1.0})
    walks = [
        (texts[sampled[i]], a.ids)
        for i, a in generate.answer(model, tokenizer, [texts[i] for i in sampled], drawn, seed)
    ]
    kls: dict[str, list[float]] = {}
    for name, other in others.items():
        if other.digest == policy.digest:
            kls[name] = [0.0] * len(walks)
        else:
            prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in walks]
            kls[name] = kl(
                model, load(other, compute)[0], [(p, a) for p, (_, a) in zip(prompts, walks, strict=True)], config.batch
            )
    with (out / "kl.jsonl").open("w", encoding="utf-8") as file:
        for i, (text, ids) in enumerate(walks):
            file.write(
                json.dumps({"prompt": text, "tokens": len(ids), **{name: v[i] for name, v in kls.items()}}) + "\n"
            )
    digest = content_digest([file_digest(out / name) for name in ("answers.jsonl", "kl.jsonl")])
    return Evaluation(path=out, digest=digest, policy=policy.digest, split=split)


def kl(
    policy: "PreTrainedModel", other: "PreTrainedModel", walks: list[tuple[list[int], list[int]]], batch: int
) -> list[float]:
    """Return Σ_t KL(π(·|x,y_<t) ‖ π'(·|x,y_<t)) in nats for each (prompt ids, answer ids) that π sampled.

    The whole vocabulary is summed at every position, so the only noise left is which answers were drawn.
    """
    import torch

    order = sorted(range(len(walks)), key=lambda i: len(walks[i][0]) + len(walks[i][1]))
    sums = [0.0] * len(walks)
    with frozen(policy), frozen(other):
        for start in range(0, len(order), batch):
            block = [walks[i] for i in order[start : start + batch]]
            width = max(len(p) + len(a) for p, a in block)
            ids = torch.tensor([p + a + [0] * (width - len(p) - len(a)) for p, a in block], device=policy.device)
            seen = torch.tensor(
                [[1] * (len(p) + len(a)) + [0] * (width - len(p) - len(a)) for p, a in block], device=policy.device
            )
            predicts = torch.zeros_like(seen, dtype=torch.bool)
            for row, (p, a) in enumerate(block):
                predicts[row, len(p) - 1 : len(p) + len(a) - 1] = True
            ours, theirs = (
                m.get_output_embeddings()(
                    m.base_model(input_ids=ids, attention_mask=seen, use_cache=False).last_hidden_state[predicts]
                ).float().log_softmax(-1)
                for m in (policy, other)
            )  # fmt: skip
            tokens = (ours.exp() * (ours - theirs)).sum(-1)
            totals = torch.zeros(len(block), device=tokens.device).index_add(0, predicts.nonzero()[:, 0], tokens)
            for i, value in zip(order[start : start + batch], totals.tolist(), strict=True):
                sums[i] = value
    return sums


def read(path: Path) -> list[Row]:
    """Return the rows of a JSONL table."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def messages(prompt: str | list[Message]) -> list[Message]:
    """Return a prompt as messages; plain text is one turn of the user."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def _asked(sources: Sources, pairs: list[Preferences], split: str, samples: int) -> list[Row]:
    """Return the prompts of the suites; without suites, the first prompts of the held-out comparisons."""
    suites = sources.suites(split)
    rows = [{"suite": role, **row} for role, path in suites.items() for row in read(path)]
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
