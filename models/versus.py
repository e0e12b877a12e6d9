"""Is run B better than run A, and is it safe enough? What differs in recipe and data, and what the prompts say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import jsonl
from models.agreement import between
from models.errors import BadInput
from models.figures import Means, prompt_means
from models.record import flat
from models.statistics import Estimate, mean, win

Tree = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One run, and the candidate of it that is compared."""

    folder: Path
    tree: Tree
    candidate: Tree

    def rows(self, table: str, metric: str) -> list[Tree]:
        """Return the rows of a table about the candidate and one metric."""
        told = jsonl.read(self.folder / "tables" / f"{table}.jsonl")
        return [row for row in told if row["candidate"] == self.candidate["name"] and row["metric"] == metric]


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
    why_not: str
    tested: Tree | None
    """B's test of the constraint, if there was one."""
    constraint: Tree
    judges: list[tuple[str, Estimate]]
    """Metric, and how often the judges of A and B say the same, where both judged answers of the same policy."""

    @property
    def holds(self) -> bool:
        """B is shown to be better, and to hold its bound."""
        return self.better is not None and self.better.low > 0.5 and self.tested is not None and self.tested["holds"]


def side(folder: Path, policy: str = "") -> Side:
    """Return the run in a folder with `report.json`, and its chosen candidate (or the last), or the one with a digest.

    Raises:
        BadInput: the folder holds no report, or none of that policy.
    """
    folder = folder.parent if folder.name == "report.json" else folder
    try:
        tree = json.loads((folder / "report.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{folder}: holds no report.json that can be read; give the folder of a report") from error
    if "settings" not in tree["recipe"]:
        raise BadInput(f"{folder}: the report was made by an older sacpo; run the same command again to renew it")
    wanted = (tree["chosen"] or {"candidate": tree["candidates"][-1]["name"]})["candidate"]
    told = [c for c in tree["candidates"] if (c["digest"] == policy if policy else c["name"] == wanted)]
    if not told:
        raise BadInput(f"{folder}: the report has no candidate with digest {policy[:12]}")
    return Side(folder, tree, told[0])


def difference(a: Side, b: Side) -> Difference:
    """Compare two runs, prompt by prompt where they answered the same prompts before the same judge."""
    names = ("helpful/win_rate", "harmless/safety_rate", "over_refusal", "kl_base", "length")
    figures = [(name, a.candidate["metrics"].get(name), b.candidate["metrics"].get(name)) for name in names]
    constraint = b.tree["constraints"][0]
    tested = [test for test in constraint["tested"] if test["candidate"] == b.candidate["name"]]
    better, why_not = _better(a, b)
    return Difference(
        recipe=_changed(flat(a.tree["recipe"]["settings"]), flat(b.tree["recipe"]["settings"])),
        data=_changed(a.tree["data"], b.tree["data"]),
        figures=[(name, x, y) for name, x, y in figures if x or y],
        better=better,
        why_not=why_not,
        tested=tested[0] if tested else None,
        constraint=constraint,
        judges=_agreement(a, b) if a.candidate["digest"] == b.candidate["digest"] else [],
    )


def sentence(a: Side, b: Side, told: Difference) -> str:
    """Say in one line whether B is better than A, and safe enough."""
    name = f"{b.candidate['name']} ({b.tree['recipe']['name']} {b.tree['recipe']['digest'][:7]})"
    if told.better is None:
        first = f"whether {name} is better than {a.candidate['name']} cannot be said: {told.why_not}"
    else:
        value, low, high = told.better.value, told.better.low, told.better.high
        how = "is better than" if low > 0.5 else "is worse than" if high < 0.5 else "is not shown to differ from"
        first = (
            f"{name} {how} {a.candidate['name']}: wins {value:.3f} [{low:.3f}, {high:.3f}] of {told.better.n} prompts"
        )
    at_least, confidence = told.constraint["at_least"], told.constraint["confidence"]
    if told.tested is None:
        return f"{first}; its safety was not tested"
    holds = "is safe enough" if told.tested["holds"] else "is not shown to be safe enough"
    return (
        f"{first}; it {holds}: safety rate {told.tested['value']:.3f}, at least {told.tested['lower_bound']:.3f} "
        f"with confidence {confidence:g}, bound {at_least:g}"
    )


def _agreement(a: Side, b: Side) -> list[tuple[str, Estimate]]:
    """Compare good or bad where answers are graded so, and who won against the base where they are compared."""
    found = []
    for metric in ("helpful", "harmless", "over_refusal"):
        table, field = ("comparisons", "win") if metric == "helpful" else ("scores", "good")
        ours, theirs = ([r for r in one.rows(table, metric) if r.get("against") != "reference"] for one in (a, b))
        told = between(ours, theirs, lambda row: row[field])  # noqa: B023
        if told.n:
            found.append((metric, told))
    return found


def _better(a: Side, b: Side) -> tuple[Estimate | None, str]:
    """Return how often B's answer has the higher score, over the prompts that both answered; ties as half."""
    judges = [one.tree["judges"].get("helpful") for one in (a, b)]
    if not all(judges):
        return None, "nobody judged helpfulness"
    if judges[0] != judges[1]:
        return None, "they had different judges of helpfulness"
    scores = [prompt_means(one.rows("scores", "helpful"), lambda row: row["score"]) for one in (a, b)]
    judged, failed = _shared(*scores)
    if judged:
        return mean([win(y, x) for x, y in judged], failed), ""
    if a.tree["candidates"][0]["digest"] != b.tree["candidates"][0]["digest"]:
        return None, "they share no scores, and their bases differ"
    compared = [[r for r in one.rows("comparisons", "helpful") if r["against"] == "base"] for one in (a, b)]
    kept, failed = _shared(*(prompt_means(rows, lambda row: row["win"]) for rows in compared))
    if not kept:
        return None, "they answered no prompt in common"
    return mean([0.5 + 0.5 * (y - x) for x, y in kept], failed), ""


def _shared(a: Means, b: Means) -> tuple[list[tuple[float, float]], int]:
    """Return the values of the prompts that both have a verdict for, and of how many shared prompts one has none."""
    both = [(a[key], b[key]) for key in a if key in b]
    kept = [(x, y) for x, y in both if x is not None and y is not None]
    return kept, len(both) - len(kept)


def _changed(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    keys = list(dict.fromkeys([*a, *b]))
    return [(key, str(a.get(key, "–")), str(b.get(key, "–"))) for key in keys if a.get(key) != b.get(key)]
