"""What the command line prints of a plan and of a finished run."""

import json
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from models.errors import BadPlace
from models.plan import Plan
from models.recipe import Recipe
from models.report.sentences import decision, prompts_of, trained
from models.report.summary import table
from tasks.outcomes import Outcome
from tasks.servers.environment import VERSION_PATHS, request_json
from tasks.tracking.connection import SERVER, uri, without_password
from tasks.work.runs_folder import root

UNCLEAR = "unclear"
PIPE_WIDTH = 200
"""Columns of a line in a pipe or a log, where no terminal says how many there are."""


def print_plan(recipe: Recipe, planned: Plan) -> None:
    """Print the plan of `sacpo check`."""

    def if_known(value: float, text: str) -> str:
        return text if value >= 0 else "?"

    console = Console(width=None if sys.stdout.isatty() else 160, markup=False)
    steps = Table(box=None, pad_edge=False)
    for column in ("step", "data", "reference", "KL weight β/λ", "trainings", "rows", "updates", "tokens"):
        steps.add_column(column)
    for step in planned.steps:
        steps.add_row(
            step.title,
            Path(step.data).name if len(step.data) > 40 else step.data,
            step.reference,
            ", ".join(f"{weight:g}" for weight in step.weights),
            str(step.trainings),
            if_known(step.rows, f"{step.rows:,}"),
            if_known(step.updates, f"{step.updates:,}"),
            if_known(step.tokens, f"about {step.tokens:,}"),
        )
    console.print(f"{recipe.name}: base {recipe.base}, β = {recipe.beta:g}", highlight=False)
    console.print(steps, highlight=False)
    console.print(
        f"{planned.policies} policies of {if_known(planned.parameters, f'{planned.parameters:,}')} parameters in "
        f"float32; memory per training {if_known(planned.memory, f'{planned.memory / 2**30:,.1f} GiB')} besides "
        f"activations (this machine has {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:,.0f} GiB); "
        f"disk {if_known(planned.disk, f'{planned.disk / 2**30:,.1f} GiB')}; "
        f"time {if_known(planned.seconds, f'about {planned.seconds / 60:,.1f} min of training here')}",
        highlight=False,
    )
    for step in planned.steps:
        if step.card:
            console.print(f"data: {step.title.split(' · ')[0]}: {step.card}", highlight=False)
    for sentence in planned.judging:
        console.print(f"judged: {sentence}", highlight=False)
    for sentence in planned.evidence:
        console.print(f"evidence: {sentence}", highlight=False)
    if not any(step.rows >= 0 for step in planned.steps) and not planned.errors:
        console.print("? data or base lie on a hub and are counted when the run fetches them")


def print_outcome(outcome: Outcome) -> None:
    """Print the table of candidates, the decision, and where to look next."""
    folder = Path(outcome["report"])
    tree = json.loads((folder / "report.json").read_text("utf-8"))
    chosen = (tree["chosen"] or {"candidate": ""})["candidate"]
    header, *rows = table(tree)
    narrow, unclear = not sys.stdout.isatty(), False
    candidates = Table(box=None, pad_edge=False)
    for column in header:  # a figure may wrap, a name must stay whole
        candidates.add_column(column.replace(" ", "\n", 1) if narrow else column, no_wrap=column == header[0])
    for row in rows:
        mark, cells = "→ " if row[0] == chosen else "  ", row[1:]
        if narrow:
            cells = [*map(_without_interval, row[1:-1]), _scale(row[-1])]
            unclear = unclear or cells[-1] == UNCLEAR
        candidates.add_row(mark + row[0], *cells, style="bold green" if row[0] == chosen else "")
    console = Console(width=PIPE_WIDTH if narrow else None, markup=False)
    console.print(candidates)
    if tree["suites"]:
        scale = "; if s is much larger than β/λ, train longer: λ had no effect yet" if trained(tree) else ""
        # Only pairs that are told wrong keep the fit of s finite: without any, the table says "beyond".
        scale += "; of pairs that are all told right s says nothing" if any("beyond" in row[-1] for row in rows) else ""
        scale += "; an unclear s may be 0" if unclear else ""
        intervals = "; their 95 % intervals stand in the report" if narrow else " with 95 % intervals"
        console.print(f"Figures of {prompts_of(tree)}{intervals}{scale}.", style="dim", highlight=False)
    console.print(decision(tree), highlight=False, soft_wrap=narrow)
    commands = Path(sys.prefix) / "bin"  # the virtual environment need not be on the PATH of a reader
    console.print()
    if (folder / "frontier.png").exists():
        console.print(f"Picture: {folder / 'frontier.png'}", highlight=False, soft_wrap=True)
    console.print(f"Report:  {folder / 'report.html'}", highlight=False, soft_wrap=True)
    if tree["registry"]:
        name, version = tree["registry"]["name"], tree["registry"]["version"]
        console.print(f"Chat:    {commands}/sacpo chat models:/{name}/{version}", highlight=False, soft_wrap=True)
    prefect = os.environ.get("PREFECT_API_URL", "")
    mlflow = uri(root()) if SERVER else ""
    pages = {"MLflow": _page("MLFLOW_TRACKING_URI", mlflow), "Prefect": _page("PREFECT_API_URL", prefect)}
    if not any(pages.values()):
        pages = {"Pages": f"{commands}/sacpo up"}
    for name, place in pages.items():
        console.print(
            f"{name + ':':8} {place or 'in the runs folder; sacpo up shows it'}", highlight=False, soft_wrap=True
        )


def _without_interval(cell: str) -> str:
    """Return a figure without its interval: a line of a pipe or a log must not wrap."""
    return re.sub(r" \[[^]]*]", "", cell)


def _scale(cell: str) -> str:
    """Return an s without its interval, or `UNCLEAR` if its interval holds 0."""
    return UNCLEAR if re.search(r" \[-[^,]*, [^-]", cell) else _without_interval(cell)


def _page(variable: str, address: str) -> str:
    """Return where the pages of a server are, and whether it does not answer now; empty if none is named."""
    place = without_password(address).removesuffix("/api")
    if address.startswith("http"):
        try:
            request_json(variable, VERSION_PATHS[variable], {**os.environ, variable: address})
        except BadPlace:
            return f"{place} (does not answer)"
    return place
