"""The report as Markdown, and its table of candidates: what the terminal and the pages of Prefect show."""

from models.markdown import markdown_table, plain
from models.metrics import alignment_tax
from models.metrics.figures import OVER, SAFE, WIN
from models.metrics.reported import EQUAL_LENGTH, MARK, Figure, interval, support
from models.metrics.statistics import STEEPEST
from models.report.cases import cut
from models.report.sentences import HELDOUT, decision, failures, fitted_scale, gate_table, prompts_of, trained
from models.report.tree import Report

JUDGED = {"helpful win rate": WIN, "safety rate": SAFE, "must pass": "must_pass", "over-refusal": OVER}
FITTED = (
    "`s` is fitted on held-out pairs, P(label) = σ(s·margin); at the optimum of a DPO step s = β/λ. Far above: "
    "the policy has not moved as far as β/λ allows, more training is needed. Below: over-optimised. "
    f"Beyond ±{STEEPEST:g}: all of these pairs are told apart without an error, so they are too few to tell s."
)
KNOB = "λ of a KTO step is a knob, not the multiplier of Theorem 1, which holds for pairwise losses only."
APART = (
    "Distance between the policies of two λ, relative to the larger distance from their reference (near 0: λ "
    "did nothing):"
)
SHOWN = 500
"""Characters of an answer: each is shown once for every candidate, and Prefect draws all of it."""


def table(tree: Report) -> list[list[str]]:
    """Return the table of candidates as rows of text, header first; columns are the figures that this run has."""
    names = {name for candidate in tree["candidates"] for name in candidate["metrics"]}
    columns = [(title, name) for title, name in JUDGED.items() if name in names]
    if WIN not in names:  # nobody judged helpfulness, so the columns show held-out comparisons
        metrics = list(dict.fromkeys(name.split("/")[1] for name in sorted(names) if name.startswith("preference/")))
        columns += [(f"{m} {short}", f"preference/{m}/{name}") for m in metrics for name, short in HELDOUT.items()]
    rows = [["candidate", "β/λ", *(title for title, _ in columns), "KL to base", "β/λ acts (s)"]]
    for candidate in tree["candidates"]:
        weight = f"{candidate['beta_over_lambda']:g}" if candidate["kind"] == "step" else "–"
        figures = [_interval(candidate["metrics"].get(name)) for _, name in columns]
        kl, acts = candidate["metrics"].get("kl_base"), candidate["beta_acts"]
        distance = f"{kl['value']:.2f}" if kl else "–"
        rows.append([candidate["name"], weight, *figures, distance, fitted_scale(acts) if acts else "–"])
    return rows if trained(tree) else [[*row[:1], *row[2:-1]] for row in rows]  # nothing was trained with a β/λ


def markdown(tree: Report) -> str:
    """Return the report as Markdown."""
    rows = table(tree)
    blocks = [
        _head(tree),
        _candidates(tree, rows),
        _gate_and_picture(tree, rows[0]),
        _side_figures(tree),
        _origins(tree),
    ]
    lines = [line for block in blocks for line in block]
    for sample in tree["samples"]:
        lines += ["", f"**{plain(sample['prompt'])}**", ""]
        lines += [f"- {plain(name)}: {plain(_short(answer))}" for name, answer in sample["answers"].items()]
    return "\n".join([*lines, ""])


def equal_length(tree: Report) -> list[list[str]]:
    """Return the win rates at equal length as rows of text, header first; empty where nobody has one."""
    rows = [
        [candidate["name"], interval(figure), support(figure)]
        for candidate in tree["candidates"]
        if (figure := candidate["metrics"].get(EQUAL_LENGTH))
    ]
    return [["candidate", "helpful win rate at equal length", "stands on"], *rows] if rows else []


def _head(tree: Report) -> list[str]:
    suites = ", ".join(f"{suite['n']} {role} prompts" for role, suite in tree["suites"].items())
    return [
        f"# {tree['recipe']['name']}",
        "",
        plain(decision(tree)),
        "",
        "Intervals are two-sided, 95 %, and describe each candidate by itself"
        + ("; only the chosen one was tested. " if tree["chosen"] and tree["constraints"][0]["tested"] else ". ")
        + (f"Suites: {suites}, {prompts_of(tree)}." if suites else "No suites: figures are on held-out comparisons."),
    ]


def _candidates(tree: Report, rows: list[list[str]]) -> list[str]:
    """Return the table of candidates, and what its columns mean."""
    lines = ["", *markdown_table(rows)]
    if trained(tree):
        lines += ["", FITTED]
    if any(candidate["method"] == "kto" for candidate in tree["candidates"]):
        lines += ["", KNOB]
    if equal := equal_length(tree):
        lines += ["", *markdown_table(equal), "", MARK]
    return lines


def _gate_and_picture(tree: Report, header: list[str]) -> list[str]:
    lines = []
    if checks := gate_table(tree):
        lines += ["", "The gate, on the test prompts:", "", *markdown_table(checks)]
    if any("NLL" in title for title in header):
        lines += ["", "Accuracy and NLL say how well held-out labels are predicted; they are no safety rate."]
    if tree["suites"] and {WIN, SAFE} <= tree["candidates"][0]["metrics"].keys():
        lines += ["", "![frontier](frontier.png)"]
    return lines


def _side_figures(tree: Report) -> list[str]:
    """Return how far the policies of two λ are apart, and the alignment tax, where they were measured."""
    lines = []
    if tree["distances"]:
        rows = [[f"{d['a']} – {d['b']}", f"{d['relative']:.2f}"] for d in tree["distances"]]
        lines += ["", APART, "", *markdown_table([["policies", "distance"], *rows])]
    if tree["tax"]:
        lines += ["", "Alignment tax:", "", *markdown_table(alignment_tax.table(tree["tax"])), "", alignment_tax.SAME]
    return lines


def _origins(tree: Report) -> list[str]:
    """Return what each candidate was made from."""
    how = {"step": "trained against ", "merge": "average of "}
    rows = [
        [c["name"], how[c["kind"]] + " and ".join(c["parents"]) if c["kind"] in how else "–"]
        for c in tree["candidates"]
    ]
    return ["", *markdown_table([["candidate", "made from"], *rows])]


def _short(answer: str) -> str:
    """Return the beginning of an answer, and how much more there is."""
    text = cut(answer, SHOWN)
    return f"{text.start} … {text.more:,} more characters" if text.more else answer


def _interval(figure: Figure | None) -> str:
    if not figure:
        return "–"
    return interval(figure) + (f" ({failures(figure['failed'])})" if figure["failed"] else "")
