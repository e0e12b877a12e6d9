"""The model card of a registered version: what it is, where it comes from, what was shown of it and what was not."""

from typing import Any

from models.markdown import markdown_table, plain
from models.metrics.equal_length import EQUAL_LENGTH, support
from models.metrics.figures import OVER, SAFE, WIN
from models.report.sentences import decision, gate_table

FIGURES = (WIN, EQUAL_LENGTH, SAFE, "must_pass", OVER, "harmless/score", "kl_base", "length")

Tree = dict[str, Any]


def card(tree: Tree) -> str:
    """Return the card of the chosen candidate as Markdown, from the tree of `report.build`."""
    told = next(one for one in tree["candidates"] if one["name"] == tree["chosen"]["candidate"])
    recipe, registry = tree["recipe"], tree["registry"]
    settings = recipe["settings"]
    weights = "" if told["merge_weight"] is None else f", merge weight q = {told['merge_weight']:g}"
    lines = [
        f"# {plain(registry['name'])}, version {registry['version']}",
        "",
        plain(decision(tree)),
        "",
        f"- **Made by** stepwise alignment (SACPO) from {plain(settings['base'])}: {' → '.join(_steps(settings))}",
        f"- **This policy**: {plain(told['name'])}, β = {told['beta']:g}, λ = {told['lambda']:g}, β/λ = "
        f"{told['beta_over_lambda']:g}{weights}; made from {plain(' and '.join(told['parents'])) or 'nothing'}",
        f"- **Weights**: sha256 {told['digest']}",
        f"- **Recipe**: {recipe['name']}, digest {recipe['digest'][:12]}, seed {recipe['seed']}",
        *(f"- **Data**, {plain(role)}: {digest[:16]}" for role, digest in tree["data"].items()),
        f"- **Answers**: {plain(', '.join(f'{key} {value}' for key, value in tree['decoding'].items()))}",
        *(
            f"- **Judge** of {role}: {plain(judge['name'])}, version {plain(judge['version'])}"
            for role, judge in tree["judges"].items()
        ),
        *(f"- **Suite** {role}: version {s['version']}, {s['n']} prompts chose" for role, s in tree["suites"].items()),
    ]
    checks = gate_table(tree)
    if checks:
        lines += ["", "## What it had to show, on prompts that chose nothing", "", *markdown_table(checks)]
    figures = [[name, *_figure(told["metrics"][name])] for name in FIGURES if name in told["metrics"]]
    if figures:
        lines += ["", "## Figures of the validation prompts", ""]
        lines += markdown_table([["figure", "value", "95 % interval", "n", "stands on"], *figures])
    lines += [
        "",
        "## What this does not say",
        "",
        "The certificate covers this checkpoint with these decoding settings, as these judges see these prompts. Other "
        "decoding, other prompts, other languages, longer dialogues and attacks were not tested, nor was anything that "
        "the judges cannot see.",
    ]
    return "\n".join([*lines, ""])


def _steps(settings: Tree) -> list[str]:
    return [
        f"{step['metric']} ({step['method']}, λ = {', '.join(f'{value:g}' for value in step['lambda'])})"
        for step in settings["steps"]
    ]


def _figure(told: Tree) -> list[str]:
    return [f"{told['value']:.3f}", f"{told['low']:.3f} to {told['high']:.3f}", str(told["n"]), support(told)]
