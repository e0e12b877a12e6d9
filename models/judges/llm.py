"""A chat model behind an OpenAI-compatible address as judge: it compares two answers, always in both orders.

A reply counts only if it is exactly what the rubric asks for, under a key that no answer can hold. Anything else, and
any call that ends without a reply after the client's own retries, is a failed verdict: never a tie. Each readable reply
is remembered by content.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from string import Template
from typing import Any, NamedTuple

from models.artifacts import content_digest
from models.data.dialogue import Message
from models.errors import BadRecipe, NoVerdict
from models.judges.protocol import Asked, Call, Comparison, Grade, rubric_files, win
from models.judges.score_cache import ScoreCache
from models.recipe import Judge

LOWEST, HIGHEST = 1.0, 10.0
FENCE_DIGITS = 32
PART = 4
"""As many characters in a row of a key are told nowhere."""
LARGEST = 4 * 2**20
"""Bytes that a reply may have whatever its text is, which also holds what a model thought before."""
PER_TOKEN = 64
"""Bytes more for each token that it may have: JSON writes a character in up to twelve."""
READ = 10_000
"""Characters of an unreadable reply, or of an error, that are looked at."""
FENCED = re.compile(r"```(?:json)?\s*(\{.*\})\s*```", re.DOTALL)


class Question(NamedTuple):
    """One call: a filled rubric, and which of its repeats this is."""

    text: str
    fence: str
    """The key under which the reply's grades stand."""
    grades: int
    """How many grades the reply must hold."""
    repeat: int


class Reply(NamedTuple):
    """What came back: grades, or why there are none."""

    grades: tuple[float, ...] = ()
    tokens: int = 0
    failed: str = ""


class Llm:
    """Asks a chat model, with the rubrics of one metric; `table` remembers what was answered."""

    def __init__(self, judge: Judge, metric: str, table: ScoreCache) -> None:
        self.judge, self.metric, self.table = judge, metric, table
        self.comparing, *single = [Template(path.read_text("utf-8")) for path in rubric_files(metric, judge)]
        self.single = single[0] if single else None
        self.secret = os.environ.get(judge.key, "") if judge.key else ""
        if judge.key and not self.secret:
            raise BadRecipe(
                f"evaluation.judges.{metric}.key: the environment variable {judge.key} is not set; put the key there"
            )

    def grade(self, answers: Sequence[Asked]) -> Iterator[Grade]:
        """Yield how harmless each answer is by itself, from 1 to 10; safe from the recipe's threshold on."""
        assert self.single is not None
        asked = [
            [asked_about(self.single, 1, k, one.prompt, one.answer) for k in range(self.judge.repeats)]
            for one in answers
        ]
        replies = self._ask([question for row in asked for question in row])
        for row in asked:
            told = [replies[question] for question in row]
            if failed := next((reply.failed for reply in told if reply.failed), ""):
                yield Grade(failed=failed)  # a judge that declines on harmful answers would leave the harmless readings
            else:
                score = sum(reply.grades[0] for reply in told) / len(told) - self.judge.threshold
                yield Grade(score, score >= 0)

    def compare(self, pairs: Sequence[tuple[Asked, str]]) -> Iterator[Comparison]:
        """Yield one comparison per pair; identical answers are a tie that nobody is asked about."""
        asked = [
            [(ours_first, k, self._pair(*pair, ours_first, k)) for ours_first in (True, False) for k in self._repeats]
            if pair[0].answer != pair[1]
            else []
            for pair in pairs
        ]
        replies = self._ask([question for row in asked for *_, question in row])
        for row in asked:
            calls, failed = [], ""
            for ours_first, k, question in row:
                reply = replies[question]
                if reply.failed:
                    failed = reply.failed
                else:
                    ours, theirs = reply.grades if ours_first else reply.grades[::-1]
                    calls.append(Call(ours_first, k, ours, theirs))
            yield _decided(tuple(calls), failed) if row else Comparison()

    @property
    def _repeats(self) -> range:
        return range(self.judge.repeats)

    def _pair(self, ours: Asked, theirs: str, ours_first: bool, repeat: int) -> Question:
        first, second = (ours.answer, theirs) if ours_first else (theirs, ours.answer)
        return asked_about(self.comparing, 2, repeat, ours.prompt, first, second)

    def _ask(self, questions: list[Question]) -> dict[Question, Reply]:
        """Return the reply to each question: remembered, or asked for now.

        Raises:
            NoVerdict: the budget does not reach, or is spent; the address does not answer, or names another.
        """
        unique = list(dict.fromkeys(questions))
        known = self.table.known([*unique])
        told = {q: Reply(tuple(known[key])) for q in unique if (key := content_digest([*q])) in known}
        missing = [question for question in unique if question not in told]
        if not missing:
            return told
        self._afford(len(missing))
        from openai import OpenAI

        from models.files import http

        with (
            OpenAI(
                base_url=self.judge.base_url,
                api_key=self.secret or "none",
                timeout=self.judge.timeout,
                max_retries=self.judge.retries,
                http_client=http.client(self.judge.timeout, LARGEST + PER_TOKEN * self.judge.reply_tokens),
            ) as client,
            ThreadPoolExecutor(self.judge.at_once) as pool,
        ):
            for start in range(0, len(missing), self.judge.at_once):
                self._afford(0)
                block = missing[start : start + self.judge.at_once]
                replies = list(pool.map(lambda question: self._call(client, question), block))
                kept = [([*q], [*r.grades]) for q, r in zip(block, replies, strict=True) if not r.failed]
                self.table.add(kept, len(block), sum(reply.tokens for reply in replies))
                told |= dict(zip(block, replies, strict=True))
                if not start and all("APIConnectionError" in reply.failed for reply in replies):
                    raise NoVerdict(
                        f"evaluation.judges.{self.metric}: {self.judge.base_url} does not answer; start that endpoint, "
                        "the same command goes on"
                    )
                if not start and all(reply.failed.startswith("Redirected: ") for reply in replies):
                    raise NoVerdict(
                        f"evaluation.judges.{self.metric}.base_url: {self.judge.base_url} sends us to another address, "
                        "which is not followed; give the address itself, the same command goes on"
                    )
        return told

    def _afford(self, calls: int) -> None:
        """Refuse calls that the budget does not hold."""
        made, tokens = self.table.spent()
        where = f"evaluation.judges.{self.metric}"
        if self.judge.calls and made + calls > self.judge.calls:
            raise NoVerdict(
                f"{where}: {calls} more calls are needed, {made} of the budget of {self.judge.calls} are spent; raise "
                f"{where}.calls, what was judged is kept"
            )
        if self.judge.tokens and tokens >= self.judge.tokens:
            raise NoVerdict(
                f"{where}: {tokens} tokens are spent, the budget is {self.judge.tokens}; raise {where}.tokens, what "
                "was judged is kept"
            )

    def _call(self, client: Any, question: Question) -> Reply:
        """Ask once; the client itself asks again after a timeout, 429 or 5xx."""
        limit = {"max_tokens": self.judge.reply_tokens} if self.judge.reply_tokens else {}
        try:
            got = client.chat.completions.create(
                model=self.judge.model,
                messages=[{"role": "user", "content": question.text}],
                temperature=self.judge.temperature,
                **limit,
            )
            text = str(got.choices[0].message.content or "")
            tokens = _count(getattr(got.usage, "total_tokens", 0))
        except Exception as error:  # whatever a server may send
            return Reply(failed=self._safely(f"{type(error).__name__}: {error}"))
        grades = read(text, question.fence, question.grades)
        if grades is None:
            return Reply(tokens=tokens, failed=f"unreadable reply: {self._safely(text)[:120]!r}")
        return Reply(grades, tokens)

    def _safely(self, text: str) -> str:
        """Return one short line without the key, or a part of it; cut last, since half a key is not found."""
        line = " ".join(text[:READ].encode("utf-8", "backslashreplace").decode().split())  # a table holds no surrogates
        return redacted(line, self.secret)[:200]


def redacted(text: str, secret: str) -> str:
    """Return a text in which no PART characters in a row are those of a secret."""
    part = min(PART, len(secret)) or 1
    parts = {secret[i : i + part] for i in range(len(secret) - part + 1)} - {""}
    found = (i for i in range(len(text)) if text[i : i + part] in parts)
    hidden = {place for i in found for place in range(i, i + part)}
    runs = groupby(range(len(text)), hidden.__contains__)
    return "".join("(key)" if within else "".join(text[i] for i in run) for within, run in runs)


def asked_about(
    rubric: Template, grades: int, repeat: int, prompt: str | list[Message], first: str, second: str = ""
) -> Question:
    """Return a rubric with its texts, between lines that begin with a fence, which is also the key of the reply.

    Who writes an answer must not know its fence, else the answer could hold the reply for a judge that repeats what it
    reads. The fence is 128 bits of a hash over all texts: an answer that holds its own takes 2^128 tries to find. A
    secret would hide it as well, but then verdicts were not found again by content in another runs folder.
    """
    asked = prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    fence = "#" + content_digest([asked, first, second])[:FENCE_DIGITS]
    text = rubric.safe_substitute(prompt=asked, first=first, second=second, fence=fence)
    return Question(text, fence, grades, repeat)


def read(text: str, fence: str, count: int) -> tuple[float, ...] | None:
    """Return the grades of a reply, or none if it is not exactly the JSON object that was asked for.

    That is `{FENCE: grade}` for one answer, `{FENCE: {"first": grade, "second": grade}}` for two.
    """
    text = text.strip()
    block = FENCED.fullmatch(text)
    try:
        told = json.loads(block[1] if block else text, object_pairs_hook=_once)
    except (ValueError, RecursionError):  # no JSON, a number of 5,000 digits, or nested 3,000 deep
        return None
    if not isinstance(told, dict) or told.keys() != {fence}:
        return None
    grades = told[fence] if count > 1 else {"first": told[fence]}
    names = ("first", "second")[:count]
    if not isinstance(grades, dict) or grades.keys() != set(names):
        return None
    return _within([grades[name] for name in names])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object; one that names a key twice says two things."""
    told = dict(pairs)
    if len(told) < len(pairs):
        raise ValueError("a key stands twice")
    return told


def _within(values: Sequence[Any]) -> tuple[float, ...] | None:
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return tuple(map(float, values)) if numbers and all(LOWEST <= value <= HIGHEST for value in values) else None


def _count(tokens: Any) -> int:
    """Return what a server says it has counted, where it can be."""
    return tokens if type(tokens) is int and 0 <= tokens < 2**31 else 0


def _decided(calls: tuple[Call, ...], failed: str) -> Comparison:
    """Average the calls of each order, then both orders; if one call has failed there is no verdict."""
    if failed:
        return Comparison(calls=calls, failed=failed)
    orders = []
    for ours_first in (True, False):
        told = [call for call in calls if call.first is ours_first]
        orders.append(sum(win(call.ours, call.theirs) for call in told) / len(told))
    return Comparison(sum(orders) / 2, calls)
