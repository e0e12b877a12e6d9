"""The command line: `sacpo run RECIPE`, one verb per flow. Heavy imports come after parsing."""

import errno
import http.client
import os
import shutil
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from flows import ending
from models.errors import BadPlace, SacpoError

if TYPE_CHECKING:
    from models.assessment import Assessment
    from models.plan import Plan
    from models.recipe import Recipe

app = typer.Typer(
    name="sacpo",
    help="Align a language model stepwise: first for reward, then for safety, with proof (SACPO, NeurIPS 2024).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change the recipe, for instance steps.1.lambda=[1,2]. Repeatable."
    ),
]
Retry = Annotated[
    bool, typer.Option("--retry-failed", help="Ask judges again for the verdicts that failed in a finished run.")
]
Which = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see `sacpo recipes`) or a TOML file.")]

LEAST_FREE = 64 * 2**20
"""Bytes; on less, Prefect's own server fails without a word that would help."""


@app.command()
def run(recipe: Which, set_: Changes = None, retry: Retry = False) -> None:
    """Train, merge, evaluate and register what a recipe describes; a killed run goes on, a finished one is shown."""
    from models.recipe_file import read

    chosen = read(recipe, set_)
    _carry_out(chosen, "align", retry)


@app.command()
def check(recipe: Which, set_: Changes = None) -> None:
    """Show what a recipe will do, without training: steps, rows, memory, time, and what its evidence can prove."""
    from models.plan import plan
    from models.recipe_file import read

    chosen = read(recipe, set_)
    planned = plan(chosen)
    show_plan(chosen, planned)
    for error in planned.errors:
        typer.echo(f"sacpo: {error}", err=True)
    raise typer.Exit(2 if planned.errors else 0)


@app.command()
def evaluate(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="POLICY…",
            help="Folder, .gguf file, hub id or models:/NAME@ALIAS. All are compared with the first.",
        ),
    ],
    suite: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=FILE", help="helpful, harmless, over_refusal or must_pass. Repeatable."),
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=KIND", help="oracle, model, llm or refusal; settings with --set. Repeatable."),
    ] = None,
    like: Annotated[str, typer.Option(metavar="RECIPE", help="Take judges, suites and bound from a recipe.")] = "",
    set_: Changes = None,
    retry: Retry = False,
) -> None:
    """Judge policies as they are, without training, with the same report; tests the bound in the given order."""
    from models.recipe_file import assessment

    shorthand = [f"evaluation.suites.{one}" for one in suite or []]
    shorthand += [f"evaluation.judges.{one.replace('=', '.kind=', 1)}" for one in judge or []]
    chosen = assessment(policies, like, [*shorthand, *(set_ or [])])
    _carry_out(chosen, "evaluate", retry)


suites = typer.Typer(help="Work with suites: files of prompts with a role.", no_args_is_help=True)
app.add_typer(suites, name="suite")


@suites.callback()
def _suites() -> None:
    """Work with suites: files of prompts with a role."""


@suites.command()
def add(
    file: Annotated[Path, typer.Argument(help="The suite, a .jsonl file; made if it does not exist.")],
    prompt: Annotated[str, typer.Argument(help="What was asked.")],
    category: Annotated[str, typer.Option(help="Kind of harm.")] = "",
    reference: Annotated[str, typer.Option(help="An answer that would have been right.")] = "",
) -> None:
    """Turn an incident into a prompt that must pass; name the file in evaluation.suites.must_pass."""
    from models.suites import add as append

    count = append(file, prompt, category, reference)
    typer.echo(f"{file}: {count} {'prompt' if count == 1 else 'prompts'}")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Folder of a report, or models:/NAME/VERSION or NAME@ALIAS.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, of the run that may be better.")],
) -> None:
    """Is B better than A, and is it safe enough? Exit code 0 if both are shown, else 4."""
    from models.errors import Undecided
    from models.versus import difference, sentence, side
    from tasks.run import root
    from tasks.tracking import fetch_report

    there, here = (
        side(*fetch_report(root(), place)) if place.startswith("models:/") else side(Path(place)) for place in (a, b)
    )
    told = difference(there, here)
    for title, rows in (("recipe", told.recipe), ("data", [(k, x[:12], y[:12]) for k, x, y in told.data])):
        for key, old, new in rows:
            typer.echo(f"{title:8} {key}: {old} → {new}")
    for name, *figures in told.figures:
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" if f else "–" for f in figures]
        typer.echo(f"{'result':8} {name}: {' → '.join(cells)}")
    for metric, same in told.judges:
        agree = f"{same.value:.3f} [{same.low:.3f}, {same.high:.3f}] of {same.n} answers"
        typer.echo(f"{'judges':8} {metric}: say the same of {agree}")
    typer.echo(sentence(there, here, told))
    raise typer.Exit(0 if told.holds else Undecided.exit_code)


@app.command()
def chat(
    policy: Annotated[
        str,
        typer.Argument(metavar="POLICY", help="Folder of a policy (a `path` of report.json) or models:/NAME@ALIAS."),
    ],
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    longest: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 256,
) -> None:
    """Talk with a policy in the terminal; an empty line ends the conversation."""
    from models.chat import talk
    from tasks.run import found

    talk(found(policy), temperature, longest)


@app.command()
def recipes() -> None:
    """List the recipes that come with sacpo."""
    from models.recipe_file import read, shipped

    for name in shipped():
        chosen = read(name)
        steps = " → ".join(f"{s.metric} ({s.method}, λ={', '.join(f'{v:g}' for v in s.lambda_)})" for s in chosen.steps)
        typer.echo(f"{name:24} {chosen.base:12} β={chosen.beta:g}  {steps}")


@app.command()
def keys(
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so, as `evaluation.`.")] = "",
) -> None:
    """List every key of a recipe with its default and what it means."""
    from models.recipe_file import keys as all_keys

    for key, default, meaning in all_keys():
        if key.startswith(prefix):
            typer.echo(f"{key}{f' = {default}' if default else ''}\n    {meaning}")


def show_plan(recipe: "Recipe", planned: "Plan") -> None:
    """Print the plan of `sacpo check`."""
    from rich.console import Console
    from rich.table import Table

    def known(value: float, text: str) -> str:
        return text if value >= 0 else "?"

    console = Console(width=None if sys.stdout.isatty() else 160)
    shown = Table(box=None, pad_edge=False)
    for column in ("step", "data", "reference", "KL weight β/λ", "trainings", "rows", "updates", "tokens"):
        shown.add_column(column)
    for step in planned.steps:
        shown.add_row(
            step.title,
            Path(step.data).name if len(step.data) > 40 else step.data,
            step.reference,
            ", ".join(f"{weight:g}" for weight in step.weights),
            str(step.trainings),
            known(step.rows, f"{step.rows:,}"),
            known(step.updates, f"{step.updates:,}"),
            known(step.tokens, f"about {step.tokens:,}"),
        )
    console.print(f"{recipe.name}: base {recipe.base}, β = {recipe.beta:g}", highlight=False)
    console.print(shown, highlight=False)
    console.print(
        f"{planned.policies} policies of {known(planned.parameters, f'{planned.parameters:,}')} parameters in float32; "
        f"memory per training {known(planned.memory, f'{planned.memory / 2**30:,.1f} GiB')} besides activations "
        f"(this machine has {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:,.0f} GiB); "
        f"disk {known(planned.disk, f'{planned.disk / 2**30:,.1f} GiB')}; "
        f"time {known(planned.seconds, f'about {planned.seconds / 60:,.1f} min of training here')}",
        highlight=False,
    )
    for step in planned.steps:
        if step.card:
            console.print(f"data: {step.title.split(' · ')[0]}: {step.card}", highlight=False)
    for sentence in planned.evidence:
        console.print(f"evidence: {sentence}", highlight=False)
    if not any(step.rows >= 0 for step in planned.steps) and not planned.errors:
        console.print("? data or base lie on a hub and are counted when the run fetches them")


def _carry_out(chosen: "Recipe | Assessment", flow: str, retry: bool) -> NoReturn:
    """Run a flow unless nothing is left to do, show what it found, and exit as it says."""
    from models.preflight import refuse
    from tasks.run import finished, forget_failed

    if retry:
        typer.echo(f"{forget_failed(chosen)} failed verdicts are asked for again")
    outcome = finished(chosen)
    if outcome is None:
        refuse(chosen.evaluation)
        _settle()
        from tasks.launch import workers
        from tasks.run import root

        typer.echo(f"{chosen.name}: starting Prefect and the workers; everything goes to {root()}")
        with workers(chosen.compute, root()):  # they import torch while Prefect starts
            try:
                outcome = resolve_name(f"flows.{flow}:{flow}")(chosen)
            except SacpoError:
                raise
            except Exception:
                outcome = finished(chosen)  # Prefect may have died after the last stage
                if outcome is None:
                    _answers("PREFECT_API_URL", os.environ.get("PREFECT_API_URL", ""), "/health")
                    raise
    _show(outcome)
    raise typer.Exit(outcome["exit_code"])


def _settle() -> None:
    """Give Prefect and MLflow a home in the runs folder, and keep them quiet; what the user set stays."""
    from tasks.launch import reap
    from tasks.run import root

    runs = root()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        probe = runs / ".writable"
        probe.write_text("")
        probe.unlink()
        free = shutil.disk_usage(runs).free
    except OSError as error:
        raise BadPlace(f"{runs}: cannot be written ({error.strerror}); set SACPO_RUNS to a folder that can") from error
    if free < LEAST_FREE:
        raise BadPlace(
            f"{runs}: only {free / 2**20:.0f} MiB free; Prefect and MLflow alone need "
            f"{LEAST_FREE / 2**20:.0f}; free space, or set SACPO_RUNS to another disk"
        )
    reap(runs)
    for name, health in (("PREFECT_API_URL", "/health"), ("MLFLOW_TRACKING_URI", "/health")):
        _answers(name, os.environ.get(name, ""), health)
    for name, value in {
        "PREFECT_HOME": str(runs / "prefect"),
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # errors are told in one line; the pages have the rest
        "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",  # a line per event that a dead server did not take
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }.items():
        os.environ.setdefault(name, value)


def _answers(name: str, address: str, health: str) -> None:
    """Refuse a server address that does not answer, before anything is trained."""
    if not address.startswith("http"):
        return
    try:
        urllib.request.urlopen(address.rstrip("/") + health, timeout=5).close()
    except urllib.error.HTTPError:
        return  # something answers; whether it lets us in is its own message
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        raise BadPlace(f"{name} = {address} does not answer ({why}); start that server, or unset {name}") from error


def _show(outcome: dict[str, Any]) -> None:
    """Print the table of candidates, the decision, and where to look next."""
    import json

    from rich.console import Console
    from rich.table import Table

    from models.report import decision, table
    from tasks.run import root
    from tasks.tracking import SERVER

    folder = Path(outcome["report"])
    tree = json.loads((folder / "report.json").read_text("utf-8"))
    chosen = (tree["chosen"] or {"candidate": ""})["candidate"]
    header, *rows = table(tree)
    shown = Table(box=None, pad_edge=False)
    for column in header:
        shown.add_column(column, no_wrap=column == header[0])  # a figure may wrap, a name must stay whole
    for row in rows:
        mark = "→ " if row[0] == chosen else "  "
        shown.add_row(mark + row[0], *row[1:], style="bold green" if row[0] == chosen else "")
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(shown)
    if tree["suites"]:
        split = next(iter(tree["suites"].values()))["split"]
        console.print(
            f"[dim]Figures of the {split} split with 95 % intervals; s far above β/λ: trained too little for λ "
            "to decide (see the report).[/]",
            highlight=False,
        )
    console.print(decision(tree), highlight=False)
    here = Path(sys.prefix) / "bin"
    console.print(
        f"\nPicture: {folder / 'frontier.png'}\nReport:  {folder / 'report.html'}", highlight=False, soft_wrap=True
    )
    if tree["registry"]:
        name, version = tree["registry"]["name"], tree["registry"]["version"]
        console.print(f"Chat:    {here}/sacpo chat models:/{name}/{version}", highlight=False, soft_wrap=True)
    mlflow = SERVER or (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {here}/mlflow server --workers 1 "
        f"--backend-store-uri sqlite:///{root()}/mlflow.db --port 5000"
    )
    prefect = os.environ.get("PREFECT_API_URL") or f"PREFECT_HOME={root()}/prefect {here}/prefect server start"
    console.print(
        f"MLflow:  {mlflow}\nPrefect: {prefect}",
        highlight=False,
        soft_wrap=True,
    )


def main() -> None:
    """Run the command line; every known error is one line and its own exit code."""
    ending.listen()
    try:
        app()
    except SacpoError as error:
        print("\n".join(f"sacpo: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except ending.Terminated as told:
        print("sacpo: terminated; the same command goes on", file=sys.stderr)
        sys.exit(told.exit_code)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # typer has made it of Ctrl-C
            print("sacpo: interrupted; the same command goes on", file=sys.stderr)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):
            raise
        print(f"sacpo: {error.filename or 'runs'}: {error.strerror}; free space, or set SACPO_RUNS", file=sys.stderr)
        sys.exit(BadPlace.exit_code)
    finally:
        ending.leave_within(10)


if __name__ == "__main__":
    main()
