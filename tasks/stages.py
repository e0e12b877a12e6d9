"""One thin task per stage, in pipeline order. Each names a plain function of models/ and what it is given.

Results are found by manifest (tasks/store.py); Prefect's own result cache is not consulted.
"""

import base64
import time
from typing import Any, NamedTuple

from prefect import task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE

from models import gate, report
from models import sources as origins
from models.artifacts import Evaluation, Policy, Preferences, Reference, Sources
from models.errors import Undecided
from models.gate import Choice, Verdict
from models.recipe import Step, kl_weight
from tasks import screen
from tasks.run import Run, close
from tasks.store import Stage


class Registered(NamedTuple):
    """A model version, or three empty strings."""

    name: str
    version: str
    alias: str


@task(cache_policy=NO_CACHE, task_run_name="data · {run.recipe.base}")
def gather(run: Run) -> Sources:
    """The files that everything starts from."""
    given = {"files": origins.named(run.recipe), "sha256": origins.digests(run.recipe), "seed": run.recipe.seed}
    return run.make(Sources, "sources.gather", "data", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="pairs · {step.metric.value}")
def prepare(run: Run, sources: Sources, step: Step) -> Preferences:
    """Validated, split pairs of one metric."""
    given = {"sources": sources, "metric": step.metric.value, "config": run.recipe.data}
    return run.make(Preferences, "preferences.prepare", f"pairs · {step.metric}", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="base · {run.recipe.base}")
def base(run: Run) -> Policy:
    """The policy before any training."""
    given = {"base": run.recipe.base, "seed": run.recipe.seed}
    return run.make(Policy, "policy.base", f"base · {run.recipe.base}", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="base · sft")
def finetune(run: Run, policy: Policy, sources: Sources) -> Policy:
    """The optional supervised step; without one, the policy as it is."""
    if not run.recipe.sft.data:
        return policy
    given = {"policy": policy, "sources": sources, "config": run.recipe.sft}
    given |= {"seed": run.recipe.seed, "compute": run.recipe.compute}
    return run.make(Policy, "alignment.sft", "base · sft", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="reference · {preferences.metric} · {policy.name}")
def score(run: Run, policy: Policy, preferences: Preferences) -> Reference:
    """The reference's log-probs, once for every λ."""
    title = f"reference · {preferences.metric} pairs under {policy.name}"
    given = {"policy": policy, "preferences": preferences, "data": run.recipe.data, "compute": run.recipe.compute}
    return run.make(Reference, "reference.score", title, _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="{step.metric.value} · {step.method.value} · λ={lambda_}")
def align(run: Run, policy: Policy, reference: Reference, step: Step, lambda_: float) -> Policy:
    """One policy, trained from and against the policy of the step before with KL weight β/λ; λ = 0 skips the step."""
    if lambda_ == 0:
        return policy
    weight = kl_weight(run.recipe.beta, lambda_)
    title = f"{step.metric} · {step.method} · λ={lambda_:g} (β/λ={weight:g})"
    one = step.model_copy(update={"lambda_": [lambda_]})
    given = {"policy": policy, "reference": reference, "config": one, "lambda_": lambda_, "beta": run.recipe.beta}
    given |= {"seed": run.recipe.seed, "compute": run.recipe.compute}
    return run.make(Policy, f"alignment.{step.method}", title, _Watch(), **given)


def ends(before: list[Policy], frontier: list[Policy]) -> list[tuple[Policy, Policy]]:
    """Return what P-SACPO averages: for each policy before the last step, its child of the largest λ, and itself."""
    families = [(parent, [p for p in frontier if p.parents[:1] == (parent.digest,)]) for parent in before]
    return [(max(children, key=lambda p: p.lambda_), parent) for parent, children in families if children]


@task(cache_policy=NO_CACHE, task_run_name="merge · q={q}")
def interpolate(run: Run, safe: Policy, reward: Policy, q: float) -> Policy:
    """P-SACPO: θ = q·θ_safe + (1−q)·θ_reward."""
    return run.make(Policy, "merge.interpolate", f"merge · q={q:g}", _Watch(), safe=safe, reward=reward, q=q)


@task(cache_policy=NO_CACHE, task_run_name="evaluate · {policy.name} · {split}")
def evaluate(run: Run, policy: Policy, others: dict[str, Policy], sources: Sources, split: str) -> Evaluation:
    """Answers to the suites of one split, judged; distance to the base and to the policy's own reference."""
    given = {"policy": policy, "others": others, "sources": sources, "split": split, "config": run.recipe.evaluation}
    given |= {"seed": run.recipe.seed, "compute": run.recipe.compute}
    return run.make(Evaluation, "evaluation.evaluate", f"evaluate · {policy.name} · {split}", _Watch(), **given)


@task(cache_policy=NO_CACHE, task_run_name="choose")
def choose(run: Run, policies: list[Policy], evaluations: list[Evaluation]) -> Choice:
    """Exactly one candidate, on the validation split. The first policy is the base, which is none."""
    told = [report.candidate(p, e, evaluations[0]) for p, e in zip(policies, evaluations, strict=True)]
    return gate.choose(told[1:], run.recipe.constraint)


@task(cache_policy=NO_CACHE, task_run_name="certify · {choice.name}")
def certify(run: Run, choice: Choice, policies: list[Policy], sources: Sources) -> Verdict | None:
    """The chosen candidate on the test split, once; none if none was chosen."""
    if not choice.name:
        return None
    chosen = _named(choice.name, policies)
    tested, against = (evaluate.fn(run, policy, {}, sources, "test") for policy in (chosen, policies[0]))
    return gate.certify(report.candidate(chosen, tested, against), run.recipe.constraint)


@task(cache_policy=NO_CACHE, task_run_name="register · {choice.name}")
def register(run: Run, choice: Choice, verdict: Verdict | None, policies: list[Policy], sources: Sources) -> Registered:
    """A model version that carries its evidence, as champion, if the constraint holds; else nothing."""
    if verdict is None or not verdict.holds:
        return Registered("", "", "")
    policy = _named(choice.name, policies)
    tags = {
        "beta": f"{policy.beta:g}",
        "lambda": f"{policy.lambda_:g}",
        "beta_over_lambda": f"{policy.beta_over_lambda:g}",
        "merge_weight": f"{policy.merge_weight:g}" if policy.kind == "merge" else "none",
        "parents": " ".join(policy.parents),
        "data": sources.digest,
        "constraint": f"{run.recipe.constraint.measure} >= {verdict.at_least:g}",
        "lower_bound": f"{verdict.lower_bound:.4f}",
        "gate": "pass",
    }
    version = run.tracker.register(policy, tags, promote=True)
    return Registered(run.recipe.registered_name, version, "champion")


@task(cache_policy=NO_CACHE, task_run_name="report")
def publish(
    run: Run,
    policies: list[Policy],
    evaluations: list[Evaluation],
    choice: Choice,
    verdict: Verdict | None,
    registered: Registered,
    sources: Sources,
) -> dict[str, Any]:
    """report.json, report.md, frontier.png; the table and the picture as Prefect artifacts; all of it in MLflow."""
    judged = list(zip(policies, evaluations, strict=True))
    suites = sources.suites("validation")
    registry = registered._asdict() if registered.version else None
    tree = report.build(run.recipe, judged, choice, verdict, suites, registry, run.seconds)
    run.folder.mkdir(parents=True, exist_ok=True)
    report.write(tree, run.folder)
    create_markdown_artifact(report.markdown(tree), key="candidates", description="Candidates and decision")
    picture = base64.b64encode((run.folder / "frontier.png").read_bytes()).decode()
    create_image_artifact(f"data:image/png;base64,{picture}", key="frontier", description="Helpful against harmless")
    exit_code = 0 if verdict is not None and verdict.holds else Undecided.exit_code
    return close(run, [sources, *policies, *evaluations], exit_code)


def _named(name: str, policies: list[Policy]) -> Policy:
    return next(policy for policy in policies if policy.name == name)


class _Watch:
    """Shows a running stage in the terminal, and about every five seconds as a Prefect progress artifact."""

    def __init__(self) -> None:
        self.artifact: Any = None
        self.told = time.monotonic()

    def __call__(self, work: Stage, line: dict[str, Any]) -> None:
        screen.moved(work.title, line)
        if time.monotonic() - self.told < 5:
            return
        self.told, share = time.monotonic(), 100.0 * line["done"] / line["of"]
        if self.artifact is None:
            self.artifact = create_progress_artifact(share, description=work.title)
        else:
            update_progress_artifact(self.artifact, share)
