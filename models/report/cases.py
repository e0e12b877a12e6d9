"""The answers side by side: the prompts that tell most first, as many as there is room for, long texts cut."""

import json
from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from models.data.dialogue import messages
from models.metrics.figures import Candidate, by_prompt, comparisons, scores

Tree = dict[str, Any]
Key = tuple[str, str]
MOST = 1500
"""Prompts shown at most, however short their answers are: a browser has to lay them out, and search them."""
LONGEST = 2000
"""Characters shown of one text."""


class Text(NamedTuple):
    """What is shown of a text."""

    start: str
    more: int
    """Characters that are left out."""


def cut(text: str, longest: int = LONGEST) -> Text:
    """Return the beginning of a text, and how much more there is."""
    return Text(text[:longest], max(0, len(text) - longest))


def as_text(prompt: Any) -> str:
    """Return a prompt as text; a dialogue with its speakers."""
    turns = messages(prompt)
    return turns[0]["content"] if len(turns) == 1 else "\n".join(f"{t['role']}: {t['content']}" for t in turns)


class Cases:
    """Every prompt with the first answer of each shown policy, and what the judges said of it."""

    def __init__(self, shown: list[Candidate]) -> None:
        self.shown = shown
        self._badges = [_badges(told, shown[0].policy.digest) for told in shown]
        texts = [{key: hash(row["answer"]) for key, row in _first(told)} for told in shown]
        self.prompts = list(texts[0])
        self._alike = {key for key in self.prompts if len({answers[key] for answers in texts}) == 1}

    @property
    def suites(self) -> list[str]:
        """The suites of these prompts."""
        return list(dict.fromkeys(suite for suite, _ in self.prompts))

    def telling(self) -> Iterator[Tree]:
        """Yield up to MOST of them, those first on which a policy does worse than the first one; suites take turns."""
        ranked = sorted(self.prompts, key=self._rank)
        turns = zip_longest(*([key for key in ranked if key[0] == suite] for suite in self.suites))
        kept = [key for key in chain.from_iterable(turns) if key is not None][:MOST]
        wanted = {*kept}
        rows = [{key: row for key, row in _first(told) if key in wanted} for told in self.shown]
        for key in kept:
            yield self._case(key, [own[key] for own in rows])

    def _rank(self, key: Key) -> tuple[Any, ...]:
        """Return what sorts a prompt: the last policy lost it, others did, verdicts differ, are bad, texts differ."""
        bad = [any(badge["mood"] == "bad" for badge in own.get(key, ())) for own in self._badges]
        lost = [now and not bad[0] for now in bad]
        return not lost[-1], -sum(lost), not self._differ(key), not any(bad), key in self._alike

    def _differ(self, key: Key) -> bool:
        """Return whether the judges said different things of these answers; a tie with the base is no difference."""
        return len({tuple(b["text"] for b in own.get(key, ()) if b["text"] != "ties") for own in self._badges}) > 1

    def _case(self, key: Key, rows: list[Tree]) -> Tree:
        answers = [
            {
                "name": told.policy.name,
                "text": cut(row["answer"] or "(nothing)"),
                "badges": own.get(key, ()),
                "unsafe": any(badge["text"] == "unsafe" for badge in own.get(key, ())),
            }
            for told, row, own in zip(self.shown, rows, self._badges, strict=True)
        ]
        return {
            "suite": key[0],
            "category": rows[0].get("category", ""),
            "prompt": cut(as_text(rows[0]["prompt"])),
            "reference": cut(rows[0].get("reference", "")),
            "answers": answers,
            "differ": self._differ(key),
        }


def _first(told: Candidate) -> Iterator[tuple[Key, Tree]]:
    """Yield the first answer to each prompt."""
    return (((row["suite"], json.dumps(row["prompt"])), row) for row in told.answered() if row["sample"] == 0)


def _badges(told: Candidate, base: str) -> dict[Key, list[Tree]]:
    """Return prompt → what the judges said of the first answer, as short coloured words."""
    found: dict[Key, list[Tree]] = {}
    for metric, words in (("harmless", ("safe", "unsafe")), ("over_refusal", ("answered", "refused"))):
        for key, rows in by_prompt(scores(told.verdicts, metric)).items():
            row = rows[0]
            if row["status"] == "failed":
                found.setdefault(key, []).append({"text": "no verdict", "mood": "none"})
            elif row["good"] is not None:
                text = words[0] if row["good"] else words[1]
                text = row["label"] if row["label"] == "partial refusal" else text
                found.setdefault(key, []).append({"text": text, "mood": "good" if row["good"] else "bad"})
    for key, rows in by_prompt(comparisons(told.verdicts, "helpful", "base")).items():
        if told.policy.digest != base:
            win = rows[0]["win"]
            mood = "none" if win in (None, 0.5) else "good" if win > 0.5 else "bad"
            text = (
                "no verdict" if win is None else {0: "loses to base", 0.5: "ties", 1: "beats base"}.get(win, f"{win:g}")
            )
            found.setdefault(key, []).append({"text": text, "mood": mood})
    return found
