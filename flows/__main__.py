"""The command line: `sacpo run RECIPE`, one verb per flow. Heavy imports come after parsing."""

import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows import signals
from flows.admin import app as operations
from flows.carry_out import carry_out
from models.errors import BadPlace, BadRecipe, SacpoError
from tasks.access import proxies
from tasks.work import plain_text

if TYPE_CHECKING:
    pass

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
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe, for instance steps.1.lambda=[1,2]. Steps are counted from 0. A path here starts at "
        "the current folder, a path in the recipe at the recipe's folder. Repeatable.",
    ),
]
Retry = Annotated[
    bool, typer.Option("--retry-failed", help="Ask judges again for the verdicts that failed in a finished run.")
]
NO_ROOM = dict.fromkeys((errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT), "free space, or set SACPO_RUNS")
IN_THE_WAY = dict.fromkeys((errno.EISDIR, errno.ENOTDIR), "something else lies in this place; move it away")
TOO_MANY = dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n 1024)")
REMEDIES = NO_ROOM | IN_THE_WAY | TOO_MANY
"""Errors of the system that a user can mend → what to do."""
Which = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see `sacpo recipes`) or a TOML file.")]


@app.command()
def run(recipe: Which, set_: Changes = None, retry: Retry = False) -> None:
    """Train, merge, evaluate and register what a recipe describes.

    If the run was killed, this continues it. If it is finished, this shows its result.
    """
    from models.recipe.toml import read

    chosen = read(recipe, set_)
    carry_out(chosen, "align", retry)


@app.command()
def retrain(recipe: Which, set_: Changes = None) -> None:
    """Run a recipe if its data, recipe or base changed since the last decision; otherwise end at once."""
    from models.recipe.toml import read
    from tasks.run import last_decision
    from tasks.servers.environment import configure_clients

    chosen = read(recipe, set_)
    configure_clients()  # raises where a server is dead: a scheduled run must not end then as if nothing were new
    before = last_decision(chosen)
    if before:
        typer.echo(f"{chosen.name}: nothing new since {before['at']}: {before['outcome']}")
        raise typer.Exit
    carry_out(chosen, "align", retry=False)


@app.command()
def check(recipe: Which, set_: Changes = None) -> None:
    """Show what a recipe will do, without training: steps, rows, memory, time, and what the test prompts can show."""
    from flows.console import print_plan
    from models.recipe.toml import read
    from tasks.run import plan_recipe

    chosen = read(recipe, set_)
    plan = plan_recipe(chosen)
    print_plan(chosen, plan)
    for error in plan.errors:
        typer.echo(f"sacpo: {error}", err=True)
    raise typer.Exit(2 if plan.errors else 0)


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="The recipe to write, a .toml file that is not there yet.")] = Path(
        "recipe.toml"
    ),
    base: Annotated[
        str, typer.Option(metavar="MODEL", help="Your fine-tuned model: folder, .gguf file or hub id.")
    ] = "",
    helpful: Annotated[
        str, typer.Option(metavar="DATA", help="Comparisons of answers by helpfulness: file, folder or hub id.")
    ] = "",
    harmless: Annotated[
        str, typer.Option(metavar="DATA", help="Comparisons of answers by harmlessness: file, folder or hub id.")
    ] = "",
) -> None:
    """Write a first recipe with comments, for the model and the data that you have.

    sacpo detects the format of the data and writes it into a comment. For data with one answer per row, good or bad, it
    chooses KTO. Paths on this command line start at the current folder; paths in the recipe start at the recipe's
    folder. The recipe has comments that say how to add test prompts and judges.

    Then: sacpo check FILE, which trains nothing, and sacpo run FILE.

    Example: sacpo init mine.toml --base models/my-sft --helpful data/helpful.jsonl --harmless data/harmless.jsonl
    """
    from models.starter import write

    for sentence in write(file, base, helpful, harmless):
        typer.echo(sentence)
    typer.echo(f"{file}: written. Next: sacpo check {file}")


@app.command()
def evaluate(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="POLICY…",
            help="Folder, .gguf file, hub id or models:/NAME@ALIAS. All others are compared with the first. The first "
            "is tested only if you give no other.",
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
    """Judge policies as they are, without training, with the same report.

    Policies are tested against the bound in the order given; testing stops after the first one that does not hold it.
    """
    from models.recipe.toml import assessment

    chosen = assessment(policies, like, set_ or [], suite or [], judge or [])
    carry_out(chosen, "evaluate", retry)


app.add_typer(operations)

suites = typer.Typer(help="Work with suites: files of prompts with a role.", no_args_is_help=True)
app.add_typer(suites, name="suite")


@suites.callback()
def _suites() -> None:
    """Work with suites: files of prompts with a role."""


@suites.command()
def add(
    file: Annotated[
        Path,
        typer.Argument(help="The suite, a .jsonl file. It is created if it does not exist; its folder must exist."),
    ],
    prompt: Annotated[str, typer.Argument(help="What was asked.")],
    category: Annotated[str, typer.Option(help="Category of the harm, for instance weapons.")] = "",
    reference: Annotated[str, typer.Option(help="An answer that would have been right.")] = "",
) -> None:
    """Turn an incident into a prompt that must pass; name the file in evaluation.suites.must_pass."""
    from models.data.suites import add as append
    from models.words import counted

    new = "" if file.exists() else "a new suite; "
    typer.echo(f"{file}: {new}{counted(append(file, prompt, category, reference), 'prompt')}")


@app.command()
def diff(
    a: Annotated[
        str, typer.Argument(metavar="A", help="Folder of a report, models:/NAME/VERSION or models:/NAME@ALIAS.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, of the run that may be better.")],
) -> None:
    """Say whether B is better than A, and safe enough.

    Exit code 0 if B is shown to be better and safe enough, otherwise 4.
    """
    from models.errors import Undecided
    from models.report.diff import difference, sentence, side
    from tasks.tracking.download import fetch_report
    from tasks.work.runs_folder import root

    there, here = (
        side(*fetch_report(root(), place)) if place.startswith("models:/") else side(Path(place)) for place in (a, b)
    )
    changes = difference(there, here)
    for title, rows in (("recipe", changes.recipe), ("data", [(k, x[:12], y[:12]) for k, x, y in changes.data])):
        for key, old, new in rows:
            typer.echo(f"{title:8} {key}: {old} → {new}")
    for name, *figures in changes.figures:
        cells = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" if f else "–" for f in figures]
        typer.echo(f"{'result':8} {name}: {' → '.join(cells)}")
    for metric, same in changes.judges:
        agree = f"{same.value:.3f} [{same.low:.3f}, {same.high:.3f}] of {same.n} answers"
        typer.echo(f"{'judges':8} {metric}: agree on {agree}")
    typer.echo(sentence(there, here, changes))
    raise typer.Exit(0 if changes.holds else Undecided.exit_code)


@app.command()
def chat(
    policy: Annotated[
        str,
        typer.Argument(metavar="POLICY", help="Folder of a policy (a `path` of report.json) or models:/NAME@ALIAS."),
    ],
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    longest: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 256,
) -> None:
    """Talk with a policy in the terminal; an empty line ends the conversation.

    A policy that sacpo did not make is examined first, like the base of a run.
    """
    from models.chat import talk
    from models.files.kept import RunsFolderEntry
    from tasks.run import resolve_policy
    from tasks.work.runs_folder import root

    talk(resolve_policy(policy, "policy"), temperature, longest, root() / RunsFolderEntry.store)


@app.command()
def recipes() -> None:
    """List the recipes that come with sacpo."""
    from models.recipe.toml import read, shipped

    for name in shipped():
        chosen = read(name)
        steps = " → ".join(f"{s.metric} ({s.method}, λ={', '.join(f'{v:g}' for v in s.lambda_)})" for s in chosen.steps)
        typer.echo(f"{name:24} {chosen.base:12} β={chosen.beta:g}  {steps}")


@app.command()
def keys(
    prefix: Annotated[
        str,
        typer.Argument(metavar="[PREFIX]", help="Show only keys that begin with this, for instance `evaluation.`."),
    ] = "",
) -> None:
    """List every key of a recipe with its default and what it means."""
    from models.recipe.toml import keys as all_keys

    rows = [row for row in all_keys() if row[0].startswith(prefix)]
    if not rows:
        raise BadRecipe(f"no key begins with {prefix!r}; `sacpo keys` lists them all")
    for key, default, meaning in rows:
        typer.echo(f"{key}{f' = {default}' if default else ''}\n    {meaning}")


def main() -> None:
    """Run the command line; every known error is one line and its own exit code."""
    plain_text.guard()
    signals.listen()
    os.environ.update(proxies.direct(os.environ))
    try:
        app()
    except SacpoError as error:
        print("\n".join(f"sacpo: {line}" for line in str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except signals.Terminated as terminated:
        print(signals.GOES_ON, file=sys.stderr)
        sys.exit(terminated.exit_code)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:  # typer ends with this code after Ctrl-C
            print(signals.INTERRUPTED, file=sys.stderr)
        raise
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        print(f"sacpo: {error.filename or 'runs'}: {error.strerror}; {remedy}", file=sys.stderr)
        sys.exit(BadPlace.exit_code)
    finally:
        signals.leave()


if __name__ == "__main__":
    main()
