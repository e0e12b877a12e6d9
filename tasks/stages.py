"""One thin task per stage, in pipeline order. Each names a plain function of models/ and what it is given.

Results are found by manifest (tasks/store.py); Prefect's own result cache is not consulted.
"""

import base64
import time
from collections import Counter
from contextlib import suppress
from contextvars import copy_context
from dataclasses import replace
from threading import Thread
from typing import Any, NamedTuple

from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from models import figures, gate, report
from models import sources as origins
from models.artifacts import (
    Answers,
    Calibration,
    Distances,
    Margins,
    Memory,
    Policy,
    Preferences,
    Reference,
    Sources,
    Verdicts,
)
from models.errors import Undecided
from models.figures import Evidence
from models.gate import Choice, Verdict
from models.policy import base_digest, called
from models.preferences import HELDOUT, TRAIN
from models.recipe import Method, Recipe, Step, kl_weight
from models.recipe_evaluation import Judges
from tasks import events, screen
from tasks.run import Run, close, found
from tasks.store import Stage

AS_THEY_ARE = Choice("", "nothing was trained, the policies were judged as they are")
SETTLED = {"data": "-", "label": "", "pairs": 0}
"""What the digest of the rows already says: the same rows from another file are the same training."""


class Yardstick(NamedTuple):
    """What every candidate is measured with."""

    base: Policy
    sources: Sources
    pairs: list[Preferences]
    heldout: dict[str, Reference]
    split: str = "validation"
    """The prompts on which all candidates are examined."""


class Registered(NamedTuple):
    """A model version, or three empty strings."""

    name: str
    version: str
    alias: str


NOT_REGISTERED = Registered("", "", "")


@task(cache_policy=NO_CACHE, task_run_name="data · {run.recipe.base}")
def gather(run: Run) -> Sources:
    """The files that everything starts from."""
    given = {"files": origins.named(run.recipe), "sha256": origins.digests(run.recipe), "seed": run.recipe.seed}
    given |= {} if isinstance(run.recipe, Recipe) else {"halves": False}
    return run.make(Sources, "sources.gather", "data", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="pairs · {step.metric}")
def prepare(run: Run, sources: Sources, step: Step) -> Preferences:
    """Validated, split pairs of one step."""
    role = f"steps.{run.training.steps.index(step)}"
    given = {"sources": sources, "role": role, "metric": step.metric, "method": step.method.value}
    given |= {"label": step.label, "limit": step.pairs, "config": run.training.data}
    return run.make(Preferences, "preferences.prepare", f"pairs · {step.metric}", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="base · {run.recipe.base}")
def base(run: Run) -> Policy:
    """The policy before any training."""
    return _loaded(run, run.recipe.base, f"base · {run.recipe.base}")


@task(cache_policy=NO_CACHE, task_run_name="policy · {place}")
def adopt(run: Run, place: str) -> Policy:
    """A policy that is judged as it is, under the name that its maker gave it."""
    return replace(_loaded(run, place, f"policy · {place}"), name=called(place))


@task(cache_policy=NO_CACHE, task_run_name="base · sft")
def finetune(run: Run, policy: Policy, sources: Sources) -> Policy:
    """The optional supervised step; without one, the policy as it is."""
    if not run.training.sft.data:
        return policy
    given = {"policy": policy, "sources": sources, "config": run.training.sft, "data": run.training.data}
    given |= {"seed": run.recipe.seed, "compute": run.recipe.compute}
    return run.make(Policy, "alignment.sft", "base · sft", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="reference · {preferences.metric} · {policy.name}")
def score(run: Run, policy: Policy, preferences: Preferences, step: Step) -> Reference:
    """The reference's log-probs on the training rows, once for every λ."""
    title = f"reference · {preferences.metric} under {policy.name}"
    given = {"policy": policy, "preferences": preferences, "data": run.training.data, "compute": run.recipe.compute}
    if step.method is Method.kto:
        order = step.model_copy(update={"lambda_": [], **SETTLED})  # the grid shares one order and one reference
        given |= {"step": order, "seed": run.recipe.seed}
        return run.make(Reference, "reference.score_unpaired", title, _Watch(), **given)
    return run.make(Reference, "reference.score", title, _Watch(), splits=list(TRAIN), **given)


@task(cache_policy=NO_CACHE, task_run_name="held-out · {preferences.metric}")
def hold_out(run: Run, policy: Policy, preferences: Preferences) -> Reference:
    """The base's log-probs on the held-out pairs, against which every candidate is weighed."""
    title = f"held-out · {preferences.metric} under {policy.name}"
    given = {"policy": policy, "preferences": preferences, "data": run.training.data, "compute": run.recipe.compute}
    return run.make(Reference, "reference.score", title, _Watch(), splits=list(HELDOUT), **given)


def yardstick(run: Run, base: Policy, sources: Sources, pairs: list[Preferences]) -> Yardstick:
    """Everything that candidates are measured with; the metrics are scored side by side."""
    scored = [hold_out.submit(run, base, comparisons) for comparisons in pairs]
    heldout = {comparisons.metric: told.result() for comparisons, told in zip(pairs, scored, strict=True)}
    return Yardstick(base, sources, pairs, heldout)


@task(cache_policy=NO_CACHE, task_run_name="{step.metric} · {step.method.value} · λ={lambda_}")
def align(run: Run, policy: Policy, reference: Reference, step: Step, lambda_: float) -> Policy:
    """One policy, trained from and against the policy of the step before with KL weight β/λ; λ = 0 skips the step."""
    if lambda_ == 0:
        return policy
    weight = kl_weight(run.training.beta, lambda_)
    title = f"{step.metric} · {step.method} · λ={lambda_:g} (β/λ={weight:g})"
    one = step.model_copy(update={"lambda_": [lambda_], **SETTLED})
    given = {"policy": policy, "reference": reference, "config": one, "lambda_": lambda_, "beta": run.training.beta}
    given |= {"seed": run.recipe.seed, "compute": run.recipe.compute}
    return run.make(Policy, f"alignment.{step.method}", title, _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="merge · q={q}")
def interpolate(run: Run, safe: Policy, reward: Policy, q: float) -> Policy:
    """P-SACPO: θ = q·θ_safe + (1−q)·θ_reward."""
    return run.make(Policy, "merge.interpolate", f"merge · q={q:g}", _Watch(), safe=safe, reward=reward, q=q)


@task(cache_policy=NO_CACHE, task_run_name="examine · {policy.name}")
def examine(run: Run, policy: Policy, reference: Policy, yardstick: Yardstick) -> Evidence:
    """What is known of one candidate: its answers to validation prompts, judged, and its margins on held-out pairs."""
    near = {"base": yardstick.base, "reference": reference}
    answers, verdicts = _judged(run, policy, near, yardstick, yardstick.split)
    given = {"policy": policy, "others": near, **_asked(run, yardstick, yardstick.split)}
    distances = run.make(Distances, "distance.measure", f"distance · {policy.name}", _Watch(), **given)
    given = {"policy": policy, "scored": yardstick.heldout, "compute": run.recipe.compute}
    margins = run.make(Margins, "margins.weigh", f"margins · {policy.name}", _Watch(), **given)
    return Evidence(policy, answers, verdicts, distances, margins)


def calibrate(run: Run, sources: Sources) -> Calibration | None:
    """What the judges say of answers that people have judged; none if the recipe names no such sample."""
    by = run.recipe.evaluation.judges
    if not any(judge.labels for _, judge in by):
        return None
    given: dict[str, Any] = {"sources": sources, "judges": by, "described": run.judges}
    given |= {"compute": run.recipe.compute, "memory": Memory(run.root / "verdicts.db")}
    return run.make(Calibration, "judging.calibrate", "judges on labelled answers", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="choose")
def choose(run: Run, candidates: list[Evidence]) -> Choice:
    """Exactly one candidate, on the validation split. The base is none."""
    told = [figures.candidate(c.policy.name, c.verdicts) for c in candidates[1:]]
    return gate.choose(told, run.recipe.constraint)


@task(cache_policy=NO_CACHE, task_run_name="certify · {choice.name}")
def certify(run: Run, choice: Choice, candidates: list[Evidence], yardstick: Yardstick) -> Verdict | None:
    """The chosen candidate on the test split, once; none if nobody judged, or none was chosen."""
    if not (choice.name and choice.decided):
        return None
    policy = _named(choice.name, candidates).policy
    _, verdicts = _judged(run, policy, {"base": yardstick.base}, yardstick, "test")
    verdict = gate.certify(figures.candidate(choice.name, verdicts), run.recipe.constraint)
    events.decided(run.training.registered_name, verdict)
    return verdict


@task(cache_policy=NO_CACHE, task_run_name="test in order")
def test_in_order(run: Run, candidates: list[Evidence]) -> list[Verdict]:
    """Fixed-sequence testing: each policy at the full level, in the declared order, up to the first that fails."""
    told = [figures.candidate(c.policy.name, c.verdicts) for c in candidates[1:] or candidates]
    return gate.in_order([c for c in told if c.judged or c.failed], run.recipe.constraint)


@task(cache_policy=NO_CACHE, task_run_name="register · {choice.name}")
def register(
    run: Run, choice: Choice, verdict: Verdict | None, candidates: list[Evidence], sources: Sources
) -> Registered:
    """A model version that carries its evidence: champion if the constraint holds, without alias if undecided."""
    if not choice.name or (verdict is not None and not verdict.holds):
        return NOT_REGISTERED
    policy = _named(choice.name, candidates).policy
    constraint = run.recipe.constraint
    tags = {
        "beta": f"{policy.beta:g}",
        "lambda": f"{policy.lambda_:g}",
        "beta_over_lambda": f"{policy.beta_over_lambda:g}",
        "merge_weight": f"{policy.merge_weight:g}" if policy.kind == "merge" else "none",
        "parents": " ".join(policy.parents),
        "data": sources.digest,
        "constraint": f"{constraint.measure} >= {constraint.at_least:g}",
        "lower_bound": f"{verdict.lower_bound:.4f}" if verdict else "none",
        "gate": "pass" if verdict else "undecided",
    }
    version = run.tracker.register(policy, tags, promote=verdict is not None)
    if verdict:
        events.champion(run.training.registered_name, version, policy)
    return Registered(run.training.registered_name, version, "champion" if verdict else "")


@task(cache_policy=NO_CACHE, task_run_name="report")
def publish(
    run: Run,
    candidates: list[Evidence],
    choice: Choice,
    verdicts: list[Verdict],
    registered: Registered,
    yardstick: Yardstick,
) -> dict[str, Any]:
    """The report and its tables; the table of candidates and the picture as Prefect artifacts; all of it in MLflow."""
    sources = yardstick.sources
    calibration = calibrate(run, sources)
    registry = registered._asdict() if registered.version else None
    suites = sources.suites(yardstick.split)
    tree = report.build(run.recipe, candidates, choice, verdicts, suites, calibration, registry, run.seconds)
    run.folder.mkdir(parents=True, exist_ok=True)
    report.write(tree, candidates, yardstick.pairs, run.folder)
    text, picture = report.markdown(tree), run.folder / "frontier.png"
    if picture.exists():
        address = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
        with suppress(Exception):  # the report lies on disk, whoever cannot be told of it
            create_image_artifact(address, key="frontier", description="Helpful against harmless")
        text = text.replace("(frontier.png)", f"({address})")
    with suppress(Exception):
        create_markdown_artifact(text, key="candidates", description="Candidates and decision")
    proven = verdicts or not isinstance(run.recipe, Recipe)  # who only asks for figures has them
    exit_code = 0 if proven and all(verdict.holds for verdict in verdicts) else Undecided.exit_code
    made = [sources, *([calibration] if calibration else []), *(noun for c in candidates for noun in c)]
    return close(run, made, exit_code)


def ends(before: list[Policy], frontier: list[Policy]) -> list[tuple[Policy, Policy]]:
    """Return what P-SACPO averages: for each policy before the last step, its child of the largest λ, and itself."""
    families = [(parent, [p for p in frontier if p.parents[:1] == (parent.digest,)]) for parent in before]
    return [(max(children, key=lambda p: p.lambda_), parent) for parent, children in families if children]


def distinct(candidates: list[Evidence]) -> list[Evidence]:
    """Return each policy once, the base first, under names that tell them apart.

    A step with λ = 0 hands its reference on, so one policy can come twice; policies of different parents can share a
    name, and then say which parent they come from.
    """
    once: dict[str, Evidence] = {}
    for told in candidates:
        once.setdefault(told.policy.digest, told)
    shared = [name for name, count in Counter(c.policy.name for c in once.values()).items() if count > 1]
    known = {digest: told.policy.name for digest, told in once.items()}
    named = []
    for told in once.values():
        policy = told.policy
        if policy.name in shared and policy.parents:
            origin = policy.parents[-1] if policy.kind == "merge" else policy.parents[0]
            policy = replace(policy, name=f"{policy.name} from {known.get(origin, origin[:12])}")
        named.append(told._replace(policy=policy))
    return named


def _loaded(run: Run, place: str, title: str) -> Policy:
    where = found(place)
    given = {"base": where, "sha256": base_digest(where), "template": run.recipe.template, "seed": run.recipe.seed}
    return run.make(Policy, "policy.base", title, _Watch(), **given)


def _judged(
    run: Run, policy: Policy, near: dict[str, Policy], yardstick: Yardstick, split: str
) -> tuple[Answers, Verdicts]:
    """Answer the prompts of one split, and let the judges compare the answers with those of the policies near it."""
    answers = _answer(run, policy, yardstick, split)
    others = {name: _answer(run, other, yardstick, split) for name, other in near.items()}
    by = run.recipe.evaluation.judges
    given: dict[str, Any] = {"answers": answers, "others": others, "judges": by, "described": run.judges}
    given |= {"compute": run.recipe.compute, "memory": Memory(run.root / "verdicts.db")}
    return answers, run.make(Verdicts, "judging.judge", f"judge · {policy.name} · {split}", _Watch(), **given)


def _answer(run: Run, policy: Policy, yardstick: Yardstick, split: str) -> Answers:
    """Answer the prompts of one split; a policy that others are compared with answers once."""
    title = f"answers · {policy.name} · {split}"
    return run.make(Answers, "answering.answer", title, _Watch(), policy=policy, **_asked(run, yardstick, split))


def _asked(run: Run, yardstick: Yardstick, split: str) -> dict[str, Any]:
    """Return what is asked, and how answers are drawn; the judges have no part in it."""
    given: dict[str, Any] = {"sources": yardstick.sources, "pairs": yardstick.pairs, "split": split}
    given |= {"config": run.recipe.evaluation.model_copy(update={"judges": Judges()}), "seed": run.recipe.seed}
    return given | {"compute": run.recipe.compute, "memory": Memory(run.root / "answers.db")}


def _named(name: str, candidates: list[Evidence]) -> Evidence:
    return next(c for c in candidates if c.policy.name == name)


class _Watch:
    """Shows a running stage in the terminal, and about every five seconds as a Prefect progress artifact."""

    def __init__(self) -> None:
        self.artifact: Any = None
        self.told = time.monotonic()
        self.teller: Thread | None = None

    def __call__(self, work: Stage, line: dict[str, Any]) -> None:
        screen.moved(work.title, line)
        if time.monotonic() - self.told < 5 or (self.teller and self.teller.is_alive()):
            return
        self.told, share = time.monotonic(), 100.0 * line["done"] / line["of"]
        # beside us, since a dead server is asked for a minute; in our context, for the artifact is this task run's
        self.teller = Thread(target=copy_context().run, args=(self._tell, work, share), daemon=True)
        self.teller.start()

    def _tell(self, work: Stage, share: float) -> None:
        with suppress(Exception):  # a page that cannot be told must not stop a training
            if self.artifact is None:
                self.artifact = create_progress_artifact(share, description=work.title)
            else:
                update_progress_artifact(self.artifact, share)
