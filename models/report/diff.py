"""Is run B better than run A, and is it safe enough? What differs in recipe and data, and what the prompts say."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from models.errors import BadInput
from models.files import jsonl, sealed
from models.judges.rows import ComparisonRow, ScoreRow, comparison_row, score_row
from models.metrics.figures import matched_wins, prompt_means
from models.metrics.judge_agreement import between
from models.metrics.reported import Figure
from models.metrics.statistics import Estimate, bounded_mean
from models.recipe.record import flat
from models.report.tree import SCHEMA, CandidateEntry, ConstraintEntry, Report, VerdictEntry

COMPARED = ("helpful/win_rate", "harmless/safety_rate", "over_refusal", "kl_base", "length")
"""Figures that are shown side by side."""


@dataclass(frozen=True)
class Side:
    """One run, and the candidate of it that is compared."""

    folder: Path
    tree: Report
    candidate: CandidateEntry
    stands_in: bool = False
    """The run chose none: this is its last candidate."""

    @property
    def called(self) -> str:
        """The candidate and where it comes from: two runs may choose candidates of one name."""
        registered, recipe = self.tree["registry"], self.tree["recipe"]
        origin = f"{recipe['name']} {recipe['digest'][:7]}"
        if registered and self.tree["chosen"] and self.candidate["name"] == self.tree["chosen"]["candidate"]:
            origin = f"{registered['name']} version {registered['version']}"
        none = ", whose last candidate it is: none was chosen" if self.stands_in else ""
        return f"{self.candidate['name']} ({origin}{none})"

    def scores(self, metric: str, split: str) -> list[ScoreRow]:
        """Return what a judge said of the candidate's answers to the prompts of one split."""
        return [row for of_split, row in self._scores if (of_split, row.metric) == (split, metric)]

    def comparisons(self, metric: str, split: str) -> list[ComparisonRow]:
        """Return what a judge said of the candidate's answers to the prompts of one split beside the base's."""
        wanted = (split, metric, "base")
        return [row for of_split, row in self._comparisons if (of_split, row.metric, row.against) == wanted]

    @cached_property
    def splits(self) -> set[str]:
        """The splits whose prompts the candidate has answered."""
        with self._readable("answers") as rows:
            return {str(row["split"]) for row in rows if "split" in row}

    @cached_property
    def _scores(self) -> list[tuple[str, ScoreRow]]:
        with self._readable("scores") as rows:
            return [(row.get("split", ""), score_row(row)) for row in rows]

    @cached_property
    def _comparisons(self) -> list[tuple[str, ComparisonRow]]:
        with self._readable("comparisons") as rows:
            return [(row.get("split", ""), comparison_row(row)) for row in rows]

    @contextmanager
    def _readable(self, table: str) -> Iterator[Iterator[jsonl.Row]]:
        """Hand out the rows of a table about the candidate.

        Raises:
            BadInput: the table cannot be read.
        """
        place = self.folder / "tables" / f"{table}.jsonl"
        try:
            yield (row for row in jsonl.read(place) if row["candidate"] == self.candidate["name"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{place}: cannot be read; run the same command again to renew the report") from error

    @property
    def tested(self) -> VerdictEntry | None:
        """The candidate's test of the constraint, if there was one."""
        tests = self.tree["constraints"][0]["tested"]
        return next((test for test in tests if test["candidate"] == self.candidate["name"]), None)

    @property
    def requirement(self) -> dict[str, float | str]:
        """What the candidate had to show, and on which harmful prompts."""
        constraint = self.tree["constraints"][0]
        suite = constraint["suites"].get("harmless") if constraint["suites"] else self.tree["suites"].get("harmless")
        return {
            "at_least": constraint["at_least"],
            "confidence": constraint["confidence"],
            "harmful prompts": suite["version"] if suite else "",
        }


@dataclass(frozen=True)
class Difference:
    """What `sacpo diff` says."""

    recipe: list[tuple[str, str, str]]
    """Key, value in A, value in B, where they differ."""
    data: list[tuple[str, str, str]]
    """Role of the file, digest in A, digest in B, where they differ."""
    figures: list[tuple[str, Figure | None, Figure | None]]
    """Metric, figure of A, figure of B."""
    better: Estimate | None
    """How often B's helpful answer beats A's to the same prompt; none if they cannot be compared."""
    even: float
    """What `better` is if neither is better: ½ where answers of A and B are compared, 0 where it is the difference of
    their win rates against the common base, because the judge has compared each with the base only."""
    split: str
    """The prompts that this is about."""
    why_not: str
    tested: VerdictEntry | None
    """B's test of the constraint, if there was one."""
    constraint: ConstraintEntry
    unlike: list[str]
    """What A and B did not have to show alike: `at_least`, `confidence`, `harmful prompts`."""
    judges: list[tuple[str, Estimate]]
    """Metric, and how often the judges of A and B say the same, where both judged answers of the same policy."""

    @property
    def holds(self) -> bool:
        """B is shown to be better, and to hold the bound that A had to hold, on the same harmful prompts."""
        better = self.better is not None and self.better.low > self.even
        safe = self.tested is not None and bool(self.tested["n"]) and self.tested["holds"]
        return better and safe and not self.unlike


def side(folder: Path, policy: str = "") -> Side:
    """Return the run in a folder with `report.json`, and its chosen candidate (or the last), or the one with a digest.

    Raises:
        BadInput: the folder holds no report, or none of that policy.
    """
    folder = folder.parent if folder.name == "report.json" else folder
    # an older report fails the check of its type below, and deserves a sentence of its own
    some_record = sealed.read(folder / "report.json", dict[str, Any])
    if some_record and some_record.get("schema", SCHEMA) != SCHEMA:
        raise BadInput(f"{folder}: the report was made by an older sacpo; run the same command again to renew it")
    tree = sealed.read(folder / "report.json", Report)
    if tree is None:
        raise BadInput(
            f"{folder}: holds no report.json that can be read; give the folder of a report, or models:/NAME@ALIAS"
        )
    name = tree["chosen"]["candidate"] if tree["chosen"] else tree["candidates"][-1]["name"]
    candidates = [c for c in tree["candidates"] if (c["digest"] == policy if policy else c["name"] == name)]
    if not candidates:
        raise BadInput(f"{folder}: the report has no candidate with digest {policy[:12]}")
    return Side(folder, tree, candidates[0], stands_in=not policy and tree["chosen"] is None)


def difference(a: Side, b: Side) -> Difference:
    """Compare two runs, prompt by prompt where they answered the same prompts before the same judge."""
    figures = [(name, a.candidate["metrics"].get(name), b.candidate["metrics"].get(name)) for name in COMPARED]
    both = a.splits & b.splits
    # the test split chose neither candidate; the other split did, so its figures flatter them
    split = "test" if "test" in both else min(both, default="")
    better, even, why_not = _better(a, b, split)
    return Difference(
        recipe=_changed(flat(a.tree["recipe"]["settings"]), flat(b.tree["recipe"]["settings"])),
        data=_changed(a.tree["data"], b.tree["data"]),
        figures=[(name, x, y) for name, x, y in figures if x or y],
        better=better,
        even=even,
        split=split,
        why_not=why_not,
        tested=b.tested,
        constraint=b.tree["constraints"][0],
        unlike=[key for key, value in a.requirement.items() if value != b.requirement[key]],
        judges=_agreement(a, b, split) if a.candidate["digest"] == b.candidate["digest"] else [],
    )


def sentence(a: Side, b: Side, difference: Difference) -> str:
    """Say in one line whether B is better than A, and safe enough."""
    if difference.better is None:
        first = f"{b.called} against {a.called}: not decided: {difference.why_not}"
    else:
        value, low, high = difference.better.value, difference.better.low, difference.better.high
        even = difference.even
        how = "is better than" if low > even else "is worse than" if high < even else "is not shown to differ from"
        wins = (
            "wins {:.3f} [{:.3f}, {:.3f}] of"
            if even
            else "their win rates against the base differ by {:+.3f} [{:+.3f}, {:+.3f}] on"
        )
        first = f"{b.called} {how} {a.called}: {wins.format(value, low, high)} {difference.better.n} prompts"
        if difference.better.failed:
            first += f" ({difference.better.failed} without a verdict)"
        if difference.split != "test":  # a candidate looks better on the prompts on which it was chosen
            first += f" of the {difference.split} split, which chose the candidates"
    at_least, confidence = difference.constraint["at_least"], difference.constraint["confidence"]
    if difference.tested is None:
        return f"{first}; its safety was not tested"
    holds = "is safe enough" if difference.tested["holds"] else "is not shown to be safe enough"
    apart = (
        f"; A and B differ in {' and '.join(difference.unlike)}, so that this compares no equals"
        if difference.unlike
        else ""
    )
    if not difference.tested["n"]:
        incidents = len(difference.tested["incidents"])
        return f"{first}; of prompts that must pass it fails {incidents}, no others were asked{apart}"
    rate, bound = difference.tested["value"], difference.tested["lower_bound"]
    return (
        f"{first}; it {holds}: safety rate {rate:.3f}, at least {bound:.3f} "
        f"with confidence {confidence:g}, bound {at_least:g}{apart}"
    )


def _agreement(a: Side, b: Side, split: str) -> list[tuple[str, Estimate]]:
    """Compare good or bad where answers are graded so, and who won against the base where they are compared."""
    compared = between(a.comparisons("helpful", split), b.comparisons("helpful", split), lambda row: row.win)
    agreements = [("helpful", compared)]
    for metric in ("harmless", "over_refusal"):
        graded = between(a.scores(metric, split), b.scores(metric, split), lambda row: row.good)
        agreements.append((metric, graded))
    return [(metric, agreement) for metric, agreement in agreements if agreement.n]


def _better(a: Side, b: Side, split: str) -> tuple[Estimate | None, float, str]:
    """Return how B does beside A over the prompts that both answered, what that is if they are equal, or why not."""
    judges = [side.tree["judges"].get("helpful") for side in (a, b)]
    if not all(judges):
        return None, 0.5, "no judge of helpfulness"
    if judges[0] != judges[1]:
        return None, 0.5, "they had different judges of helpfulness"
    wins = matched_wins(b.scores("helpful", split), a.scores("helpful", split)).values()
    # scores of both runs on the same prompts compare them directly, which tells more than two comparisons with a base
    if any(won is not None for won in wins):
        return _cautious(list(wins), (0.0, 1.0)), 0.5, ""
    # win rates against a base compare two policies only if it is one and the same base
    if a.tree["candidates"][0]["digest"] != b.tree["candidates"][0]["digest"]:
        return None, 0.5, "they share no scores, and their bases differ"
    of_a, of_b = (prompt_means(side.comparisons("helpful", split), lambda row: row.win) for side in (a, b))
    gains = [_gain(of_a[prompt], of_b[prompt]) for prompt in of_a if prompt in of_b]
    if all(gain is None for gain in gains):
        return None, 0.5, "they answered no prompt in common"
    return _cautious(gains, (-1.0, 1.0)), 0.0, ""


def _cautious(values: list[float | None], ends: tuple[float, float]) -> Estimate:
    """Return the mean over prompts; one without a verdict counts against either end of the interval."""
    numbers = [value for value in values if value is not None]
    low, high = (bounded_mean([end if value is None else value for value in values], ends=ends) for end in ends)
    return replace(bounded_mean(numbers, len(values) - len(numbers), ends=ends), low=low.low, high=high.high)


def _gain(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _changed(a: Mapping[str, object], b: Mapping[str, object]) -> list[tuple[str, str, str]]:
    keys = list(dict.fromkeys([*a, *b]))
    return [(key, str(a.get(key, "–")), str(b.get(key, "–"))) for key in keys if a.get(key) != b.get(key)]
