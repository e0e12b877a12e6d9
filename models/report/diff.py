"""Is run B better than run A, and is it safe enough? What differs in recipe and data, and what the prompts say."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from models.errors import BadInput
from models.files import jsonl, sealed
from models.metrics.figures import matched_wins, prompt_means
from models.metrics.judge_agreement import between
from models.metrics.statistics import Estimate, bounded_mean
from models.recipe.record import flat
from models.report.report import SCHEMA

Tree = dict[str, Any]


class Report(TypedDict):
    """What of a report is compared."""

    schema: int
    recipe: dict[str, Any]
    data: dict[str, Any]
    candidates: list[dict[str, Any]]
    constraints: list[dict[str, Any]]
    chosen: dict[str, Any] | None


@dataclass(frozen=True)
class Side:
    """One run, and the candidate of it that is compared."""

    folder: Path
    tree: Tree
    candidate: Tree
    stands_in: bool = False
    """The run chose none: this is its last candidate."""

    @property
    def called(self) -> str:
        """The candidate and where it comes from: two runs may choose candidates of one name."""
        registered, recipe = self.tree["registry"], self.tree["recipe"]
        chosen = registered and self.candidate["name"] == self.tree["chosen"]["candidate"]
        origin = (
            f"{registered['name']} version {registered['version']}"
            if chosen
            else f"{recipe['name']} {recipe['digest'][:7]}"
        )
        none = ", whose last candidate it is: none was chosen" if self.stands_in else ""
        return f"{self.candidate['name']} ({origin}{none})"

    def rows(self, table: str, metric: str, split: str) -> list[Tree]:
        """Return the rows of a table about the candidate, one metric and the prompts of one split."""
        own = self._own(table)
        return [row for row in own if (row.get("metric"), row.get("split")) == (metric, split)]

    @property
    def splits(self) -> set[str]:
        """The splits whose prompts the candidate has answered."""
        return {str(row["split"]) for row in self._own("answers") if "split" in row}

    def _own(self, table: str) -> list[Tree]:
        """Return the rows of a table about the candidate.

        Raises:
            BadInput: the table cannot be read.
        """
        place = self.folder / "tables" / f"{table}.jsonl"
        try:
            return [row for row in jsonl.read(place) if row["candidate"] == self.candidate["name"]]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput(f"{place}: cannot be read; run the same command again to renew the report") from error

    @property
    def tested(self) -> Tree | None:
        """The candidate's test of the constraint, if there was one."""
        tests = self.tree["constraints"][0]["tested"]
        return next((test for test in tests if test["candidate"] == self.candidate["name"]), None)

    @property
    def bar(self) -> dict[str, Any]:
        """What the candidate had to show, and on which harmful prompts."""
        constraint = self.tree["constraints"][0]
        suite = (constraint["suites"] or self.tree["suites"]).get("harmless", {})
        return {key: constraint[key] for key in ("at_least", "confidence")} | {"harmful prompts": suite.get("version")}


@dataclass(frozen=True)
class Difference:
    """What `sacpo diff` says."""

    recipe: list[tuple[str, str, str]]
    """Key, value in A, value in B, where they differ."""
    data: list[tuple[str, str, str]]
    """Role of the file, digest in A, digest in B, where they differ."""
    figures: list[tuple[str, Tree | None, Tree | None]]
    """Metric, figure of A, figure of B."""
    better: Estimate | None
    """How often B's helpful answer beats A's to the same prompt; none if they cannot be compared."""
    even: float
    """What `better` is if neither is better: ½ where answers of A and B are compared, 0 where it is the difference of
    their win rates against the common base, because the judge has compared each with the base only."""
    split: str
    """The prompts that this is about."""
    why_not: str
    tested: Tree | None
    """B's test of the constraint, if there was one."""
    constraint: Tree
    unlike: list[str]
    """What A and B did not have to show alike: `at_least`, `confidence`, `harmful prompts`."""
    judges: list[tuple[str, Estimate]]
    """Metric, and how often the judges of A and B say the same, where both judged answers of the same policy."""

    @property
    def holds(self) -> bool:
        """B is shown to be better, and to hold the bound that A had to hold, on the same harmful prompts."""
        better = self.better is not None and self.better.low > self.even
        held = self.tested is not None and bool(self.tested["n"]) and bool(self.tested["holds"])
        return better and held and not self.unlike


def side(folder: Path, policy: str = "") -> Side:
    """Return the run in a folder with `report.json`, and its chosen candidate (or the last), or the one with a digest.

    Raises:
        BadInput: the folder holds no report, or none of that policy.
    """
    folder = folder.parent if folder.name == "report.json" else folder
    tree = sealed.read(folder / "report.json", dict[str, Any])
    if tree and tree.get("schema", SCHEMA) != SCHEMA:
        raise BadInput(f"{folder}: the report was made by an older sacpo; run the same command again to renew it")
    if not tree or sealed.read(folder / "report.json", Report) is None:
        raise BadInput(
            f"{folder}: holds no report.json that can be read; give the folder of a report, or models:/NAME@ALIAS"
        )
    wanted = (tree["chosen"] or {"candidate": tree["candidates"][-1]["name"]})["candidate"]
    told = [c for c in tree["candidates"] if (c["digest"] == policy if policy else c["name"] == wanted)]
    if not told:
        raise BadInput(f"{folder}: the report has no candidate with digest {policy[:12]}")
    return Side(folder, tree, told[0], stands_in=not policy and tree["chosen"] is None)


def difference(a: Side, b: Side) -> Difference:
    """Compare two runs, prompt by prompt where they answered the same prompts before the same judge."""
    names = ("helpful/win_rate", "harmless/safety_rate", "over_refusal", "kl_base", "length")
    figures = [(name, a.candidate["metrics"].get(name), b.candidate["metrics"].get(name)) for name in names]
    both = a.splits & b.splits
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
        unlike=[key for key, value in a.bar.items() if value != b.bar[key]],
        judges=_agreement(a, b, split) if a.candidate["digest"] == b.candidate["digest"] else [],
    )


def sentence(a: Side, b: Side, told: Difference) -> str:
    """Say in one line whether B is better than A, and safe enough."""
    if told.better is None:
        first = f"{b.called} against {a.called}: not decided: {told.why_not}"
    else:
        value, low, high = told.better.value, told.better.low, told.better.high
        even = told.even
        how = "is better than" if low > even else "is worse than" if high < even else "is not shown to differ from"
        wins = (
            "wins {:.3f} [{:.3f}, {:.3f}] of"
            if even
            else "their win rates against the base differ by {:+.3f} [{:+.3f}, {:+.3f}] on"
        )
        first = f"{b.called} {how} {a.called}: {wins.format(value, low, high)} {told.better.n} prompts"
        if told.better.failed:
            first += f" ({told.better.failed} without a verdict)"
        if told.split != "test":  # who was chosen on these prompts looks better on them
            first += f" of the {told.split} split, which chose the candidates"
    at_least, confidence = told.constraint["at_least"], told.constraint["confidence"]
    if told.tested is None:
        return f"{first}; its safety was not tested"
    holds = "is safe enough" if told.tested["holds"] else "is not shown to be safe enough"
    apart = f"; A and B differ in {' and '.join(told.unlike)}, so that this compares no equals" if told.unlike else ""
    if not told.tested["n"]:
        return (
            f"{first}; of prompts that must pass it fails {len(told.tested['incidents'])}, no others were asked{apart}"
        )
    return (
        f"{first}; it {holds}: safety rate {told.tested['value']:.3f}, at least {told.tested['lower_bound']:.3f} "
        f"with confidence {confidence:g}, bound {at_least:g}{apart}"
    )


def _agreement(a: Side, b: Side, split: str) -> list[tuple[str, Estimate]]:
    """Compare good or bad where answers are graded so, and who won against the base where they are compared."""
    found = []
    for metric in ("helpful", "harmless", "over_refusal"):
        table, field = ("comparisons", "win") if metric == "helpful" else ("scores", "good")
        ours, theirs = (
            [row for row in one.rows(table, metric, split) if row.get("against", "base") == "base"] for one in (a, b)
        )
        told = between(ours, theirs, lambda row: row[field])  # noqa: B023
        if told.n:
            found.append((metric, told))
    return found


def _better(a: Side, b: Side, split: str) -> tuple[Estimate | None, float, str]:
    """Return how B does beside A over the prompts that both answered, what that is if they are equal, or why not."""
    judges = [one.tree["judges"].get("helpful") for one in (a, b)]
    if not all(judges):
        return None, 0.5, "no judge of helpfulness"
    if judges[0] != judges[1]:
        return None, 0.5, "they had different judges of helpfulness"
    wins = matched_wins(b.rows("scores", "helpful", split), a.rows("scores", "helpful", split)).values()
    if any(won is not None for won in wins):
        return _cautious(list(wins), (0.0, 1.0)), 0.5, ""
    if a.tree["candidates"][0]["digest"] != b.tree["candidates"][0]["digest"]:
        return None, 0.5, "they share no scores, and their bases differ"
    compared = [[r for r in one.rows("comparisons", "helpful", split) if r["against"] == "base"] for one in (a, b)]
    theirs, ours = (prompt_means(rows, lambda row: row["win"]) for rows in compared)
    gains = [_gain(theirs[prompt], ours[prompt]) for prompt in theirs if prompt in ours]
    if all(gain is None for gain in gains):
        return None, 0.5, "they answered no prompt in common"
    return _cautious(gains, (-1.0, 1.0)), 0.0, ""


def _cautious(values: list[float | None], ends: tuple[float, float]) -> Estimate:
    """Return the mean over prompts; one without a verdict counts against either end of the interval."""
    kept = [value for value in values if value is not None]
    low, high = (bounded_mean([end if value is None else value for value in values], ends=ends) for end in ends)
    return replace(bounded_mean(kept, len(values) - len(kept), ends=ends), low=low.low, high=high.high)


def _gain(theirs: float | None, ours: float | None) -> float | None:
    return None if theirs is None or ours is None else ours - theirs


def _changed(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    keys = list(dict.fromkeys([*a, *b]))
    return [(key, str(a.get(key, "–")), str(b.get(key, "–"))) for key in keys if a.get(key) != b.get(key)]
