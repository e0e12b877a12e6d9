"""The verbs of operation: which version serves, and what may be deleted. Flows among them are also deployments."""

import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Name in the model registry, as `quickstart`.")]
Why = Annotated[str, typer.Option(help="Reason; it is written to the promotion log.")]


def _here(prefect: bool = True) -> Path:
    """Return the runs folder, as home of Prefect and MLflow; servers that the environment names answer and let us in.

    Args:
        prefect: whether the command sends anything to Prefect, whose import takes two seconds.
    """
    from tasks.servers.environment import configure_clients, refuse_hidden_server
    from tasks.work.runs_folder import root

    configure_clients()
    if prefect:
        refuse_hidden_server()
    return root()


@app.command()
def promote(
    model: Model,
    version: Annotated[str, typer.Argument(metavar="[VERSION]", help="Number; default: the challenger.")] = "",
    why: Why = "promoted by hand",
    force: Annotated[
        bool, typer.Option("--force", help="Promote the version even if it did not pass the gate.")
    ] = False,
) -> None:
    """Make a version the champion; it must have passed the gate."""
    from tasks.registry import champion as registry

    entry = registry.promote(_here(), model, version, why, force=force)
    typer.echo(f"{model}: champion {entry.version_from or 'none'} → {entry.version_to}")


@app.command()
def rollback(model: Model, why: Why = "rolled back by hand") -> None:
    """Bring back the champion that served before this one."""
    from tasks.registry import champion as registry

    entry = registry.rollback(_here(), model, why)
    typer.echo(f"{model}: champion {entry.version_from} → {entry.version_to}")


@app.command()
def champion(model: Model) -> None:
    """Show which version serves, its λ, its origin, its evidence, and who decided what and when."""
    from models.markdown import readable
    from tasks.registry import champion as registry

    serving = registry.serving(_here(prefect=False), model)
    typer.echo(readable(serving.description) or f"{model} version {serving.version} has no model card")
    typer.echo("Promotion log")
    for entry in serving.log:
        change = f"{entry.version_from or 'none'} → {entry.version_to or 'none'}"
        typer.echo(f"  {entry.number}  {entry.at}  {entry.action:8}  {change:10}  {entry.who}  {entry.why}")
    aliases = ", ".join(f"{alias} {version}" for alias, version in sorted(serving.aliases.items()))
    typer.echo(f"Aliases: {aliases}")
    # A person may have moved an alias by hand, and `@champion` then leads elsewhere until the hourly repair.
    expected = {registry.CHAMPION: serving.version, registry.PREVIOUS: serving.previous}
    if any(serving.aliases.get(alias, "") != version for alias, version in expected.items()):
        typer.echo("They are not where the promotion log says; `sacpo reconcile` puts them there")


@app.command()
def reconcile() -> None:
    """Repair what killed processes left behind.

    These are aliases that differ from the promotion log, and runs that are still marked as running.
    """
    from tasks.run import repair

    typer.echo("\n".join(repair(_here())) or "nothing to repair")


@app.command()
def clean(
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it, only say what would be freed.")] = False,
    days: Annotated[float, typer.Option(min=0, help="Keep what was used in the last DAYS.")] = 7,
) -> None:
    """Delete results that no champion, former champion, challenger or unfinished run needs."""
    from tasks.clean import sweep

    needed, free = sweep(_here(), days, yes)
    for place, size in free:
        typer.echo(f"{size / 2**20:10.1f} MiB  {place.name}")
    total = sum(size for _, size in free) / 2**20
    typer.echo(
        f"{'freed' if yes else 'would free'} {total:.1f} MiB in {len(free)} folders; {needed} are kept"
        + ("" if yes or not free else "; delete with --yes")
    )


@app.command()
def serve(
    limit: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
) -> None:
    """Serve all deployments from this process, for a laptop: no worker, no work pool. Ends with Ctrl-C."""
    from flows.deploy import serve_all

    serve_all(limit)


@app.command()
def up(
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow on 127.0.0.1.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect on 127.0.0.1.")] = 4200,
    postgres: Annotated[
        str,
        typer.Option(
            metavar="URL",
            envvar="SACPO_POSTGRES",
            help="postgresql://user@host:port with databases mlflow, prefect and sacpo; password in PGPASSWORD.",
        ),
    ] = "",
    artifacts: Annotated[
        str,
        typer.Option(
            metavar="PLACE", envvar="SACPO_ARTIFACTS", help="Where MLflow keeps artifacts, for instance s3://bucket."
        ),
    ] = "",
    worker: Annotated[
        bool,
        typer.Option(
            " /--no-worker", show_default=False, help="Start the servers and register the deployments, but no worker."
        ),
    ] = True,
    show_password: Annotated[
        bool, typer.Option("--show-password", help="Start nothing; print what to type into each page.")
    ] = False,
) -> None:
    """Start MLflow, Prefect, a worker and all deployments on this machine; Ctrl-C stops them all."""
    from flows.deploy import deployments
    from tasks.access import passwords
    from tasks.servers.options import ServerOptions
    from tasks.servers.up import up
    from tasks.work.runs_folder import writable

    if show_password:
        typer.echo("\n".join(passwords.login_lines(writable(), os.environ)))
        return
    # Called for its errors only: `prefect deploy` would write them to its log, after everything has been started.
    deployments()
    up(writable(), ServerOptions(mlflow_port, prefect_port, postgres, artifacts, worker), typer.echo)
