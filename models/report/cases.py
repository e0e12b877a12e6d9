"""The answers side by side: the prompts that tell most first, as many as there is room for, long texts cut."""

from collections.abc import Iterator
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from models.data.dialogue import messages
from models.judges.rows import ComparisonRow, by_prompt, prompt_key
from models.metrics.candidate import Candidate
from models.policy.answer_rows import AnswerRow

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


class Badge(NamedTuple):
    """What a judge said of an answer, as a short coloured word."""

    text: str
    mood: str
    """`good`, `bad` or `none`."""


class CaseAnswer(NamedTuple):
    """One policy's answer to a prompt."""

    name: str
    """Of the policy."""
    text: Text
    badges: list[Badge]

    @property
    def unsafe(self) -> bool:
        """Whether the text is blurred until a reader clicks on it."""
        return any(badge.text == "unsafe" for badge in self.badges)


class Case(NamedTuple):
    """A prompt, and the first answer of each shown policy to it."""

    suite: str
    category: str
    prompt: Text
    reference: Text
    """A right answer, where the suite holds one."""
    answers: list[CaseAnswer]
    differ: bool
    """Whether the judges said different things of the answers."""


Badges = dict[Key, list[Badge]]
"""(suite, prompt as JSON) → what the judges said of the first answer."""


class Cases:
    """Every prompt with the first answer of each shown policy, and what the judges said of it."""

    def __init__(self, candidates: list[Candidate]) -> None:
        self.candidates = candidates
        self._badges = [_badges(candidate, candidates[0].policy.digest) for candidate in candidates]
        # hashes instead of texts: only whether answers are alike is needed of all prompts
        texts = [{key: hash(row["answer"]) for key, row in _first(candidate)} for candidate in candidates]
        self.prompts = list(texts[0])
        self._alike = {key for key in self.prompts if len({answers[key] for answers in texts}) == 1}

    @property
    def suites(self) -> list[str]:
        """The suites of these prompts."""
        return list(dict.fromkeys(suite for suite, _ in self.prompts))

    def telling(self) -> Iterator[Case]:
        """Yield up to MOST of them, those first on which a policy does worse than the first one; suites take turns."""
        ranked = sorted(self.prompts, key=self._rank)
        turns = zip_longest(*([key for key in ranked if key[0] == suite] for suite in self.suites))
        first_keys = [key for key in chain.from_iterable(turns) if key is not None][:MOST]
        needed = {*first_keys}
        # the texts are read a second time, since only those of the first prompts fit into memory
        rows = [{key: row for key, row in _first(candidate) if key in needed} for candidate in self.candidates]
        for key in first_keys:
            yield self._case(key, [answers[key] for answers in rows])

    def _rank(self, key: Key) -> tuple[bool | int, ...]:
        """Return what sorts a prompt: the last policy lost it, others did, verdicts differ, are bad, texts differ."""
        bad = [any(badge.mood == "bad" for badge in badges.get(key, ())) for badges in self._badges]
        lost = [is_bad and not bad[0] for is_bad in bad]
        return not lost[-1], -sum(lost), not self._differ(key), not any(bad), key in self._alike

    def _differ(self, key: Key) -> bool:
        """Return whether the judges said different things of these answers; a tie with the base is no difference."""
        words = [tuple(badge.text for badge in own.get(key, ()) if badge.text != "ties") for own in self._badges]
        return len({*words}) > 1

    def _case(self, key: Key, rows: list[AnswerRow]) -> Case:
        answers = [
            CaseAnswer(candidate.policy.name, cut(row["answer"] or "(nothing)"), badges.get(key, []))
            for candidate, row, badges in zip(self.candidates, rows, self._badges, strict=True)
        ]
        return Case(
            suite=key[0],
            category=rows[0]["category"],
            prompt=cut(as_text(rows[0]["prompt"])),
            reference=cut(rows[0].get("reference", "")),
            answers=answers,
            differ=self._differ(key),
        )


def _first(candidate: Candidate) -> Iterator[tuple[Key, AnswerRow]]:
    """Yield the first answer to each prompt."""
    return (((row["suite"], prompt_key(row["prompt"])), row) for row in candidate.answer_rows() if row["sample"] == 0)


def _badges(candidate: Candidate, base: str) -> Badges:
    """Return what the judges said of the first answers."""
    badges: Badges = {}
    for metric, words in (("harmless", ("safe", "unsafe")), ("over_refusal", ("answered", "refused"))):
        for key, answers in by_prompt(candidate.scored(metric)).items():
            row = answers[0]
            if not row.ok:
                badges.setdefault(key, []).append(Badge("no verdict", "none"))
            elif row.good is not None:
                text = words[0] if row.good else words[1]
                text = row.label if row.label == "partial refusal" else text
                badges.setdefault(key, []).append(Badge(text, "good" if row.good else "bad"))
    if candidate.policy.digest != base:  # the base is not compared with itself
        for key, comparisons in by_prompt(candidate.compared("helpful", "base")).items():
            badges.setdefault(key, []).append(_helpful(comparisons[0]))
    return badges


def _helpful(row: ComparisonRow) -> Badge:
    """Return whether the answer won against the base's."""
    if not row.ok:
        return Badge("no verdict", "none")
    text = {0: "loses to base", 0.5: "ties", 1: "beats base"}.get(row.win, f"{row.win:g}")
    return Badge(text, "none" if row.win == 0.5 else "good" if row.win > 0.5 else "bad")
