"""What candidates are asked on one split, and which of it estimates how far they moved."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from models.artifacts import Preferences, Prompts, Sources, content_digest, file_digest
from models.data.dialogue import Message
from models.data.preferences import pairs_of
from models.data.suites import MUST_PASS, prompt_digest, stored
from models.files import jsonl
from models.stage import stage

ALL, KL = "prompts", "kl"


class PromptRow(TypedDict):
    """One row of `prompts.jsonl`: what a policy is asked."""

    suite: str
    """Role of the suite, or `held-out METRIC` where there are no suites."""
    prompt: str | list[Message]
    """Text that a user writes, or a dialogue that ends with the user's turn."""
    category: str
    """Empty where the suite names none."""
    reference: NotRequired[str]
    """An answer that would be right, where the suite holds one."""


@stage("prompts.ask", version=1)
def ask(out: Path, sources: Sources, pairs: list[Preferences], split: str, samples: int, kl_prompts: int) -> Prompts:
    """Write down what one split asks.

    Of the prompts for KL, one that stands in several suites counts once, or the bound would take one sample for two;
    past incidents are no sample of anything, and are left out.

    Args:
        samples: without suites, this many held-out prompts of each metric.
        kl_prompts: most prompts for KL, spread evenly over all suites.
    """
    prompts = prompts_of_split(sources, pairs, split, samples)
    sampled = [row for row in prompts if row["suite"] != MUST_PASS]
    # a dictionary keeps the last of equal keys, so it is filled from behind: each prompt stands in its first suite
    once = [*reversed({prompt_digest(row["prompt"]): row for row in reversed(sampled)}.values())]
    tables = {ALL: prompts, KL: [once[i] for i in spread(len(once), kl_prompts)]}
    for table, rows in tables.items():
        jsonl.write(out / f"{table}.jsonl", rows)
    digests = {table: file_digest(out / f"{table}.jsonl") for table in tables}
    return Prompts(path=out, digest=content_digest(digests), split=split, digests=digests)


def prompts_of_split(sources: Sources, pairs: list[Preferences], split: str, samples: int) -> list[PromptRow]:
    """Return the prompts of the suites; without suites, the first prompts of the held-out comparisons, to be read.

    Those are called `held-out METRIC`, which no judge sees and no gate decides on: they are kept apart from less of the
    training than suites are.
    """
    suites = sources.suites(split)
    if suites:
        return [PromptRow(suite=role, **row) for role, path in suites.items() for row in stored(path)]
    rows: list[PromptRow] = []
    for comparisons in pairs:
        # several pairs may share one prompt
        prompts = {json.dumps(pair.prompt): pair.prompt for pair in pairs_of(comparisons.path / f"{split}.jsonl")}
        suite = f"held-out {comparisons.metric}"
        rows += [PromptRow(suite=suite, prompt=p, category="") for p in list(prompts.values())[:samples]]
    return rows


def spread(of: int, count: int) -> list[int]:
    """Return up to `count` indices, spread evenly over `of`."""
    count = min(count, of)
    return [i * of // count for i in range(count)]
