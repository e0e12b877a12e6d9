"""The stages of a run as tasks, in pipeline order. Each calls plain functions of models/ through the run.

Results are found by manifest (tasks/work/store.py); Prefect's own result cache is not consulted.
"""

from dataclasses import replace
from importlib.metadata import version
from typing import Any, NamedTuple

from prefect.cache_policies import NO_CACHE
from prefect.tasks import TaskRunNameCallbackWithParameters

from models.alignment import kto, merge, methods, reference, sft
from models.alignment.batching import moves_nothing, updates
from models.artifacts import (
    Answers,
    Benchmarks,
    Calibration,
    Distances,
    Memory,
    Policy,
    Preferences,
    Prompts,
    Reference,
    Scores,
    Sources,
)
from models.data import preferences, prompts
from models.data import sources as origins
from models.data.preferences import HELDOUT, TRAIN, refuse_one_kind
from models.errors import BadData
from models.files.kept import RunsFolderEntry
from models.gate.gate import Choice
from models.judges import judge
from models.metrics import benchmarks, kl, margins
from models.metrics import candidate as naming
from models.metrics.benchmarks import TaskSet
from models.metrics.candidate import Candidate
from models.policy import answers, weights
from models.policy.weights import base_digest, display_name
from models.recipe import Recipe, Step, kl_weight
from tasks.run import AnyRun, Run, resolve_policy
from tasks.work import terminal
from tasks.work.prefect_pages import task


class Yardstick(NamedTuple):
    """What every candidate is measured with."""

    base: Policy
    sources: Sources
    pairs: list[Preferences]
    heldout: dict[str, Reference]
    prompts: Prompts
    """What all candidates are asked."""


@task(cache_policy=NO_CACHE, task_run_name="data · {run.recipe.base}")
def gather(run: AnyRun) -> Sources:
    """The files that everything starts from."""
    files, seed = origins.places_of(run.recipe), run.recipe.seed
    sha256 = origins.digests(run.recipe) | benchmarks.files(run.recipe.evaluation.tasks)
    halves = isinstance(run.recipe, Recipe)  # one half chooses, the other tests; an evaluation chooses nothing
    for sentence in origins.oddities(files, halves):
        terminal.say(sentence, "dim")
    return run.make(origins.gather, "data", files=files, sha256=sha256, seed=seed, halves=halves)


@task(cache_policy=NO_CACHE, task_run_name="pairs · {step.metric}")
def prepare(run: Run[Recipe], sources: Sources, step: Step) -> Preferences:
    """Validated, split pairs of one step."""
    pairs = run.make(
        preferences.prepare,
        f"pairs · {step.metric}",
        sources=sources,
        role=f"steps.{run.recipe.steps.index(step)}",
        selection=step.selection,
        config=run.recipe.data_of(step),
    )
    if not step.method.paired:
        refuse_one_kind(pairs)
    # The number of rows alone tells this, so it is said before anything is trained.
    if any(step.lambda_) and (why := moves_nothing(updates(pairs.counts["train"], step), step)):
        raise BadData(f"{step.metric} step: {why}")
    return pairs


@task(cache_policy=NO_CACHE, task_run_name="base · {run.recipe.base}")
def base(run: AnyRun) -> Policy:
    """The policy before any training."""
    return load_policy(run, run.recipe.base, f"base · {display_name(run.recipe.base)}")


@task(cache_policy=NO_CACHE, task_run_name="policy · {place}")
def adopt(run: AnyRun, place: str) -> Policy:
    """A policy that is judged as it is, under the name that its maker gave it."""
    return replace(load_policy(run, place, f"policy · {place}"), name=display_name(place))


@task(cache_policy=NO_CACHE, task_run_name="base · sft")
def finetune(run: Run[Recipe], policy: Policy, sources: Sources) -> Policy:
    """The optional supervised step; without one, the policy as it is."""
    if not run.recipe.sft.data:
        return policy  # most bases are fine-tuned already
    return run.make(
        sft.train,
        "base · sft",
        policy=policy,
        sources=sources,
        training=run.recipe.sft.training,
        data=run.recipe.data,
        seed=run.recipe.seed,
        compute=run.recipe.compute,
    )


@task(cache_policy=NO_CACHE, task_run_name="reference · {pairs.metric} · {policy.name}")
def score(run: Run[Recipe], policy: Policy, pairs: Preferences, step: Step) -> Reference:
    """The reference's log-probs on the training rows, computed once and shared by all λ."""
    title = f"reference · {pairs.metric} under {policy.name}"
    # KTO's rows are put into their final order here, since each carries the answer of another row of its batch
    if not step.method.paired:
        return run.make(
            kto.score,
            title,
            policy=policy,
            preferences=pairs.of(*TRAIN),
            training=step.training,
            seed=run.recipe.seed,
            max_tokens=run.recipe.data.max_tokens,
            compute=run.recipe.compute,
        )
    return _scored(run, title, policy, pairs, list(TRAIN))


@task(cache_policy=NO_CACHE, task_run_name="held-out · {pairs.metric}")
def hold_out(run: Run[Recipe], policy: Policy, pairs: Preferences) -> Reference:
    """The base's log-probs on the held-out pairs, against which every candidate is weighed."""
    return _scored(run, f"held-out · {pairs.metric} under {policy.name}", policy, pairs, list(HELDOUT))


def _scored(run: Run[Recipe], title: str, policy: Policy, pairs: Preferences, splits: list[str]) -> Reference:
    return run.make(
        reference.score,
        title,
        policy=policy,
        preferences=pairs.of(*splits),
        splits=splits,
        max_tokens=run.recipe.data.max_tokens,
        compute=run.recipe.compute,
    )


def yardstick(run: Run[Recipe], base: Policy, sources: Sources, pairs: list[Preferences]) -> Yardstick:
    """Everything that candidates are measured with; the metrics are scored side by side."""
    futures = [hold_out.submit(run, base, comparisons) for comparisons in pairs]
    validation_prompts = gather_prompts(run, sources, pairs, "validation")
    if run.recipe.evaluation.tasks:  # tasks that cannot be run fail here, before any training
        measure(run, base, sources)
    heldout = {comparisons.metric: future.result() for comparisons, future in zip(pairs, futures, strict=True)}
    return Yardstick(base, sources, pairs, heldout, validation_prompts)


class AlignmentName(TaskRunNameCallbackWithParameters):
    """Names the task run of an alignment as its stage. Prefect's type asks for a class, not for a function."""

    def __call__(self, parameters: dict[str, Any]) -> str:
        """Return the name; `parameters` are those of `align`."""
        return _alignment_title(parameters["run"].recipe.beta, parameters["step"], parameters["lambda_"])


def _alignment_title(beta: float, step: Step, lambda_: float) -> str:
    """Name an alignment as the method does: `harmless · dpo · λ=0.4 (β/λ=0.25)`."""
    weight = f"β/λ={kl_weight(beta, lambda_):g}" if lambda_ else "skipped"
    return f"{step.metric} · {step.method} · λ={lambda_:g} ({weight})"


@task(cache_policy=NO_CACHE, task_run_name=AlignmentName())
def align(run: Run[Recipe], policy: Policy, log_probs: Reference, step: Step, lambda_: float) -> Policy:
    """One policy, trained from and against the policy of the step before with KL weight β/λ; λ = 0 skips the step."""
    if lambda_ == 0:
        return policy
    title = _alignment_title(run.recipe.beta, step, lambda_)
    return run.make(
        methods.TRAIN[step.method],
        title,
        policy=policy,
        reference=log_probs,
        objective=step.objective(run.recipe.beta, lambda_),
        training=step.training,
        seed=run.recipe.seed,
        compute=run.recipe.compute,
    )


@task(cache_policy=NO_CACHE, task_run_name="merge · q={q}")
def interpolate(run: AnyRun, safe: Policy, reward: Policy, q: float) -> Policy:
    """P-SACPO: θ = q·θ_safe + (1−q)·θ_reward."""
    return run.make(merge.interpolate, f"merge · q={q:g}", safe=safe, reward=reward, q=q)


@task(cache_policy=NO_CACHE, task_run_name="examine · {policy.name}")
def examine(run: AnyRun, policy: Policy, reference: Policy, yardstick: Yardstick) -> Candidate:
    """One candidate: its answers to validation prompts, judged; its KL to base and reference; its held-out margins."""
    baselines = {"base": yardstick.base}
    # where nothing was trained, the first policy is the base and the reference at once
    baselines |= {"reference": reference} if isinstance(run.recipe, Recipe) else {}
    written, verdicts = answer_and_judge(run, policy, baselines, yardstick.prompts)
    distances = kl_distances(run, policy, baselines, yardstick.prompts)
    weighed = run.make(
        margins.weigh,
        f"margins · {policy.name}",
        policy=policy,
        scored=yardstick.heldout,
        compute=run.recipe.compute,
    )
    return Candidate(policy, written, verdicts, distances, weighed)


@task(cache_policy=NO_CACHE, task_run_name="tasks · {policy.name}")
def measure(run: AnyRun, policy: Policy, sources: Sources) -> Benchmarks:
    """What one policy can do on the tasks that the recipe names, whose files must be those of when the run began."""
    evaluation = run.recipe.evaluation
    sha256 = {name: digest for name, digest in sources.sha256.items() if name.startswith("tasks.")}
    return run.make(
        benchmarks.measure,
        f"tasks · {policy.name}",
        policy=policy,
        tasks=TaskSet(names=evaluation.tasks, sha256=sha256, limit=evaluation.task_limit, version=version("lm-eval")),
        batch=evaluation.batch,
        seed=run.recipe.seed,
        compute=run.recipe.compute,
    )


def measure_tasks(run: AnyRun, candidates: list[Candidate], choice: Choice, sources: Sources) -> dict[str, Benchmarks]:
    """What the base and the chosen candidate can do on tasks, or all if nothing was trained; by digest."""
    if not run.recipe.evaluation.tasks:
        return {}
    base, *others = [candidate.policy for candidate in candidates]
    after = [policy for policy in others if policy.name == choice.name or not isinstance(run.recipe, Recipe)]
    futures = {policy.digest: measure.submit(run, policy, sources) for policy in [base, *after]}
    return {digest: future.result() for digest, future in futures.items()}


def calibrate(run: AnyRun, sources: Sources) -> Calibration | None:
    """What the judges say of answers that people have judged; none if the recipe names no such sample."""
    judges = run.recipe.evaluation.judges
    if not any(judge.labels for _, judge in judges):
        return None
    return run.make(
        judge.calibrate,
        "judges on labelled answers",
        sources=sources,
        judges=judges,
        described=run.judges,
        compute=run.recipe.compute,
        memory=Memory(run.root / RunsFolderEntry.verdicts),
    )


def unique_candidates(candidates: list[Candidate]) -> list[Candidate]:
    """Return each policy once, the base first, and say which came twice."""
    unique, sentences = naming.unique_candidates(candidates)
    for sentence in sentences:
        terminal.say(sentence)
    return unique


def uniquely_named(places: list[str], policies: list[Policy]) -> list[Policy]:
    """Return each policy once, in the order of their places, and say which came twice."""
    unique, sentences = naming.uniquely_named(places, policies)
    for sentence in sentences:
        terminal.say(sentence)
    return unique


def load_policy(run: AnyRun, place: str, title: str) -> Policy:
    """Return the policy in a folder, file, hub or registry, as it is."""
    path = resolve_policy(place)
    template, seed = run.recipe.template, run.recipe.seed
    return run.make(weights.base, title, base=path, sha256=base_digest(path), template=template, seed=seed)


def gather_prompts(run: AnyRun, sources: Sources, pairs: list[Preferences], split: str) -> Prompts:
    """Return the prompts of one split: those of its suites, or of the held-out comparisons if it has no suites."""
    return run.make(
        prompts.ask,
        f"prompts · {split}",
        sources=sources,
        pairs=[] if sources.suites(split) else pairs,
        split=split,
        samples=run.recipe.evaluation.samples,
        kl_prompts=run.recipe.evaluation.kl_prompts,
    )


def answer_and_judge(
    run: AnyRun, policy: Policy, baselines: dict[str, Policy], split_prompts: Prompts
) -> tuple[Answers, Scores]:
    """Answer the prompts of one split, and let the judges compare the answers with those of the baselines."""
    written = _answer(run, policy, split_prompts)
    others = {name: _answer(run, other, split_prompts) for name, other in baselines.items()}
    scores = run.make(
        judge.judge,
        f"judge · {policy.name} · {split_prompts.split}",
        answers=written,
        others=others,
        judges=run.recipe.evaluation.judges,
        described=run.judges,
        compute=run.recipe.compute,
        memory=Memory(run.root / RunsFolderEntry.verdicts),
    )
    return written, scores


def kl_distances(run: AnyRun, policy: Policy, baselines: dict[str, Policy], split_prompts: Prompts) -> Distances:
    """Measure the KL to the baselines, on the prompts of one split that are for it."""
    return run.make(
        kl.measure,
        f"distance · {policy.name} · {split_prompts.split}",
        policy=policy,
        others=baselines,
        prompts=split_prompts.of(prompts.KL),
        decoding=run.recipe.evaluation.decoding(run.recipe.seed).sampled(),
        compute=run.recipe.compute,
        memory=Memory(run.root / RunsFolderEntry.answers),
    )


def _answer(run: AnyRun, policy: Policy, split_prompts: Prompts) -> Answers:
    """Answer the prompts of one split; a policy that others are compared with answers once."""
    return run.make(
        answers.answer,
        f"answers · {policy.name} · {split_prompts.split}",
        policy=policy,
        prompts=split_prompts.of(prompts.ALL),
        decoding=run.recipe.evaluation.decoding(run.recipe.seed),
        compute=run.recipe.compute,
        memory=Memory(run.root / RunsFolderEntry.answers),
    )


def candidate_named(name: str, candidates: list[Candidate]) -> Candidate:
    """Return the candidate with this name."""
    return next(c for c in candidates if c.policy.name == name)
