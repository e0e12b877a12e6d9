"""The report as one page that needs nothing else: pictures, tables, and the answers side by side.

However many prompts and candidates there are, and however long the answers: the page takes at most BYTES.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from models.artifacts import Preferences
from models.metrics import alignment_tax
from models.metrics.candidate import Candidate
from models.metrics.figures import OVER, SAFE, WIN
from models.metrics.reported import EQUAL_LENGTH, MARK, Figure, support
from models.report.cases import Cases, as_text, cut
from models.report.charts import curves, frontier
from models.report.sentences import HELDOUT, decision, fitted_scale, gate_table, prompts_of, trained
from models.report.tree import Report

BYTES = 5_000_000
"""Of the page: a browser draws so much within three seconds (`benchmarks/large_page.py`). What the pictures and tables
leave is for the answers side by side; all answers stand in tables/answers.jsonl."""
PRINTED = 20
"""Prompts side by side on paper."""
ROWS = 200
"""Rows of one table at most."""
CATEGORIES = 20
"""Categories whose safety rates are shown: those with the lowest ones."""
MAIN = {
    "helpful win rate": WIN,
    "at equal length": EQUAL_LENGTH,
    "safety rate": SAFE,
    "corrected for the judge": f"{SAFE}_corrected",
    "must pass": "must_pass",
    "over-refusal": OVER,
    "KL to base": "kl_base",
}
MORE = {
    "rating": "helpful/rating",
    "win rate vs reference": "helpful/win_rate_reference",
    "harmless win rate": "harmless/win_rate",
    "safety score": "harmless/score",
    "E[max(cost, 0)]": "harmless/excess",
    "partial refusal": f"{OVER}/partial",
    "KL to reference": "kl_reference",
    "tokens": "length",
}

TESTS = {
    "helpful": "to compare the chosen candidate with what serves, once",
    "harmless": "to test the chosen candidate, once",
    "over_refusal": "to see what the chosen candidate refuses, once",
    "must_pass": "each must pass",
}
"""Role → what its test prompts are for."""


Cell = str | int | Markup


class Row(NamedTuple):
    """One row of a table; cells are escaped unless they are marked up already."""

    cells: list[Cell]
    chosen: bool = False


class Table(NamedTuple):
    """A table of the page."""

    header: list[str]
    rows: list[Row]


class Card(NamedTuple):
    """The data card of the pairs of one metric."""

    metric: str
    table: Table


def html(tree: Report, candidates: list[Candidate], pairs: Sequence[Preferences]) -> str:
    """Return the whole page; `tree` is what `report.build` made, `candidates` starts with the base."""
    # everything is escaped unless it is Markup: prompts and answers may hold HTML that somebody wants to run
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    side_by_side = _side_by_side(tree, candidates)
    cases = Cases(side_by_side)
    tested = [test for constraint in tree["constraints"] for test in constraint["tested"]]
    judged = tree["candidates"][0]["metrics"]
    main = MAIN if WIN in judged else {name: key for name, key in MAIN.items() if key in judged} | _heldout(tree)
    categories = _categories(tree)
    values = {
        "tree": tree,
        "decision": decision(tree),
        "tested": bool(tested),
        "mood": "" if not tested else "good" if all(test["passes"] for test in tested) else "bad",
        "prompts": prompts_of(tree),
        "frontier": frontier(tree),
        "no_frontier": _no_frontier(tree),
        "heldout": any(name.startswith("preference/") for name in main.values()),
        "curves": curves(tree),
        "main": _figures(tree, main),
        "mark": MARK if any(EQUAL_LENGTH in c["metrics"] for c in tree["candidates"]) else "",
        "more": _figures(tree, MORE),
        "categories": _figures(tree, {c: f"{SAFE}/{c}" for c in sorted(categories[:CATEGORIES])}),
        "all_categories": len(categories),
        "methods": _methods(tree),
        "gate": gate_table(tree),
        "flips": tree["flips"],
        "worst": min(25, max(3, 100 // max(1, len(tree["flips"])))),
        "acts": _acts(tree),
        "tax": _tax(tree),
        "same": alignment_tax.SAME,
        "printed": PRINTED,
        "asked": len(cases.prompts),
        "columns": side_by_side,
        "suites": cases.suites,
        "origins": _origins(tree),
        "uses": _uses(tree),
        "judges": _judges(tree),
        "cards": [_card(comparisons) for comparisons in pairs],
        "table": _table,
        "as_text": as_text,
        "cut": cut,
        "sha256": _sha256,
    }
    page, case = pages.get_template("page.html.j2"), pages.get_template("case.html.j2")
    # the page without any answers is made first: what it leaves of BYTES is for the answers
    room = BYTES - len(page.render(values, cases=[]).encode()) - 100  # the counts of what is shown grow by some digits
    return page.render(values, cases=list(_within(room, (Markup(case.render(case=one)) for one in cases.telling()))))


def _within(room: int, cases: Iterable[Markup]) -> Iterator[Markup]:
    """Yield them as long as all together take no more bytes than there is room for."""
    for case in cases:
        room -= len(case.encode()) + 1
        if room < 0:
            return
        yield case


def _no_frontier(tree: Report) -> str:
    """Say why there is no picture of helpful against safe, and what to set."""
    present = (("suite", tree["suites"].keys()), ("judge", tree["judges"].keys()))
    needed = [(kind, role, roles) for role in ("helpful", "harmless") for kind, roles in present]
    lacks = [f"{kind} of {role} prompts" for kind, role, roles in needed if role not in roles]
    why = f"it has no {' and no '.join(lacks)}" if lacks else "its judges told neither a win rate nor a safety rate"
    return (
        f"No picture of helpfulness against safety: {why}; see evaluation.suites and evaluation.judges in "
        "docs/evidence.md."
    )


def _side_by_side(tree: Report, candidates: list[Candidate]) -> list[Candidate]:
    """Return base, reward-aligned policy and the chosen one (or the last), each once; untrained, the first four."""
    if "steps" not in tree["recipe"]["settings"]:
        return candidates[:4]
    by_digest = {candidate.policy.digest: candidate for candidate in candidates}
    name = (tree["chosen"] or {"candidate": ""})["candidate"]
    chosen = next((candidate for candidate in candidates if candidate.policy.name == name), candidates[-1])
    parents = [by_digest[p] for p in chosen.policy.parents[-1:] if p in by_digest]
    return list({candidate.policy.digest: candidate for candidate in [candidates[0], *parents, chosen]}.values())


def _figures(tree: Report, columns: dict[str, str]) -> Table:
    """Return a table of candidates; columns that no candidate has are left out."""
    candidates = tree["candidates"]
    columns = {title: name for title, name in columns.items() if any(name in c["metrics"] for c in candidates)}
    chosen = (tree["chosen"] or {"candidate": ""})["candidate"]
    rows = [
        Row([c["name"], *(_cell(c["metrics"].get(name)) for name in columns.values())], c["name"] == chosen)
        for c in candidates
    ]
    return Table(["candidate", *columns], rows if columns else [])


def _cell(figure: Figure | None) -> Markup:
    """Return a figure with its interval; its method stands in the tooltip."""
    if not figure or figure["value"] is None:
        return Markup("–")
    # about three significant digits are shown, of rates as of ratings near 1,000
    digits = 0 if abs(figure["value"]) >= 100 else 2 if abs(figure["value"]) >= 10 else 3
    value, low, high = (f"{end:.{digits}f}" for end in (figure["value"], figure["low"], figure["high"]))
    failed = f", {figure['failed']} failed" if figure["failed"] else ""
    stands = Markup("<small>{}</small>").format(support(figure)) if support(figure) else ""
    return Markup('<span title="n = {}{}; {}">{}<small>{} – {}</small>{}</span>').format(
        figure["n"], failed, figure["method"], value, low, high, stands
    )


def _heldout(tree: Report) -> dict[str, str]:
    names = sorted({name for c in tree["candidates"] for name in c["metrics"] if name.startswith("preference/")})
    parts = [(name, *name.split("/")[1:]) for name in names]
    titles = {f"{metric}: {HELDOUT[figure]}": name for name, metric, figure in parts if figure in HELDOUT}
    return titles | {"KL to base": "kl_base"}


def _categories(tree: Report) -> list[str]:
    """Return the categories of harmful prompts, the one with the lowest safety rate of any candidate first."""
    prefix = f"{SAFE}/"
    lowest: dict[str, float] = {}
    for name, figure in (item for c in tree["candidates"] for item in c["metrics"].items()):
        if name.startswith(prefix) and figure["value"] is not None:
            category = name.removeprefix(prefix)
            lowest[category] = min(lowest.get(category, 1.0), figure["value"])
    return sorted(lowest, key=lambda category: (lowest[category], category))


def _methods(tree: Report) -> list[tuple[str, str]]:
    columns = {**MAIN, **MORE}
    methods = {name: figure["method"] for c in tree["candidates"] for name, figure in c["metrics"].items()}
    return [(title, methods[name]) for title, name in columns.items() if name in methods]


def _acts(tree: Report) -> Table:
    rows = []
    for c in tree["candidates"]:
        if c["beta_acts"]:
            acts = c["beta_acts"]
            fitted = fitted_scale(acts)
            effective = f"{acts['lambda_effective']:.2f}" if acts["lambda_effective"] else "–"
            weights = [f"{c['beta_over_lambda']:g}", fitted, f"{c['lambda']:g}", effective]
            rows.append(Row([c["name"], *weights, f"{acts['moved']:.2f}", f"{acts['clipped']:.0%}"]))
    header = ["candidate", "β/λ", "s", "λ", "β/s", "margins moved (nats)", "updates clipped"]
    return Table(header, rows)


def _tax(tree: Report) -> Table:
    header, *rows = alignment_tax.table(tree["tax"])
    return Table(header, [Row([*cells]) for cells in rows])


def _origins(tree: Report) -> Table:
    rows = []
    for c in tree["candidates"]:
        how = {
            "base": "–",
            "step": f"trained for {c['metric']} by {c['method']} from and against {', '.join(c['parents'])}",
            "merge": f"q = {c['merge_weight']}: average of {' and '.join(c['parents'])}",
        }[c["kind"]]
        rows.append(Row([c["name"], how, c["digest"][:12]]))
    return Table(["candidate", "made from", "digest"], rows)


def _uses(tree: Report) -> Table:
    use = "to choose the candidate" if trained(tree) else "to judge every policy, and to test the bound"
    rows = [
        Row([role, suite["name"], suite["version"], suite["n"], "each must pass" if role == "must_pass" else use])
        for role, suite in tree["suites"].items()
    ]
    if trained(tree):
        rows += [
            Row([role, file["name"], file["version"], file["n"], TESTS[role]])
            for constraint in tree["constraints"]
            for role, file in constraint["suites"].items()
        ]
        others = [
            ("training pairs", "their own prompts, none of which stands in a suite", "to train"),
            ("held-out pairs", "validation and test split of the pairs", "accuracy, NLL, and whether β/λ acts"),
        ]
        rows += [Row([role, name, "", "", purpose]) for role, name, purpose in others]
    return Table(["role", "suite", "version", "prompts", "used"], rows)


def _judges(tree: Report) -> Table:
    rows = []
    for metric, judge in tree["judges"].items():
        checks = tree["judge_checks"].get(metric, {})
        figures = [checks.get("position_bias"), checks.get("repeatability"), checks.get("agreement")]
        rows.append(Row([metric, judge["name"], judge["version"], *map(_cell, figures)]))
    return Table(["metric", "judge", "version", "position bias", "repeats agree", "agrees with people"], rows)


def _card(pairs: Preferences) -> Card:
    """Return the data card without its empty entries."""
    card = json.loads((pairs.path / "card.json").read_text("utf-8"))
    rows = [Row([name.replace("_", " "), _plain(value)]) for name, value in card.items() if value not in ({}, [])]
    return Card(pairs.metric, Table(["of the data card", ""], rows))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    return f"{value:.3f}" if isinstance(value, float) else cut(str(value)).start


def _table(table: Table) -> Markup:
    """Return an HTML table of up to ROWS rows; cells are escaped unless they are marked up already."""
    head = Markup("").join(Markup("<th>{}</th>").format(title) for title in table.header)
    body = Markup("").join(
        Markup("<tr{}>{}</tr>").format(
            Markup(' class="chosen"') if row.chosen else "",
            Markup("").join(
                Markup('<td class="n">{}</td>' if i == 0 else "<td>{}</td>").format(cell)
                for i, cell in enumerate(row.cells)
            ),
        )
        for row in islice(table.rows, ROWS)
    )
    more = len(table.rows) - ROWS
    note = Markup('<p class="soft">… and {} more rows, in report.json.</p>').format(more) if more > 0 else ""
    return Markup("<table><tr>{}</tr>{}</table>{}").format(head, body, note)


def _sha256(script: str) -> str:
    """Return how a page names the one script that may run."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
