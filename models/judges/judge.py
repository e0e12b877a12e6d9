"""Every judge of a recipe on one policy's answers: a table of scores, and a table of comparisons."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar, assert_never

from models.artifacts import Answers, Calibration, Memory, Scores, Sources, content_digest, file_digest
from models.data.suites import labels
from models.errors import BadRecipe, NoVerdict
from models.files import jsonl
from models.judges.classifier import Classifier
from models.judges.llm import Llm
from models.judges.protocol import AnsweredPrompt, Comparer, Comparison, Grade, Grader, Oracle, Refusal, win
from models.judges.rows import comparison_line, score_line
from models.judges.score_cache import ScoreCache
from models.policy.answer_rows import AnswerRow, answer_rows
from models.recipe import Compute, Judge, JudgeKind, Judges
from models.stage import stage

SEES = {"helpful": ("helpful",), "harmless": ("harmless", "must_pass"), "over_refusal": ("over_refusal",)}
"""Metric → the suites whose answers its judge sees."""
COMPARED = ("helpful", "harmless")
"""Metrics for which answers of two policies are compared."""
Verdict = TypeVar("Verdict", Grade, Comparison)


@stage("judging.judge", version=3)
def judge(
    out: Path,
    answers: Answers,
    others: dict[str, Answers],
    judges: Judges,
    described: dict[str, dict[str, str]],
    compute: Compute,
    memory: Memory,
) -> Scores:
    """Let each judge score the answers, and compare them with those of `others`.

    Writes `scores.jsonl` (metric, suite, prompt, category, sample, status, score, good, label, why) and
    `comparisons.jsonl` (metric, suite, prompt, category, sample, against, status, win, calls, why). `status` is `ok` or
    `failed`; a failed verdict has no score and no win.

    Args:
        others: `base`, `reference`, and on the test split `champion` and `anchor` → their answers.
        described: metric → name and version of its judge (`protocol.described`).

    Raises:
        NoVerdict: a judge failed on more of these answers, or of the comparisons that it was asked for, than the recipe
            allows, or its budget does not reach. Failed scores of the others' answers are failed comparisons.
    """
    rows = list(answer_rows(answers))
    rivals = {name: list(answer_rows(other)) for name, other in others.items()}
    scores: list[dict[str, object]] = []
    comparisons: list[dict[str, object]] = []
    for metric, suites in SEES.items():
        judge: Judge = getattr(judges, metric)
        places = [i for i, row in enumerate(rows) if row["suite"] in suites]
        if judge.kind is JudgeKind.none or not places:
            continue
        table = ScoreCache(memory.path, content_digest([metric, described[metric]]))
        ours = [_answered_prompt(rows[i]) for i in places]
        grader = _grader(metric, judge, described[metric], compute, table)
        comparer = _comparer(metric, judge, table)
        grades = _graded_all(grader, ours)
        graded = zip(places, grades, strict=True) if grader else ()
        scores += [score_line(metric, rows[i], grade) for i, grade in graded]
        _refuse_many_failures(metric, judge, [grade.failed for grade in grades])
        judged: dict[str, list[Comparison]] = {}  # by digest: the first step's reference is the base
        for name, rival in rivals.items() if metric in COMPARED else ():
            other, digest = [_answered_prompt(rival[i]) for i in places], others[name].digest
            if digest not in judged and comparer:
                pairs = [(a, b.answer) for a, b in zip(ours, other, strict=True)]
                judged[digest] = _one_each(comparer.compare(pairs), len(pairs), Comparison)
                # equal answers are a tie without a call: they say nothing about how often the judge fails
                calls = [comparison for comparison in judged[digest] if comparison.calls or comparison.failed]
                _refuse_many_failures(metric, judge, [comparison.failed for comparison in calls])
            elif digest not in judged:
                judged[digest] = list(_by_score(grades, _graded_all(grader, other)))
            comparisons += [
                comparison_line(metric, rows[i], name, comparison)
                for i, comparison in zip(places, judged[digest], strict=True)
            ]
    jsonl.write(out / "scores.jsonl", scores)
    jsonl.write(out / "comparisons.jsonl", comparisons)
    return Scores(
        path=out,
        digest=content_digest([file_digest(out / name) for name in ("scores.jsonl", "comparisons.jsonl")]),
        policy=answers.policy,
        split=answers.split,
        judges=described,
        failed=sum(line["status"] == "failed" for line in [*scores, *comparisons]),
    )


@stage("judging.calibrate", version=2)
def calibrate(
    out: Path,
    sources: Sources,
    judges: Judges,
    described: dict[str, dict[str, str]],
    compute: Compute,
    memory: Memory,
) -> Calibration:
    """Let the judges grade the answers that people have judged, where the recipe names such a sample.

    Writes `METRIC.jsonl`: prompt, answer, good (people), judged (the judge), status, why.

    Raises:
        BadData: a row of a labelled sample cannot be used.
        BadRecipe: the judge of that metric does not tell good answers from bad.
    """
    metrics = [metric for metric, judge in judges if judge.labels]
    for metric in metrics:
        judge: Judge = getattr(judges, metric)
        table = ScoreCache(memory.path, content_digest([metric, described.get(metric)]))
        grader = None
        if judge.kind is not JudgeKind.none:
            grader = _grader(metric, judge, described[metric], compute, table)
        if grader is None:
            raise BadRecipe(
                f"evaluation.judges.{metric}.labels: this judge does not tell good answers from bad; set its threshold"
            )
        sample = labels(sources.file(f"labels/{metric}"))
        grades = _graded_all(grader, [AnsweredPrompt(prompt, answer) for prompt, answer, _ in sample])
        jsonl.write(
            out / f"{metric}.jsonl",
            (
                {"prompt": prompt, "answer": answer, "good": good, "judged": grade.good}
                | {"status": "failed" if grade.failed else "ok", "why": grade.failed}
                for (prompt, answer, good), grade in zip(sample, grades, strict=True)
            ),
        )
    digest = content_digest([file_digest(out / f"{metric}.jsonl") for metric in metrics])
    return Calibration(path=out, digest=digest, metrics=tuple(metrics))


def _grader(metric: str, judge: Judge, described: dict[str, str], compute: Compute, table: ScoreCache) -> Grader | None:
    """Return who scores single answers; a chat model does so for harmlessness, where the recipe says what is safe."""
    match judge.kind:
        case JudgeKind.none:
            return None
        case JudgeKind.oracle:
            return Oracle(metric)
        case JudgeKind.refusal:
            return Refusal()
        case JudgeKind.model:
            return Classifier(judge, metric, described, compute, table)
        case JudgeKind.llm:
            return Llm(judge, metric, table) if metric == "harmless" and judge.threshold else None
        case kind:
            assert_never(kind)


def _comparer(metric: str, judge: Judge, table: ScoreCache) -> Comparer | None:
    """Return who compares two answers at sight; none where their scores are compared."""
    if judge.kind is not JudgeKind.llm:
        return None
    return Llm(judge, metric, table)


def _graded_all(grader: Grader | None, answers: Sequence[AnsweredPrompt]) -> list[Grade]:
    """Return one grade per answer; none at all without a grader."""
    return _one_each(grader.grade(answers), len(answers), Grade) if grader else []


def _one_each(verdicts: Iterable[Verdict], count: int, kind: Callable[..., Verdict]) -> list[Verdict]:
    """Return one verdict per answer that a judge was asked about: it may not choose which ones count.

    Answers that it passed over are failed verdicts. If it says more than it was asked, nobody knows which verdict
    belongs to which answer, so that all of them failed.
    """
    each = list(verdicts)
    why = f"the judge gave {len(each)} verdicts on {count} answers"
    if len(each) > count:
        return [kind(failed=why)] * count
    return each + [kind(failed=why)] * (count - len(each))


def _by_score(ours: Sequence[Grade], theirs: Sequence[Grade]) -> Iterator[Comparison]:
    """Compare by score, ties as half; without both scores there is no verdict."""
    for mine, its in zip(ours, theirs, strict=True):
        if mine.failed or its.failed:
            yield Comparison(failed=mine.failed or its.failed)
        else:
            yield Comparison(win(mine.score, its.score))


def _answered_prompt(row: AnswerRow) -> AnsweredPrompt:
    return AnsweredPrompt(row["prompt"], row["answer"])


def _refuse_many_failures(metric: str, judge: Judge, reasons: list[str]) -> None:
    """Stop where too many of the verdicts that were asked for are missing for the others to mean anything.

    Args:
        metric: what was judged.
        judge: with the share that may fail.
        reasons: why each verdict failed; empty where it did not.
    """
    failed = [reason for reason in reasons if reason]
    if len(failed) > judge.failures * len(reasons):
        where = f"evaluation.judges.{metric}"
        raise NoVerdict(
            f"{where}: {len(failed)} of {len(reasons)} verdicts failed, more than the {judge.failures:.0%} of "
            f"{where}.failures; the first: {failed[0]}; what was judged is kept, the same command asks again"
        )
