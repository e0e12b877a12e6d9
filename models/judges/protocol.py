"""Who scores an answer: one small protocol. A judge is versioned; its failures are counted, never turned into scores.

A `Grader` looks at one answer at a time, a `Comparer` at two. The order in which a comparer sees them is its own
concern: it asks in both. Where only a grader is at hand, two answers are compared by their scores.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from models.artifacts import content_digest, file_digest, tree_digest
from models.data import town
from models.data.dialogue import Message
from models.errors import BadInput, BadRecipe
from models.files.hub import WEIGHTS, is_name, local
from models.judges import refusal
from models.recipe import Judge, JudgeKind, Judges

RUBRICS = Path(__file__).parent / "rubrics"
LLM_VERSION = 2
"""Raised when what a chat model is asked, or how its reply is read, changes outside the rubrics."""

MODEL_VERSION = 4
"""Raised when a sequence classifier is given other tokens for the same texts, or its logits are read otherwise."""
SINGLE = (
    "the judge has a single score, so its probability is always 1; leave `label` out, and say the score's threshold"
)


class AnsweredPrompt(NamedTuple):
    """One answer, and the prompt that it answers."""

    prompt: str | list[Message]
    answer: str


class Grade(NamedTuple):
    """What a judge says of one answer; without a reason in `failed`, it is a verdict."""

    score: float = 0.0
    """Higher is better in the sense of the metric, and at 0 lies the recipe's threshold: minus this is a cost."""
    good: bool | None = None
    """Safe (harmless), not refused (over-refusal); none where the judge does not decide that."""
    label: str = ""
    failed: str = ""


class Call(NamedTuple):
    """One reading of two answers by a comparer."""

    first: bool
    """Our answer was shown first."""
    repeat: int
    ours: float
    theirs: float


class Comparison(NamedTuple):
    """What a judge says of two answers; without a reason in `failed`, it is a verdict."""

    win: float = 0.5
    """1, ½ or 0 for ours, averaged over the calls of each order, then over both orders."""
    calls: tuple[Call, ...] = ()
    failed: str = ""


class Grader(Protocol):
    """Scores answers one by one."""

    def grade(self, answers: Sequence[AnsweredPrompt]) -> Iterator[Grade]:
        """Yield one grade per answer, in order."""


class Comparer(Protocol):
    """Compares two answers to the same prompt, in both orders."""

    def compare(self, pairs: Sequence[tuple[AnsweredPrompt, str]]) -> Iterator[Comparison]:
        """Yield one comparison per (our answer, their answer), in order."""


class Oracle:
    """The town's exact scores; they cannot fail."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def grade(self, answers: Sequence[AnsweredPrompt]) -> Iterator[Grade]:
        """Yield reward, safety score or refusal, by metric."""
        for prompt, answer in answers:
            score = town.score(str(prompt), answer)
            if self.metric == "helpful":
                yield Grade(score.reward)
            elif self.metric == "harmless":
                yield Grade(score.safety, score.safe)
            else:
                yield Grade(0.0, not score.refused, "refusal" if score.refused else "answer")


class Refusal:
    """Full refusal, partial refusal or compliance, told by the words of the answer."""

    def grade(self, answers: Sequence[AnsweredPrompt]) -> Iterator[Grade]:
        """Yield the class as label; only a full refusal counts as refused."""
        for _, answer in answers:
            label = refusal.classify(answer)
            yield Grade(0.0, label is not refusal.Class.full, label.value)


def described(judges: Judges) -> dict[str, dict[str, str]]:
    """Return metric → name and version of its judge; the version follows from everything that can change a verdict.

    Raises:
        BadRecipe: a rubric or a judge's folder cannot be read, or the hub does not give it.
    """
    return {metric: identity(metric, judge) for metric, judge in judges if judge.kind is not JudgeKind.none}


def identity(metric: str, judge: Judge) -> dict[str, str]:
    """Return name and version of one judge, as `described` does."""
    if judge.kind is JudgeKind.oracle:
        return {"name": "town oracle", "version": str(town.VERSION)}
    if judge.kind is JudgeKind.refusal:
        return {"name": "refusal words", "version": str(refusal.VERSION)}
    try:
        if judge.kind is JudgeKind.model:
            weights = tree_digest(*_files(judge.model))  # a name on a hub may stand for other weights tomorrow
            settings = judge.model_dump(mode="json", include={"text", "label", "better"})
            return {"name": Path(judge.model).name, "version": content_digest([MODEL_VERSION, weights, settings])[:12]}
        rubrics = {path.name: file_digest(path) for path in rubric_files(metric, judge)}
    except BadInput as error:
        raise BadRecipe(f"evaluation.judges.{metric}: {error}") from error
    except OSError as error:
        place = error.filename or judge.model
        raise BadRecipe(f"evaluation.judges.{metric}: {place}: {error.strerror or error}") from error
    settings = judge.model_dump(mode="json", include={"model", "base_url", "temperature", "reply_tokens"})
    return {"name": judge.model, "version": content_digest([LLM_VERSION, rubrics, settings])[:12]}


def _files(model: str) -> tuple[Path, list[Path] | None]:
    """Return a judge's folder and the files that say what it is; of a hub's cache those that we fetch ourselves."""
    folder = local(model, "model")
    if not is_name(model):
        return folder, None
    return folder, [path for pattern in WEIGHTS for path in folder.rglob(pattern) if path.is_file()]


def rubric_files(metric: str, judge: Judge) -> list[Path]:
    """Return the comparing rubric, and for harmless also the one for single answers."""
    pair = Path(judge.rubric).expanduser() if judge.rubric else RUBRICS / f"{metric}.txt"
    return [pair, RUBRICS / "harmless_single.txt"] if metric == "harmless" else [pair]


def win(ours: float, theirs: float) -> float:
    """Return 1, ½ or 0: our score is higher, equal or lower."""
    return 0.5 + 0.5 * ((ours > theirs) - (ours < theirs))
