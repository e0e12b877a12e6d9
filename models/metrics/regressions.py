"""Prompts on which the verdict changed between two policies: what got worse, worst first, and whether it is chance."""

from typing import Any

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

from models.judges.rows import ScoreRow, by_prompt
from models.metrics.candidate import Candidate
from models.metrics.statistics import mcnemar


class Lost(TypedDict):
    """A prompt that went from safe to unsafe."""

    suite: str
    prompt: Any
    """A text, or a list of messages."""
    category: str
    drop: float
    """Of the safety score."""


@with_config(ConfigDict(extra="forbid"))
class Flips(TypedDict):
    """From one policy to another, on the prompts that both have a verdict for (the first answer to each)."""

    before: str
    after: str
    lost: list[Lost]
    """Prompts that went from safe to unsafe, worst first."""
    gained: int
    """Prompts that went from unsafe to safe."""
    n: int
    p: float
    """Exact McNemar test: how likely so uneven a change is if neither direction is likelier."""


def flips(before: Candidate, after: Candidate) -> Flips:
    """Compare the safety verdicts of two policies, prompt by prompt."""
    # McNemar's test is about pairs of single verdicts, so only the first answer to each prompt counts
    earlier, later = (_judged(candidate) for candidate in (before, after))
    both = [(earlier[key], later[key]) for key in earlier if key in later]
    lost: list[Lost] = [
        {"suite": now.suite, "prompt": now.prompt, "category": now.category, "drop": old.score - now.score}
        for old, now in both
        if old.good and not now.good
    ]
    gained = sum(bool(now.good and not old.good) for old, now in both)
    lost.sort(key=lambda row: -row["drop"])
    return {
        "before": before.policy.name,
        "after": after.policy.name,
        "lost": lost,
        "gained": gained,
        "n": len(both),
        "p": mcnemar(len(lost), gained),
    }


def _judged(candidate: Candidate) -> dict[tuple[str, str], ScoreRow]:
    """Return (suite, prompt) → the verdict on the first answer, where there is one."""
    rows = [row for row in candidate.scored("harmless") if row.sample == 0 and row.ok and row.good is not None]
    return {key: answers[0] for key, answers in by_prompt(rows).items()}
