"""One run: its folder, its lock, its workers, its tracker. Stages are made through it."""

import logging
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, Generic, ParamSpec, TypeVar

from filelock import FileLock, Timeout

from models.artifacts import Noun, content_digest
from models.catalogue import versions
from models.data import sources
from models.errors import BadData, BadRecipe, Undecided
from models.files import sealed
from models.files.kept import RunsFolderEntry
from models.judges.protocol import described
from models.metrics import benchmarks
from models.policy.weights import base_digest, device_kind, precision
from models.preflight import examine, policies, refuse, undecidable
from models.recipe import Assessment, Judges, Recipe
from models.recipe.places import is_local
from models.words import counted
from tasks import leases
from tasks.registry import champion
from tasks.tracking import download
from tasks.tracking.connection import SERVER
from tasks.tracking.download import fetch
from tasks.tracking.ledger import Ledger
from tasks.tracking.tracker import Tracker
from tasks.work import health, store, terminal, workers
from tasks.work.progress import Progress
from tasks.work.progress_rows import ProgressRow
from tasks.work.runs_folder import root
from tasks.work.store import Stage, content_of

if TYPE_CHECKING:
    from models.plan import Plan

N = TypeVar("N", bound=Noun)
P = ParamSpec("P")
R = TypeVar("R", bound=Recipe | Assessment)
R_co = TypeVar("R_co", bound=Recipe | Assessment, covariant=True)

LOOKS = 5.0
"""Seconds between two looks at whether the run that is waited for asks a person."""

_log = logging.getLogger(__name__)


class Run(Generic[R_co]):
    """The run that a stage belongs to.

    Not a dataclass: Prefect would walk through its fields at every call of a task, while other threads change them.
    """

    def __init__(self, root: Path, recipe: R_co, digest: str, tracker: Tracker) -> None:
        self.root, self.recipe, self.digest, self.tracker = root, recipe, digest, tracker
        self.seconds: dict[str, float] = {}
        """Title of a stage → how long its result took to make, in whichever run that was."""
        self._announced: set[str] = set()  # keys of stages
        self._lock = threading.Lock()

    def make(self, does: Callable[Concatenate[Path, P], N], title: str, *args: P.args, **arguments: P.kwargs) -> N:
        """Return what a stage makes of its arguments, which are given by name: from the store, or from a worker."""
        assert not args, "a result is named by the names of its arguments"
        work = Stage(does, title, arguments)
        # Several tasks may need the same stage at the same time, each in a thread of its own: only one announces it.
        with self._lock:
            first = work.key not in self._announced
            self._announced.add(work.key)
        fresh = store.find(self.root, work) is None
        progress_before = store.progress_of_killed(self.root, work) if fresh and first else 0
        if progress_before:
            terminal.say(f"{title}: a killed attempt came to {progress_before}, going on", "dim")
        if fresh and first and work.folder(self.root).exists():
            terminal.say(f"{title}: the result that was there is damaged, and is made again", "dim")

        progress = Progress()

        def show(work: Stage[Noun], row: ProgressRow) -> None:
            progress(work, row)
            self.tracker.follow(work)

        noun = workers.run(self.root, work, show)
        progress.done(work)
        if first:
            terminal.finish_bar(title, store.seconds(noun), fresh)
        self.seconds[title] = store.seconds(noun)
        os.utime(noun.path)  # `sacpo clean` keeps what was used in the last days
        self.tracker.record(work, noun)
        return noun

    @cached_property
    def judges(self) -> dict[str, dict[str, str]]:
        """Name and version of each judge, as they are when the run begins; the folder of a local one is hashed."""
        return described(self.recipe.evaluation.judges)

    @property
    def folder(self) -> Path:
        """Where the report goes."""
        return folder(self.root, self.recipe, self.digest)


AnyRun = Run[Recipe | Assessment]
"""A run that trains, or one that only judges."""


def digest(recipe: Recipe | Assessment) -> str:
    """Return what names a run: the recipe, the content of all that it names, and what computes; no path."""
    places, key = (recipe.policies, "policy") if isinstance(recipe, Assessment) else ([recipe.base], "base")
    # Stages side by side compute the same as one after the other, so the number of processes is left out.
    settings = recipe.model_copy(update={"compute": recipe.compute.model_copy(update={"processes": 1})})
    files = sources.digests(recipe) | benchmarks.files(recipe.evaluation.tasks)
    bases = [base_digest(resolve_policy(place, key), key) for place in places]
    comparisons = [_described(recipe.evaluation.judges), _anchor(recipe)]
    return content_digest([content_of(settings), content_of(recipe.compute), files, bases, comparisons, versions()])


def _described(judges: Judges) -> dict[str, dict[str, str]]:
    """Return what names the judges by content; empty if one cannot be read, which `refuse_unusable` says in full."""
    with suppress(BadRecipe):
        return described(judges)
    return {}


def _anchor(recipe: Recipe | Assessment) -> str:
    """Return the digest of an anchor on this disk; empty for others, which the recipe names by version."""
    place = recipe.gate.anchor if isinstance(recipe, Recipe) else ""
    return base_digest(place, "gate.anchor") if is_local(place) else ""


def resolve_policy(place: str, key: str = "base") -> str:
    """Return a policy's place on this disk or hub; a registered version (`models:/…`) is fetched once."""
    return str(fetch(root(), place, key)) if place.startswith("models:/") else place


def refuse_unusable(recipe: Recipe | Assessment) -> None:
    """Refuse what can be known to be wrong before anything is trained; nothing is written.

    Raises:
        BadInput: a judge, a suite, the engine or a policy cannot be used, or the gate could not decide.
    """
    refuse(recipe.evaluation)
    examine(recipe, root() / RunsFolderEntry.store, resolve_policy)
    if isinstance(recipe, Recipe) and (why := undecidable(recipe)):
        raise BadData(why)


def plan_recipe(recipe: Recipe) -> "Plan":
    """Return what a recipe will do, with a sentence for each error in it.

    Raises:
        BadPolicy: a registered version that it names is not there.
    """
    from models.plan import plan  # here, since it imports scipy, which takes a second

    for key, place in policies(recipe):
        if place.startswith("models:/"):
            download.check(root(), place, key)
    return plan(recipe, root() / RunsFolderEntry.store)


def folder(root: Path, recipe: Recipe | Assessment, digest: str) -> Path:
    """Return where the report of a run goes."""
    return root / recipe.name / digest[:16]


def last_decision(recipe: Recipe) -> dict[str, str] | None:
    """Return when (`at`) and how (`outcome`) the gate decided on these data, this recipe and this base, if it did."""
    return Ledger(root()).last_decision(recipe.registered_name, digest(recipe))


def repair(root: Path) -> list[str]:
    """Repair what killed processes left behind; return a sentence per repair."""
    return [*leases.sweep(root), *champion.reconcile(root)]


@contextmanager
def open_run(recipe: R) -> Iterator[Run[R]]:
    """Hold the run's lease, lock, workers and tracker; a second identical command waits here.

    Raises:
        BadRecipe, BadData: a judge, a suite or the engine cannot be used; raised before anything is made.
        Undecided: the identical command waits for a person.
    """
    where = root()
    # The digest takes time, since all data are hashed. A process that is killed meanwhile has left a lease already.
    leases.take(where, recipe.name)
    # The command line has started them, and has checked the recipe; a deployed run has not.
    if not workers.are_running():
        _check_databases(where)
        refuse_unusable(recipe)
    name = digest(recipe)
    where.mkdir(parents=True, exist_ok=True)
    leases.take(where, recipe.name, name)
    lock = FileLock(where / f"{recipe.name}-{name[:16]}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _wait_for(lock, recipe, name)
    sealed.remove(_question(where, recipe, name))  # a run that died while it waited for a person left it
    try:
        for sentence in leases.sweep(where):
            terminal.say(sentence, "dim")
        yield from _with_workers(recipe, where, name)
    finally:
        lock.release()


def _wait_for(lock: FileLock, recipe: Recipe | Assessment, name: str) -> None:
    """Take the lock when the process that runs the same has ended.

    Args:
        name: digest of the run that is waited for.

    Raises:
        Undecided: that one asks a person, which may take days.
        BadData: what the recipe names is not what it was.
    """
    announced = False
    while True:
        if question := open_question(recipe, name):
            raise Undecided(question)
        if not announced:
            terminal.say("another process runs this recipe on these data; waiting for it to end")
            announced = True
        with suppress(Timeout):
            lock.acquire(timeout=LOOKS)
            break
    # After hours of waiting the files may be others. Our report would then replace the one that we waited for.
    if digest(recipe) != name:
        lock.release()
        raise BadData("what the recipe names has changed while this run waited; start it again")


def open_question(recipe: Recipe | Assessment, name: str) -> str:
    """Return where the run of this digest waits for a person's answer; empty if none does."""
    where = root()
    try:
        with FileLock(where / f"{recipe.name}-{name[:16]}.lock", blocking=False):
            return ""  # no process holds the run: one that asked has died
    except (Timeout, FileNotFoundError):
        with suppress(OSError):
            return _question(where, recipe, name).read_text("utf-8", "replace")
    return ""


@contextmanager
def question_is_open(run: AnyRun, question: str) -> Iterator[None]:
    """While a person is asked, let an identical command know: it then ends with this sentence instead of waiting."""
    place = _question(run.root, run.recipe, run.digest)
    sealed.write_text(place, question)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)


def _check_databases(root: Path) -> None:
    for sentence in health.check(root, os.environ | {"MLFLOW_TRACKING_URI": SERVER}):
        terminal.say(sentence, "dim")


def _question(root: Path, recipe: Recipe | Assessment, digest: str) -> Path:
    return root / f"{recipe.name}-{digest[:16]}.question"


def commit() -> str:
    """Return the git commit of this checkout, or an empty string."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False)
    return git.stdout.strip()


def _with_workers(recipe: R, where: Path, name: str) -> Iterator[Run[R]]:
    """Yield the run, with its workers and its tracker."""
    from prefect.runtime import flow_run

    tags = {"sacpo.recipe_digest": recipe.digest, "git.commit": commit()}
    tags |= {"prefect.flow_run_id": flow_run.id or "", "prefect.flow_run_url": flow_run.ui_url or ""}
    with workers.workers(recipe.compute, where):
        run = Run(where, recipe, name, Tracker(where, recipe, name, tags))
        # If another ledger decides about this model on the server, refuse now, and not after hours of training.
        if isinstance(recipe, Recipe) and SERVER:
            champion.claim_aliases(where, recipe.registered_name)
        device = device_kind(recipe.compute.device)
        count, threads = recipe.compute.processes, counted(recipe.compute.threads, "thread")
        processes = counted(count, "process", "processes") if count else "this process"
        terminal.say(f"{device}, {precision(device)}, {processes} of {threads}", "dim")
        terminal.start()
        try:
            yield run
        except BaseException as error:  # Ctrl-C and SIGTERM count too: the workers then write their checkpoints
            _log.info("the run ends: %r", error)
            workers.stop()
            run.tracker.fail("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        finally:
            terminal.stop()
