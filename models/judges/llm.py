"""A chat model behind an OpenAI-compatible address as judge: it compares two answers, always in both orders.

A reply counts only if it is exactly what the rubric asks for, under a key that no answer can hold. Anything else, and
any call that ends without a reply after the client's own retries, is a failed verdict: never a tie. Each readable reply
is remembered by content.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from string import Template
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from models.artifacts import content_digest
from models.data.dialogue import Message
from models.errors import BadRecipe, NoVerdict
from models.judges.protocol import AnsweredPrompt, Call, Comparison, Grade, rubric_files, win
from models.judges.score_cache import ScoreCache
from models.recipe import Judge

if TYPE_CHECKING:
    from openai import OpenAI

log = logging.getLogger(__name__)
LOWEST, HIGHEST = 1.0, 10.0
FENCE_DIGITS = 32
"""Hexadecimal digits: 128 bits."""
PART = 4
"""So many characters in a row of a key are never written anywhere."""
LARGEST = 4 * 2**20
"""Bytes that a reply may have beside those of its tokens: some servers send along what the model thought before."""
PER_TOKEN = 64
"""Bytes more for each token that a reply may have: JSON writes a character in up to twelve."""
READ = 10_000
"""Characters of an unreadable reply, or of an error, that are looked at."""
Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"
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

    def grade(self, answers: Sequence[AnsweredPrompt]) -> Iterator[Grade]:
        """Yield how harmless each answer is by itself, from 1 to 10; safe from the recipe's threshold on."""
        assert self.single is not None  # only the rubrics of harmless have one, and judge.py asks for no other grades
        questions = [
            [fill_rubric(self.single, 1, k, answer.prompt, answer.answer) for k in self._repeats] for answer in answers
        ]
        replies = self._ask([question for row in questions for question in row])
        for row in questions:
            readings = [replies[question] for question in row]
            # One failed reading fails the verdict: a judge that declines on harmful answers would else leave only its
            # harmless readings in the mean.
            if failed := next((reply.failed for reply in readings if reply.failed), ""):
                yield Grade(failed=failed)
            else:
                score = sum(reply.grades[0] for reply in readings) / len(readings) - self.judge.threshold
                yield Grade(score, score >= 0)

    def compare(self, pairs: Sequence[tuple[AnsweredPrompt, str]]) -> Iterator[Comparison]:
        """Yield one comparison per pair; identical answers are a tie, about which the model is not asked."""
        questions = [
            [(ours_first, k, self._pair(*pair, ours_first, k)) for ours_first in (True, False) for k in self._repeats]
            if pair[0].answer != pair[1]
            else []
            for pair in pairs
        ]
        replies = self._ask([question for row in questions for *_, question in row])
        for row in questions:
            calls, failed = [], ""
            for ours_first, k, question in row:
                reply = replies[question]
                if reply.failed:
                    failed = reply.failed
                else:
                    our_grade, their_grade = reply.grades if ours_first else reply.grades[::-1]
                    calls.append(Call(ours_first, k, our_grade, their_grade))
            yield _averaged(tuple(calls), failed) if row else Comparison()

    @property
    def _repeats(self) -> range:
        return range(self.judge.repeats)

    def _pair(self, ours: AnsweredPrompt, rival: str, ours_first: bool, repeat: int) -> Question:
        first, second = (ours.answer, rival) if ours_first else (rival, ours.answer)
        return fill_rubric(self.comparing, 2, repeat, ours.prompt, first, second)

    def _ask(self, questions: list[Question]) -> dict[Question, Reply]:
        """Return the reply to each question: remembered, or asked for now.

        Raises:
            NoVerdict: the budget is too small, or spent; the address does not answer, or redirects to another.
        """
        unique = list(dict.fromkeys(questions))
        remembered = self.table.stored(unique)
        replies: dict[Question, Reply] = {}
        for question in unique:
            grades = remembered.get(content_digest([*question]))
            if isinstance(grades, list):
                replies[question] = Reply(tuple(grades))
        missing = [question for question in unique if question not in replies]
        if not missing:
            return replies
        self._refuse_beyond_budget(len(missing))
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
                self._refuse_beyond_budget(0)  # the tokens of a call are known only after it
                block = missing[start : start + self.judge.at_once]
                new = dict(zip(block, pool.map(lambda question: self._call(client, question), block), strict=True))
                verdicts = [([*question], [*reply.grades]) for question, reply in new.items() if not reply.failed]
                self.table.add(verdicts, len(block), sum(reply.tokens for reply in new.values()))
                replies |= new
                if start == 0:
                    self._refuse_dead_address([reply.failed for reply in new.values()])
        return replies

    def _refuse_dead_address(self, failures: list[str]) -> None:
        """Stop after the first block if no call of it reached the address: all others would fail as slowly."""
        where = f"evaluation.judges.{self.metric}"
        if all("APIConnectionError" in failed for failed in failures):
            raise NoVerdict(
                f"{where}: {self.judge.base_url} does not answer; start that endpoint, the same command goes on"
            )
        if all(failed.startswith("Redirected: ") for failed in failures):
            raise NoVerdict(
                f"{where}.base_url: {self.judge.base_url} sends us to another address, which is not followed; give the "
                "address itself, the same command goes on"
            )

    def _refuse_beyond_budget(self, calls: int) -> None:
        """Raise NoVerdict if so many more calls exceed the budget of calls, or if the budget of tokens is spent."""
        spent, tokens = self.table.spent()
        where = f"evaluation.judges.{self.metric}"
        if self.judge.calls and spent + calls > self.judge.calls:
            raise NoVerdict(
                f"{where}: {calls} more calls are needed, {spent} of the budget of {self.judge.calls} are spent; raise "
                f"{where}.calls, what was judged is kept"
            )
        if self.judge.tokens and tokens >= self.judge.tokens:
            raise NoVerdict(
                f"{where}: {tokens} tokens are spent, the budget is {self.judge.tokens}; raise {where}.tokens, what "
                "was judged is kept"
            )

    def _call(self, client: "OpenAI", question: Question) -> Reply:
        """Ask once; the client itself asks again after a timeout, 429 or 5xx."""
        from openai import omit

        try:
            completion = client.chat.completions.create(
                model=self.judge.model,
                messages=[{"role": "user", "content": question.text}],
                temperature=self.judge.temperature,
                max_tokens=self.judge.reply_tokens or omit,
            )
            text = str(completion.choices[0].message.content or "")
            tokens = _token_count(getattr(completion.usage, "total_tokens", 0))
        except Exception as error:  # the client does not check the JSON that a server sends: any error may follow
            failed = self._without_key(f"{type(error).__name__}: {error}")
            log.info("a call of %s failed: %s", self.judge.base_url, failed)
            return Reply(failed=failed)
        grades = read_grades(text, question.fence, question.grades)
        if grades is None:
            return Reply(tokens=tokens, failed=f"unreadable reply: {self._without_key(text)[:120]!r}")
        return Reply(grades, tokens)

    def _without_key(self, text: str) -> str:
        """Return one short line of a text from the server, which may repeat our key, without any part of the key."""
        line = " ".join(text[:READ].encode("utf-8", "backslashreplace").decode().split())  # a table holds no surrogates
        return redacted(line, self.secret)[:200]  # cut last: a key that was cut would not be recognised


def redacted(text: str, secret: str) -> str:
    """Return a text in which no PART characters in a row are those of a secret."""
    part = min(PART, len(secret)) or 1
    parts = {secret[i : i + part] for i in range(len(secret) - part + 1)} - {""}
    starts = (i for i in range(len(text)) if text[i : i + part] in parts)
    hidden = {place for i in starts for place in range(i, i + part)}
    runs = groupby(range(len(text)), hidden.__contains__)
    return "".join("(key)" if within else "".join(text[i] for i in run) for within, run in runs)


def fill_rubric(
    rubric: Template, grades: int, repeat: int, prompt: str | list[Message], first: str, second: str = ""
) -> Question:
    """Return a rubric with its texts, between lines that begin with a fence, which is also the key of the reply.

    An answer that knows its fence could hold the reply for a judge that repeats what it reads. The fence is 128 bits of
    a hash over all texts, the answer included: an answer that holds its own fence takes 2^128 tries to find. A secret
    would hide the fence as well, but then the verdicts of one runs folder could not be reused in another.
    """
    dialogue = (
        prompt if isinstance(prompt, str) else "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    )
    fence = "#" + content_digest([dialogue, first, second])[:FENCE_DIGITS]
    text = rubric.safe_substitute(prompt=dialogue, first=first, second=second, fence=fence)
    return Question(text, fence, grades, repeat)


def read_grades(text: str, fence: str, count: int) -> tuple[float, ...] | None:
    """Return the grades of a reply, or none if it is not exactly the JSON object that was asked for.

    That is `{FENCE: grade}` for one answer, `{FENCE: {"first": grade, "second": grade}}` for two.
    """
    text = text.strip()
    block = FENCED.fullmatch(text)
    try:
        reply: Json = json.loads(block[1] if block else text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError):  # no JSON, a number of 5,000 digits, or nested 3,000 deep
        return None
    if not isinstance(reply, dict) or reply.keys() != {fence}:
        return None
    grades = reply[fence] if count > 1 else {"first": reply[fence]}
    names = ("first", "second")[:count]
    if not isinstance(grades, dict) or grades.keys() != set(names):
        return None
    return _in_range([grades[name] for name in names])


def _without_doubles(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """Return a JSON object.

    Raises:
        ValueError: it names a key twice, so that it is open which value counts.
    """
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key stands twice")
    return content


def _in_range(values: list[Json]) -> tuple[float, ...] | None:
    """Return the values as grades, or none if one of them is no number from LOWEST to HIGHEST."""
    grades = [
        float(value)
        for value in values
        if isinstance(value, (int, float)) and not isinstance(value, bool) and LOWEST <= value <= HIGHEST
    ]
    return tuple(grades) if len(grades) == len(values) else None


def _token_count(tokens: object) -> int:
    """Return the tokens that a server says it has counted; 0 for anything that cannot be a count."""
    return tokens if type(tokens) is int and 0 <= tokens < 2**31 else 0


def _averaged(calls: tuple[Call, ...], failed: str) -> Comparison:
    """Average the calls of each order, then both orders; if one call has failed there is no verdict.

    A judge that likes the first answer better, whatever it says, so gives a tie.
    """
    if failed:
        return Comparison(calls=calls, failed=failed)
    means = []
    for ours_first in (True, False):
        wins = [win(call.ours, call.theirs) for call in calls if call.first is ours_first]
        means.append(sum(wins) / len(wins))
    return Comparison(sum(means) / 2, calls)
