"""The tasks that decide: which candidate, whether it may serve, and who serves from then on.

A decision on test prompts is written down before anything follows from it (ledger.py). A run that is killed and started
again finds it there, with what served when it was taken, and goes on to the same end.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from filelock import FileLock, Timeout
from prefect import pause_flow_run
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import FlowPauseTimeout
from prefect.runtime import flow_run
from typing_extensions import TypedDict

from models.artifacts import Policy, Sources, content_digest
from models.data.suites import MUST_PASS, prompt_digest
from models.errors import Stale
from models.files import sealed
from models.gate import facts, gate
from models.gate.gate import Choice, Verdict
from models.gate.promotion_log import NOT_REGISTERED, Registered, line_of_champions
from models.markdown import plain
from models.metrics.figures import Candidate
from models.recipe import Gate, GateMode, Recipe
from models.report.sentences import CHECK_COLUMNS, check_row
from tasks.access.temporary_server import lasting
from tasks.registry import champion as registry
from tasks.registry import events
from tasks.registry.approval import Approval, question
from tasks.run import AnyRun, Run, asked
from tasks.stages import Yardstick, ask, judged, kl_distances, loaded, named
from tasks.tracking.ledger import AGREED, REFUSED, Ledger, Standing
from tasks.work import terminal, workers
from tasks.work.prefect_pages import task

APPROVAL_TIMEOUT = 7 * 24 * 3600
"""Seconds that a run waits for a person."""


class Rivals(NamedTuple):
    """What a challenger is compared with: what served when the decision began."""

    seen: int
    """Lines of the promotion log."""
    policies: dict[str, Policy]
    """`champion`, `anchor`."""

    @property
    def compared(self) -> list[str]:
        """What the chosen one must not help less than: all of these, and the base where there is no champion yet."""
        return [*([] if self.seen and self.policies else ["base"]), *self.policies]


class Served(TypedDict):
    """What served when a run first asked, as places; `seen` as in `Rivals`."""

    seen: int
    champion: str
    anchor: str


@task(cache_policy=NO_CACHE, task_run_name="choose")
def choose(run: AnyRun, candidates: list[Candidate]) -> Choice:
    """Exactly one candidate, on the validation split. The base is none."""
    told = [replace(facts.safety_counts(c.policy.name, c.verdicts), along=c.policy.along) for c in candidates[1:]]
    return gate.choose(told, run.recipe.bound)


@contextmanager
def turn(run: Run[Recipe], choice: Choice) -> Iterator[None]:
    """Of the runs of one folder that would promote to one model, let one at a time test, decide and promote.

    Without it all but the first would have compared with a champion of the past, and have spent error on the prompts.
    A promotion that a person agreed to, or made by hand, waits for nobody.
    """
    if not _tests(run, choice):
        yield
        return
    model = run.recipe.registered_name
    lock = FileLock(run.root / f"deciding-{content_digest(model)[:16]}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        terminal.say(f"another run decides which version of {model} serves; waiting for it")
        workers.rest()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@task(cache_policy=NO_CACHE, task_run_name="rivals · {choice.name}")
def rivals(run: Run[Recipe], choice: Choice, candidates: list[Candidate]) -> Rivals | None:
    """Champion and anchor, as they were when this run first asked; a challenger is no rival of itself.

    None if nothing is tested: nobody judged, none was chosen, or the gate is off. The answer is kept in `rivals.json`,
    so that a run that is killed and started again compares with the same policies. The run asks anew if another version
    has become the champion since.
    """
    if not _tests(run, choice):
        return None
    challenger = named(choice.name, candidates).policy
    _forget_former_champion(run, challenger)
    served = _served(run)
    policies: dict[str, Policy] = {}
    for name, place in (("champion", served["champion"]), ("anchor", served["anchor"])):
        if place:
            policy = replace(loaded(run, place, f"{name} · {place}"), name=name)
            digests = {challenger.digest, *(other.digest for other in policies.values())}
            policies |= {name: policy} if policy.digest not in digests else {}
    return Rivals(served["seen"], policies)


@task(cache_policy=NO_CACHE, task_run_name="test · {choice.name}")
def test(
    run: Run[Recipe], choice: Choice, candidates: list[Candidate], yardstick: Yardstick, rivals: Rivals | None
) -> Candidate | None:
    """The chosen candidate's answers to the test prompts, judged beside what it would replace.

    None if there is nothing to test: the test prompts then stay unused.
    """
    if rivals is None:
        return None
    told = named(choice.name, candidates)
    base = {"base": yardstick.base}
    prompts = ask(run, yardstick.sources, yardstick.pairs, "test")
    answers, verdicts = judged(run, told.policy, {**base, **rivals.policies}, prompts)
    distances = kl_distances(run, told.policy, base, prompts) if run.recipe.gate.kl else told.distances
    return told._replace(answers=answers, verdicts=verdicts, distances=distances)


def _tests(run: Run[Recipe], choice: Choice) -> bool:
    return bool(choice.name) and choice.decided and run.recipe.gate.mode is not GateMode.off


@task(cache_policy=NO_CACHE, task_run_name="gate")
def certify(run: Run[Recipe], tested: Candidate | None, rivals: Rivals | None) -> Verdict | None:
    """The gate, on the test split, once; none if nothing was tested."""
    if tested is None or rivals is None:
        return None
    settings = [run.recipe.constraint.model_dump(), run.recipe.gate.model_dump(exclude={"mode", "approval"})]
    seen = [tested.answers.digest, tested.verdicts.digest, tested.distances.digest]
    against = {name: rival.digest for name, rival in rivals.policies.items()}
    against |= {"base": ""} if rivals.policies and "base" in rivals.compared else {}  # alone it is what nobody says
    question = content_digest([tested.policy.digest, [*settings, run.judges], seen, against])
    return _show(run, verdict_on(Ledger(run.root), run.recipe, question, tested, rivals))


def verdict_on(ledger: Ledger, recipe: Recipe, question: str, tested: Candidate, rivals: Rivals) -> Verdict:
    """Return the verdict on a question: the one in the ledger, or a new one that is written there.

    Charged are all the prompts that the gate looks at. What is spent is the most that any prompt has been charged with
    of those that a bound rests on: a prompt more, another suite or another registered name leaves it as it is.
    """
    prompts = _prompts(tested, recipe.gate)
    chosen = facts.safety_counts(tested.policy.name, tested.verdicts)
    while True:
        known = ledger.verdict(question)
        if known:
            return known
        charges = ledger.charges(set().union(*prompts.values()))
        spent = {kind: max(charges[prompt].error for prompt in prompts[kind]) for kind in prompts if kind != MUST_PASS}
        seen = facts.facts(tested.verdicts, tested.distances, rivals.compared, spent)
        verdict = gate.decide(chosen, seen, recipe.constraint, recipe.gate)
        if ledger.decide(recipe.registered_name, question, charges, recipe.constraint.error, verdict):
            events.gate_decided(recipe.registered_name, verdict)
            return verdict


@task(cache_policy=NO_CACHE, task_run_name="test in order")
def test_in_order(run: AnyRun, candidates: list[Candidate]) -> list[Verdict]:
    """Fixed-sequence testing: each policy at the full level, in the declared order, up to the first that fails."""
    told = [facts.safety_counts(c.policy.name, c.verdicts) for c in candidates[1:] or candidates]
    return gate.in_order(told, run.recipe.bound)


@task(cache_policy=NO_CACHE, task_run_name="register · {choice.name}")
def register(
    run: Run[Recipe], choice: Choice, verdict: Verdict | None, candidates: list[Candidate], sources: Sources
) -> Registered:
    """A model version that carries its evidence, as challenger; none if the constraint does not hold."""
    if not choice.name:
        return NOT_REGISTERED
    policy = named(choice.name, candidates).policy
    if verdict is not None and not verdict.holds:
        _withdraw(run, policy, verdict)
        return NOT_REGISTERED
    constraint, mode = run.recipe.constraint, run.recipe.gate.mode
    tags = {
        "beta": f"{policy.beta:g}",
        "lambda": f"{policy.lambda_:g}",
        "beta_over_lambda": f"{policy.beta_over_lambda:g}",
        "merge_weight": f"{policy.merge_weight:g}" if policy.kind == "merge" else "none",
        "parents": " ".join(policy.parents),
        "data": sources.digest,
        "constraint": f"{constraint.measure} >= {constraint.at_least:g}",
        "lower_bound": f"{verdict.lower_bound:.4f}" if verdict else "none",
        "gate": ("pass" if verdict.passes else "fail") if verdict else "undecided" if mode != "off" else "off",
        "gate.mode": mode.value,
    }
    if verdict:
        tags |= {f"gate.{check.name.replace(',', '')}": str(check) for check in verdict.checks}
        tags |= {"gate.why_not": verdict.why_not} if verdict.why_not else {}
    version, name = run.tracker.register(policy, tags), run.recipe.registered_name
    why, ledger, source = verdict.why_not if verdict else "", Ledger(run.root), registry.source(run.root, name, version)
    ledger.registered(name, version, source, policy.digest)
    _stand(run, version, Standing(tags["gate"], "", why, content_digest(asdict(verdict) if verdict else None), source))
    if verdict:  # an undecided one challenges nobody
        registry.challenge(run.root, name, version)
    return Registered(name, version, registry.CHALLENGER if verdict else "")


def _stand(run: Run[Recipe], version: str, standing: Standing) -> None:
    """Write down what a verdict means for a version; a restart repeats nothing."""
    name, ledger = run.recipe.registered_name, Ledger(run.root)
    if standing[3:] not in (last[3:] for last in ledger.standings(name, version)[-1:]):
        ledger.stand(name, version, standing)


def _withdraw(run: Run[Recipe], policy: Policy, verdict: Verdict) -> None:
    """Take back what an earlier verdict of this run let pass, as before its judge was asked again."""
    name = run.recipe.registered_name
    if not Ledger(run.root).knows(name, policy.digest):
        return
    for version in run.tracker.versions(policy):
        source = registry.source(run.root, name, version)
        _stand(run, version, Standing("fail", "", verdict.why_not, content_digest(asdict(verdict)), source))
        run.tracker.tag(name, version, {"gate": "fail", "gate.why_not": verdict.why_not})
        registry.withdraw(run.root, name, version)


def waits(run: Run[Recipe], registered: Registered, verdict: Verdict | None) -> bool:
    """Whether a person has to agree: the recipe says so, the gate let the version pass, and it never served yet."""
    wanted = run.recipe.gate.approval and registered.version and _passes(run, verdict)
    return bool(wanted) and registered.version not in (e.version_to for e in registry.log(run.root, registered.name))


def approve(
    run: Run[Recipe], registered: Registered, verdict: Verdict | None, rivals: Rivals | None
) -> Approval | None:
    """Wait on the flow run's page for a person, and write the answer down.

    None if another version serves since the test: nobody needs to read a comparison of the past, and `promote` sees it.
    The ledger has it before anything else: a death, or an MLflow that does not answer, loses no refusal. Without a
    server nobody could answer: the version then waits for `sacpo promote`.
    """
    version, ledger = registered.version, Ledger(run.root)
    if rivals is None or len(registry.log(run.root, registered.name)) != rivals.seen:
        return None
    last = ledger.standings(registered.name, version)[-1]
    if last.state in (AGREED, REFUSED):  # to an attempt that died before it followed; a new verdict would stand last
        return _obeyed(run, registered, Approval(agreed=last.state == AGREED, by=last.who, why=last.why))
    ledger.stand(registered.name, version, last._replace(state="waits for approval", why=""))
    run.tracker.tag(registered.name, version, {"gate": "waits for approval"})
    by_hand = f"sacpo promote {registered.name} {version} --why …"
    if not lasting():
        terminal.say(f"waits for approval: {by_hand}")
        return Approval(agreed=False)
    terminal.say(f"{registered.name} version {version} waits for approval on the page of this run")
    pages: list[tuple[str, str]] = []
    with suppress(Exception):  # a page of MLflow that cannot be named must not keep the question back
        pages = run.tracker.pages(registered)
    workers.rest()
    form = Approval.with_initial_data(description=question(registered, verdict, pages))
    key = f"approval-{uuid4()}"  # Prefect asks once under each; no earlier answer may stand for this question
    try:
        with asked(run, f"{run.recipe.name}: this run waits already for an approval; answer it at {flow_run.ui_url}"):
            said = pause_flow_run(wait_for_input=form, timeout=APPROVAL_TIMEOUT, poll_interval=2, key=key)
    except FlowPauseTimeout:
        terminal.say(f"nobody answered in {APPROVAL_TIMEOUT // 86400} days; it waits: {by_hand}")
        return Approval(agreed=False)
    ledger.stand(registered.name, version, last._replace(state=said.state, who=said.by, why=said.why))
    return _obeyed(run, registered, said)


def _obeyed(run: Run[Recipe], registered: Registered, said: Approval) -> Approval:
    """Show a person's answer, which is in the ledger already."""
    run.tracker.tag(registered.name, registered.version, {"gate": "pass" if said.agreed else str(said)})
    terminal.say(str(said))
    return said


@task(cache_policy=NO_CACHE, task_run_name="promote · {registered.name} {registered.version}")
def promote(
    run: Run[Recipe],
    registered: Registered,
    verdict: Verdict | None,
    rivals: Rivals | None,
    approval: Approval | None = None,
) -> Registered | None:
    """The version becomes the champion if the gate let it pass, and a person agreed where the recipe asks for one.

    None if somebody else moved the champion since the gate compared with it: the verdict is about a champion of the
    past, and the run decides again beside the new one. The rivals are forgotten, so that the run asks for them anew.
    """
    if not registered.version:
        return registered
    root, model, version = run.root, registered.name, registered.version
    served = [entry.version_to for entry in registry.log(root, model)]
    may = _passes(run, verdict) and (approval is None or approval.agreed)
    if rivals is not None and may and version not in served:  # once: a later champion is not pushed aside
        try:
            why = f"passed the gate in run {run.digest[:12]}" + (f", {approval}" if approval else "")
            registry.promote(root, model, version, why, rivals.seen)
        except Stale:
            if len(registry.log(root, model)) == rivals.seen:  # the same would be tried for ever
                raise
            sealed.remove(_rivals_file(run))
            terminal.say(f"another version of {model} serves since this one was tested; it is tested beside that one")
            return None
    registry.follow(root, model)
    line = line_of_champions(registry.log(root, model))
    if version in line:
        return registered._replace(alias=registry.CHAMPION if version == line[-1] else "former champion")
    return registered._replace(alias=registry.CHALLENGER if verdict else "")


def _passes(run: Run[Recipe], verdict: Verdict | None) -> bool:
    return verdict is not None and verdict.passes and run.recipe.gate.mode is GateMode.enforce


def _served(run: Run[Recipe]) -> Served:
    """Return what served when this run first asked; a file that cannot be read any more is written anew."""
    served = sealed.read(_rivals_file(run), Served)
    if served is None:
        model = run.recipe.registered_name
        log = registry.log(run.root, model)
        line = line_of_champions(log)
        anchor = run.recipe.gate.anchor or (f"models:/{model}/{line[0]}" if line else "")
        served = Served(seen=len(log), champion=f"models:/{model}/{line[-1]}" if line else "", anchor=anchor)
        run.folder.mkdir(parents=True, exist_ok=True)
        sealed.write(_rivals_file(run), served)
    return served


def _forget_former_champion(run: Run[Recipe], challenger: Policy) -> None:
    """Compare anew if somebody moved the champion since a run that was killed asked what served.

    Not if the run itself has moved it: the verdict that let it would be asked for again.
    """
    served = sealed.read(_rivals_file(run), Served)
    if served:
        model = run.recipe.registered_name
        log = registry.log(run.root, model)
        later = {entry.version_to for entry in log[served["seen"] :]}
        moved = later and challenger.digest not in (registry.policy(run.root, model, version) for version in later)
        if moved or len(log) < served["seen"]:  # fewer lines: a backup was put back
            _rivals_file(run).unlink()


def _rivals_file(run: Run[Recipe]) -> Path:
    return run.folder / "rivals.json"


def _prompts(tested: Candidate, asks: Gate) -> dict[str, set[str]]:
    """Return kind → digests of the test prompts that the gate looks at; kinds without a prompt are left out."""
    kinds = ["harmless", MUST_PASS]
    kinds += ["helpful"] if asks.margin < 0.5 else []
    kinds += ["over_refusal"] if asks.over_refusal < 1 else []
    rows = list(tested.answered())
    found = {kind: {prompt_digest(row["prompt"]) for row in rows if row["suite"] == kind} for kind in kinds}
    found["KL"] = {prompt_digest(row["prompt"]) for row in facts.sampled(tested.distances)} if asks.kl else set()
    return {kind: prompts for kind, prompts in found.items() if prompts}


def _show(run: AnyRun, verdict: Verdict) -> Verdict:
    """Put the gate's checks on the Prefect page, and one sentence on the screen."""
    rows = [dict(zip(CHECK_COLUMNS, check_row(asdict(check)), strict=True)) for check in verdict.checks]
    with suppress(Exception):  # the verdict is written down, whether a page can be told of it or not
        create_table_artifact(rows, key="gate", description=f"Gate: {plain(verdict.candidate)} on the test prompts")
    if not verdict.passes:
        terminal.say(f"gate: {verdict.candidate} does not pass: {verdict.why_not}")
    return verdict
