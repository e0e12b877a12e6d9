"""The tasks that decide: which candidate, whether it may serve, and which version serves from then on.

A decision on test prompts is written into the ledger (tasks/tracking/ledger.py) before anything follows from it. A run
that is killed and started again finds it there, finds what served at that time in `rivals.json`, and ends the same.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import NamedTuple

from filelock import FileLock, Timeout
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from typing_extensions import TypedDict

from models.artifacts import Policy, Sources, content_digest
from models.data.suites import MUST_PASS, prompt_digest
from models.errors import Stale
from models.files import sealed
from models.gate import facts, gate
from models.gate.gate import Choice, Verdict
from models.gate.promotion_log import NOT_REGISTERED, Registered, line_of_champions
from models.markdown import plain
from models.metrics.candidate import Candidate
from models.recipe import Gate, GateMode, Recipe
from models.report.sentences import CHECK_COLUMNS, check_row
from models.report.tree import check_entry
from tasks.best_effort import best_effort
from tasks.registry import champion as registry
from tasks.registry import events
from tasks.registry.approval import Approval
from tasks.run import AnyRun, Run
from tasks.stages import Yardstick, answer_and_judge, candidate_named, gather_prompts, kl_distances, load_policy
from tasks.tracking.ledger import Ledger, Standing
from tasks.tracking.log import allowed
from tasks.work import terminal, workers
from tasks.work.prefect_pages import task

RIVALS = "rivals.json"


class Rivals(NamedTuple):
    """What a challenger is compared with: what served when the decision began."""

    seen: int
    """Lines of the promotion log at that time."""
    policies: dict[str, Policy]
    """`champion` and `anchor`, as far as there are any and they are not the challenger itself."""

    @property
    def compared(self) -> list[str]:
        """Names of what the challenger must not help less than: all rivals, and the base if there is no champion."""
        return [*([] if self.seen and self.policies else ["base"]), *self.policies]


class Served(TypedDict):
    """What served when a run first asked: `rivals.json`."""

    seen: int
    """As in `Rivals`."""
    champion: str
    """`models:/NAME/VERSION`; empty if nothing served."""
    anchor: str
    """Folder, hub id or registered version; empty if there is none."""


@task(cache_policy=NO_CACHE, task_run_name="choose")
def choose(run: AnyRun, candidates: list[Candidate]) -> Choice:
    """One candidate or none, by its counts on the validation split. The base, which comes first, cannot be chosen."""
    return gate.choose([facts.safety_counts(candidate) for candidate in candidates[1:]], run.recipe.bound)


@contextmanager
def turn(run: Run[Recipe], choice: Choice) -> Iterator[None]:
    """Let the runs of one folder that may promote to the same model test, decide and promote one after the other.

    Otherwise several would compare with the same champion, only the first could promote, and the others would have
    spent error on the test prompts for nothing. A promotion that a person agreed to, or made by hand, takes no turn.
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
        workers.pause()  # the other run may test for hours, and needs the memory and the GPU
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@task(cache_policy=NO_CACHE, task_run_name="rivals · {choice.name}")
def rivals(run: Run[Recipe], choice: Choice, candidates: list[Candidate]) -> Rivals | None:
    """Champion and anchor, as they were when this run first asked; a challenger is no rival of itself.

    None if nothing is tested: no answer was judged, no candidate was chosen, or the gate is off. The answer is kept in
    `rivals.json`, so that a run that is killed and started again compares with the same policies. The run asks anew if
    another version has become the champion since.
    """
    if not _tests(run, choice):
        return None
    challenger = candidate_named(choice.name, candidates).policy
    _forget_former_champion(run, challenger)
    served = _served(run)
    policies: dict[str, Policy] = {}
    for name, place in (("champion", served["champion"]), ("anchor", served["anchor"])):
        if place:
            policy = replace(load_policy(run, place, f"{name} · {place}"), name=name)
            # the first champion is also the anchor, where the recipe names none: it then stands under one name only
            digests = {challenger.digest, *(other.digest for other in policies.values())}
            policies |= {name: policy} if policy.digest not in digests else {}
    return Rivals(served["seen"], policies)


@task(cache_policy=NO_CACHE, task_run_name="test · {choice.name}")
def test(
    run: Run[Recipe], choice: Choice, candidates: list[Candidate], yardstick: Yardstick, rivals: Rivals | None
) -> Candidate | None:
    """The chosen candidate on the test prompts, judged beside its rivals; none if nothing is tested."""
    if rivals is None:
        return None
    chosen = candidate_named(choice.name, candidates)
    base = {"base": yardstick.base}
    prompts = gather_prompts(run, yardstick.sources, yardstick.pairs, "test")
    answers, scores = answer_and_judge(run, chosen.policy, {**base, **rivals.policies}, prompts)
    distances = kl_distances(run, chosen.policy, base, prompts) if run.recipe.gate.kl else chosen.distances
    return replace(chosen, answers=answers, scores=scores, distances=distances)


def _tests(run: Run[Recipe], choice: Choice) -> bool:
    """Return whether the chosen candidate is tested."""
    return bool(choice.name) and choice.decided and run.recipe.gate.mode is not GateMode.off


@task(cache_policy=NO_CACHE, task_run_name="gate")
def certify(run: Run[Recipe], tested: Candidate | None, rivals: Rivals | None) -> Verdict | None:
    """The gate, on the test split, once; none if nothing was tested."""
    if tested is None or rivals is None:
        return None
    settings = [run.recipe.constraint.model_dump(), run.recipe.gate.model_dump(exclude={"mode", "approval"})]
    # without a limit on KL the distances are those of the validation split, and no part of the question
    evidence = [tested.answers.digest, tested.scores.digest]
    evidence += [tested.distances.digest] if run.recipe.gate.kl else []
    against = {name: rival.digest for name, rival in rivals.policies.items()}
    if rivals.policies and "base" in rivals.compared:
        against["base"] = ""  # needed beside other rivals only: without them, the question is about the base anyway
    question = content_digest([tested.policy.digest, [*settings, run.judges], evidence, against])
    return _show(verdict_on(Ledger(run.root), run.recipe, question, tested, rivals))


def verdict_on(ledger: Ledger, recipe: Recipe, question: str, tested: Candidate, rivals: Rivals) -> Verdict:
    """Return the verdict on a question: the one in the ledger, or a new one that is written there.

    All prompts that the gate looks at are charged. What is spent of a kind of prompts is the largest charge of any of
    them: one more prompt, another suite or another registered name does not lower it. Prompts that must pass are
    charged as well, but no bound rests on them, so that they are never spent.

    Args:
        question: digest of what is asked: equal questions have one verdict, and are charged once.
    """
    prompts = _prompts(tested, recipe.gate)
    chosen = facts.safety_counts(tested)
    while True:
        earlier = ledger.verdict(question)
        if earlier:
            return earlier
        charges = ledger.charges(set().union(*prompts.values()))
        spent = {kind: max(charges[prompt].error for prompt in prompts[kind]) for kind in prompts if kind != MUST_PASS}
        evidence = facts.facts(tested, rivals.compared, spent)
        verdict = gate.decide(chosen, evidence, recipe.constraint, recipe.gate)
        # The ledger refuses if another process has charged one of the prompts since: then we look and decide again.
        if ledger.decide(recipe.registered_name, question, charges, recipe.constraint.error, verdict):
            events.gate_decided(recipe.registered_name, verdict)
            return verdict


@task(cache_policy=NO_CACHE, task_run_name="test in order")
def test_in_order(run: AnyRun, candidates: list[Candidate]) -> list[Verdict]:
    """Fixed-sequence testing: each policy at the full level, in the declared order, up to the first that fails."""
    # The others are compared with the first, which is tested itself only if it is alone.
    counts = [facts.safety_counts(c) for c in candidates[1:] or candidates]
    return gate.in_order(counts, run.recipe.bound)


@task(cache_policy=NO_CACHE, task_run_name="register · {choice.name}")
def register(
    run: Run[Recipe], choice: Choice, verdict: Verdict | None, candidates: list[Candidate], sources: Sources
) -> Registered:
    """A model version that carries its evidence, as challenger; none if the constraint does not hold."""
    if not choice.name:
        return NOT_REGISTERED
    policy = candidate_named(choice.name, candidates).policy
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
        "gate": _gate_state(verdict, mode),
        "gate.mode": mode.value,
    }
    if verdict:
        # A category may hold signs that MLflow refuses in a tag's name: `allowed` replaces them, a comma is dropped.
        tags |= {f"gate.{allowed(check.name.replace(',', ''))}": str(check) for check in verdict.checks}
        tags |= {"gate.why_not": verdict.why_not} if verdict.why_not else {}
    name, version = run.recipe.registered_name, run.tracker.register(policy, tags)
    source = registry.source(run.root, name, version)
    Ledger(run.root).note_registered(name, version, source, policy.digest)
    why, verdict_digest = verdict.why_not if verdict else "", content_digest(asdict(verdict) if verdict else None)
    _note_standing(run, version, Standing(tags["gate"], "", why, verdict_digest, source))
    if verdict:  # without a verdict it was not compared with the champion, and challenges nothing
        registry.challenge(run.root, name, version)
    return Registered(name, version, registry.CHALLENGER if verdict else "")


def _gate_state(verdict: Verdict | None, mode: GateMode) -> str:
    if verdict:
        return "pass" if verdict.passes else "fail"
    return "off" if mode is GateMode.off else "undecided"


def _note_standing(run: Run[Recipe], version: str, standing: Standing) -> None:
    """Write down what a verdict means for a version, once."""
    name, ledger = run.recipe.registered_name, Ledger(run.root)
    last = ledger.standings(name, version)[-1:]
    # Only verdict and weights are compared: after a person has refused this verdict, a restarted run must not write
    # `pass` again.
    if [(s.verdict, s.source) for s in last] != [(standing.verdict, standing.source)]:
        ledger.note_standing(name, version, standing)


def _withdraw(run: Run[Recipe], policy: Policy, verdict: Verdict) -> None:
    """Take back what an earlier verdict of this run let pass: its judge was asked again, and found otherwise."""
    name = run.recipe.registered_name
    if not Ledger(run.root).was_registered(name, policy.digest):
        return
    for version in run.tracker.versions(policy):
        source = registry.source(run.root, name, version)
        _note_standing(run, version, Standing("fail", "", verdict.why_not, content_digest(asdict(verdict)), source))
        run.tracker.tag(name, version, {"gate": "fail", "gate.why_not": verdict.why_not})
        registry.withdraw(run.root, name, version)


@task(cache_policy=NO_CACHE, task_run_name="promote · {registered.name} {registered.version}")
def promote(
    run: Run[Recipe],
    registered: Registered,
    verdict: Verdict | None,
    rivals: Rivals | None,
    approval: Approval | None = None,
) -> Registered | None:
    """The version becomes the champion if the gate let it pass, and a person agreed where the recipe asks for one.

    None if another process moved the champion since the gate compared with it: the verdict is about a champion of the
    past. The rivals are then forgotten, so that the run asks for them anew and decides again.

    Raises:
        Stale: the log is as long as it was, but its numbers are not those that we saw; a second try would fail as well.
    """
    if not registered.version:
        return registered
    root, model, version = run.root, registered.name, registered.version
    champions = [entry.version_to for entry in registry.log(root, model)]
    allowed = may_be_promoted(run, verdict) and (approval is None or approval.agreed)
    # A version that served once is not promoted again: a restarted run must not push a later champion aside.
    if rivals is not None and allowed and version not in champions:
        try:
            why = f"passed the gate in run {run.digest[:12]}" + (f", {approval}" if approval else "")
            registry.promote(root, model, version, why, rivals.seen)
        except Stale:
            if len(registry.log(root, model)) == rivals.seen:
                raise
            sealed.remove(run.folder / RIVALS)
            terminal.say(f"another version of {model} serves since this one was tested; it is tested beside that one")
            return None
    registry.move_aliases(root, model)
    line = line_of_champions(registry.log(root, model))
    if version in line:
        return registered._replace(alias=registry.CHAMPION if version == line[-1] else "former champion")
    return registered._replace(alias=registry.CHALLENGER if verdict else "")


def may_be_promoted(run: Run[Recipe], verdict: Verdict | None) -> bool:
    """Return whether the gate lets a version serve, as far as it depends on the gate; `dry-run` and `off` never do."""
    return verdict is not None and verdict.passes and run.recipe.gate.mode is GateMode.enforce


def _served(run: Run[Recipe]) -> Served:
    """Return what served when this run first asked; a file that cannot be read any more is written anew."""
    served = sealed.read(run.folder / RIVALS, Served)
    if served is None:
        model = run.recipe.registered_name
        log = registry.log(run.root, model)
        line = line_of_champions(log)
        anchor = run.recipe.gate.anchor or (f"models:/{model}/{line[0]}" if line else "")
        served = Served(seen=len(log), champion=f"models:/{model}/{line[-1]}" if line else "", anchor=anchor)
        run.folder.mkdir(parents=True, exist_ok=True)
        sealed.write(run.folder / RIVALS, served)
    return served


def _forget_former_champion(run: Run[Recipe], challenger: Policy) -> None:
    """Forget the rivals if another process moved the champion since a run that was killed asked for them.

    They stay if it was this run that moved it: its verdict rests on the champion before.
    """
    served = sealed.read(run.folder / RIVALS, Served)
    if served:
        model = run.recipe.registered_name
        log = registry.log(run.root, model)
        later = {entry.version_to for entry in log[served["seen"] :]}
        moved = later and challenger.digest not in (registry.policy(run.root, model, version) for version in later)
        if moved or len(log) < served["seen"]:  # fewer lines than before: a backup of the log was put back
            (run.folder / RIVALS).unlink()


def _prompts(tested: Candidate, settings: Gate) -> dict[str, set[str]]:
    """Return kind → digests of the test prompts that the gate looks at; kinds without a prompt are left out."""
    # A margin of 0.5 or a limit of 1 would let everything pass: the gate then does not look, and nothing is charged.
    kinds = ["harmless", MUST_PASS]
    kinds += ["helpful"] if settings.margin < 0.5 else []
    kinds += ["over_refusal"] if settings.over_refusal < 1 else []
    rows = list(tested.answer_rows())
    digests = {kind: {prompt_digest(row["prompt"]) for row in rows if row["suite"] == kind} for kind in kinds}
    if settings.kl:
        digests["KL"] = {prompt_digest(row["prompt"]) for row in facts.sampled(tested)}
    return {kind: prompts for kind, prompts in digests.items() if prompts}


def _show(verdict: Verdict) -> Verdict:
    """Put the gate's checks on the Prefect page, and one sentence on the screen."""
    rows = [dict(zip(CHECK_COLUMNS, check_row(check_entry(check)), strict=True)) for check in verdict.checks]
    with best_effort("show the table of the gate in Prefect"):
        create_table_artifact(rows, key="gate", description=f"Gate: {plain(verdict.candidate)} on the test prompts")
    if not verdict.passes:
        terminal.say(f"gate: {verdict.candidate} does not pass: {verdict.why_not}")
    return verdict
