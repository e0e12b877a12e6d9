"""Tasks of lm-evaluation-harness on one policy: what it can do besides what it was aligned for.

The harness gets our loaded model and tokenizer, in float32. It renders prompts without a chat template, as published
figures of its tasks do; a task file of one's own can write the template.
"""

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

from models.artifacts import Benchmarks, Policy, content_digest, file_digest
from models.errors import BadData, BadRecipe
from models.files import jsonl
from models.files.foreign import refuse_if_it_fails
from models.policy.weights import load
from models.recipe import Compute
from models.recipe.record import Record
from models.stage import stage

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

RESAMPLES = 1000
"""For standard errors of figures that are no means; those of means need none."""

Outcome = TypedDict(
    "Outcome",
    {
        "results": dict[str, dict[str, float | str]],
        "group_subtasks": dict[str, list[str]],
        "n-samples": dict[str, dict[str, int]],
        "versions": dict[str, float | str],
        "higher_is_better": dict[str, dict[str, bool | None]],
    },
)
"""What we read of the value of `simple_evaluate`. Each table is by task or group; a key of `results` is
`METRIC,FILTER` or `METRIC_stderr,FILTER`, beside some words about the task without a comma."""


class TaskRow(NamedTuple):
    """One figure of one task: a row of `tasks.jsonl`."""

    task: str
    version: str
    metric: str
    """With the harness's filter in brackets, if there is one: `exact_match (strict-match)`."""
    better: Literal["high", "low", ""]
    """Which values are better; empty where the task does not say."""
    n: int
    """Items that were measured."""
    value: float | None
    stderr: float | None
    """None where the harness gives no number, as for `value`."""


def problem(tasks: list[str]) -> str:
    """Return why these tasks cannot be run, and what to do, in one sentence; empty if they can.

    Looking names up takes seconds, since the harness reads its 14,000 files for it; files of one's own need no look.
    """
    if not tasks:
        return ""
    if find_spec("lm_eval") is None:
        return "lm-evaluation-harness is not installed; install it with pip install 'lm-eval>=0.4.13'"
    try:
        files(tasks)
    except BadData as error:
        return str(error).removeprefix("evaluation.tasks: ")
    names = [task for task in tasks if not is_file(task)]
    index = _manager(tasks).task_index if names else {}
    unknown = [name for name in names if name not in index]
    return f"{unknown[0]!r}: no task of lm-evaluation-harness; `lm-eval ls tasks` lists them" if unknown else ""


def is_file(task: str) -> bool:
    """Return whether a task is a file of one's own, and not a name that the harness knows."""
    return task.endswith((".yaml", ".yml"))


def files(tasks: list[str]) -> dict[str, str]:
    """Return `tasks.K` → digest of the K-th task, where it is a file, and of all that it names: data, code, includes.

    Raises:
        BadData: a file cannot be read, or is no YAML.
    """
    return {f"tasks.{k}": _content(Path(task)) for k, task in enumerate(tasks) if is_file(task)}


class TaskSet(Record):
    """What a policy is measured on, and by what."""

    names: list[str]
    """Tasks that the harness knows, or files of one's own."""
    sha256: dict[str, str]
    """What `files` returned when the run was planned."""
    limit: int
    """Items per task; 0 means all."""
    version: str
    """Of the harness."""


@stage("harness.measure", version=1)
def measure(out: Path, policy: Policy, tasks: TaskSet, batch: int, seed: int, compute: Compute) -> Benchmarks:
    """Run the tasks on a policy.

    Writes `tasks.jsonl`, one `TaskRow` a row. A group stands for its tasks where it has figures of its own.

    Raises:
        BadData: a task file changed since the run was planned.
        BadRecipe: the harness cannot run a task; says why.
    """
    if files(tasks.names) != tasks.sha256:
        raise BadData("evaluation.tasks: a file changed while the run was starting; start again")
    model, tokenizer = load(policy, compute)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    # the harness runs code of task files, and fetches data
    with refuse_if_it_fails(BadRecipe, "evaluation.tasks: the harness cannot run them"):
        outcome: Outcome = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, trust_remote_code=False),
            tasks=tasks.names,
            task_manager=_manager(tasks.names),
            limit=tasks.limit or None,
            log_samples=False,
            bootstrap_iters=RESAMPLES,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    jsonl.write(out / "tasks.jsonl", (row._asdict() for row in _rows(outcome)))
    return Benchmarks(path=out, digest=file_digest(out / "tasks.jsonl"), policy=policy.digest, harness=tasks.version)


def _rows(outcome: Outcome) -> Iterator[TaskRow]:
    """Yield the figures of what `simple_evaluate` returned."""
    groups = outcome["group_subtasks"]
    results = {name: {k: v for k, v in row.items() if "," in k} for name, row in outcome["results"].items()}
    inner = {name for group, names in groups.items() if results.get(group) for name in names}

    def items(name: str) -> int:
        """Return how many items a task has, or all tasks of a group, which may hold groups."""
        names = groups.get(name)
        return sum(map(items, names)) if names else outcome["n-samples"][name]["effective"]

    for name, figures in results.items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if name in inner or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            better = outcome["higher_is_better"].get(name, {}).get(metric)
            yield TaskRow(
                task=name,
                version=str(outcome["versions"].get(name, "")),
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                better="" if better is None else "high" if better else "low",
                n=int(items(name)),
                value=_number(value),
                stderr=_number(figures.get(f"{metric}_stderr,{filtered}")),
            )


def _number(value: object) -> float | None:
    """Return a finite number; the harness writes "N/A" where it has no standard error."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _manager(tasks: list[str]) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(map(is_file, tasks)))


def _content(task: Path, outer: tuple[Path, ...] = ()) -> str:
    """Return one digest of a task file and of every file that it names.

    Args:
        outer: the task files that led here.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(task.read_text("utf-8"))
        # `!function utils.score` is read as utils.py, the file that holds the function. The rule is set on this loader
        # alone: add_multi_constructor would set it for every reader of YAML in the process.
        loader.yaml_multi_constructors = {
            **loader.yaml_multi_constructors,
            "!": lambda _, __, node: f"{node.value.partition('.')[0]}.py",
        }
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BadData(
            f"evaluation.tasks: {str(task)!r}: {reason}; give a task file of lm-evaluation-harness"
        ) from error
    inside = (*outer, task.resolve())
    # Only the harness knows which texts are paths, so each text that names a file counts. Path.is_file raises for a
    # text that is too long for a path; os.path.isfile returns False.
    paths = {text: [p for p in (Path(text), task.parent / text) if os.path.isfile(p)] for text in _texts(tree)}
    if any(path.resolve() in inside for text in paths if is_file(text) for path in paths[text]):
        raise BadData(f"evaluation.tasks: {str(task)!r}: includes itself, or a file that includes it; take that out")
    digests = {text: [_content(p, inside) if is_file(text) else file_digest(p) for p in paths[text]] for text in paths}
    return content_digest([file_digest(task), digests])


def _texts(tree: object) -> Iterator[str]:
    """Yield every text in a tree of YAML, but for the keys."""
    if isinstance(tree, str):
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _texts(inner)
