"""Is run B better than run A, and is it safe enough? What differs in recipe and data, and what the prompts say."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import jsonl
from models.agreement import between
from models.errors import BadInput
from models.figures import by_prompt
from models.statistics import Estimate, mean

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
        recipe=_changed(_flat(a.tree["recipe"]["settings"]), _flat(b.tree["recipe"]["settings"])),
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
    scores = [{key: _score(rows) for key, rows in by_prompt(one.rows("scores", "helpful")).items()} for one in (a, b)]
    shared = [key for key in scores[0] if key in scores[1]]
    pairs = [(scores[0][key], scores[1][key]) for key in shared]
    judged = [(x, y) for x, y in pairs if x is not None and y is not None]
    if judged:
        return mean([0.5 + 0.5 * ((y > x) - (y < x)) for x, y in judged], len(pairs) - len(judged)), ""
    if a.tree["candidates"][0]["digest"] != b.tree["candidates"][0]["digest"]:
        return None, "they share no scores, and their bases differ"
    wins = [
        {
            key: _score(rows, "win")
            for key, rows in by_prompt(r for r in one.rows("comparisons", "helpful") if r["against"] == "base").items()
        }
        for one in (a, b)
    ]
    both = [(wins[0][key], wins[1][key]) for key in wins[0] if key in wins[1]]
    kept = [(x, y) for x, y in both if x is not None and y is not None]
    if not kept:
        return None, "they answered no prompt in common"
    return mean([0.5 + 0.5 * (y - x) for x, y in kept], len(both) - len(kept)), ""


def _score(rows: list[Tree], field: str = "score") -> float | None:
    kept = [row[field] for row in rows if row["status"] == "ok"]
    return sum(kept) / len(kept) if kept else None


def _changed(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    keys = list(dict.fromkeys([*a, *b]))
    return [(key, str(a.get(key, "–")), str(b.get(key, "–"))) for key in keys if a.get(key) != b.get(key)]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return a tree of settings as `steps.1.lambda` → value."""
    if isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        tree = {str(i): item for i, item in enumerate(tree)}
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, item in tree.items() for k, v in _flat(item, f"{prefix}.{key}".lstrip(".")).items()}
