"""The model card of a registered version: what it is, where it comes from, what was shown of it and what was not."""

from models.markdown import markdown_table, plain
from models.metrics.figures import OVER, SAFE, WIN
from models.metrics.reported import EQUAL_LENGTH, Figure, support
from models.report.sentences import decision, gate_table
from models.report.tree import RegistryEntry, Report, Settings

FIGURES = (WIN, EQUAL_LENGTH, SAFE, "must_pass", OVER, "harmless/score", "kl_base", "length")


def card(tree: Report, registry: RegistryEntry) -> str:
    """Return the card of the registered version, which is the chosen candidate, as Markdown."""
    chosen = (tree["chosen"] or {"candidate": ""})["candidate"]
    candidate = next(entry for entry in tree["candidates"] if entry["name"] == chosen)
    recipe, settings = tree["recipe"], tree["recipe"]["settings"]
    weights = "" if candidate["merge_weight"] is None else f", merge weight q = {candidate['merge_weight']:g}"
    parents = plain(" and ".join(candidate["parents"])) or "nothing"
    lines = [
        f"# {plain(registry['name'])}, version {registry['version']}",
        "",
        plain(decision(tree)),
        "",
        f"- **Made by** stepwise alignment (SACPO) from {plain(settings['base'])}: {' → '.join(_steps(settings))}",
        f"- **This policy**: {plain(candidate['name'])}, β = {candidate['beta']:g}, λ = {candidate['lambda']:g}, β/λ = "
        f"{candidate['beta_over_lambda']:g}{weights}; made from {parents}",
        f"- **Weights**: sha256 {candidate['digest']}",
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
        lines += ["", "## What it had to show, on prompts that were not used to choose it", "", *markdown_table(checks)]
    figures = [[name, *_figure(candidate["metrics"][name])] for name in FIGURES if name in candidate["metrics"]]
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


def _steps(settings: Settings) -> list[str]:
    return [
        f"{step['metric']} ({step['method']}, λ = {', '.join(f'{value:g}' for value in step['lambda'])})"
        for step in settings["steps"]
    ]


def _figure(figure: Figure) -> list[str]:
    interval = f"{figure['low']:.3f} to {figure['high']:.3f}"
    return [f"{figure['value']:.3f}", interval, str(figure["n"]), support(figure)]
