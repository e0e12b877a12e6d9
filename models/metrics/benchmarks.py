"""Tasks of lm-evaluation-harness on one policy: what it can do besides what it was aligned for.

The harness gets our loaded model and tokenizer, in float32. It renders prompts without a chat template, as published
figures of its tasks do; a task file of one's own can write the template.
"""

import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from models.artifacts import Benchmarks, Policy, content_digest, file_digest
from models.errors import BadData, BadRecipe
from models.files import jsonl
from models.policy.weights import load
from models.recipe import Compute
from models.recipe.record import Record
from models.stage import stage

Row = dict[str, Any]
RESAMPLES = 1000
"""For standard errors of figures that are no means; those of means need none."""


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
    known = _manager(tasks).task_index if names else {}
    unknown = [name for name in names if name not in known]
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


class TaskRow(TypedDict):
    """One figure of one task: a row of `tasks.jsonl`."""

    task: str
    version: str
    metric: str
    better: Literal["high", "low", ""]
    """Which values are better; empty where the task does not say."""
    n: int
    """Items."""
    value: float | None
    stderr: float | None
    """Null where there is none."""


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

    Writes `tasks.jsonl`: task, its version, metric, better (`high`, `low`, or nothing where the task does not say), n
    (items), value, stderr (null where there is none). A group stands for its tasks where it has figures of its own.

    Raises:
        BadData: a task file changed since the run was planned.
        BadRecipe: the harness cannot run a task; says why.
    """
    if files(tasks.names) != tasks.sha256:
        raise BadData("evaluation.tasks: a file changed while the run was starting; start again")
    model, tokenizer = load(policy, compute)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:  # reads, fetches and scores what others wrote, and may fail anyhow
        told = simple_evaluate(
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
    except Exception as error:
        why = (str(error).strip().splitlines() or ["?"])[0]
        raise BadRecipe(f"evaluation.tasks: the harness cannot run them: {type(error).__name__}: {why}") from error
    jsonl.write(out / "tasks.jsonl", _rows(told))
    return Benchmarks(path=out, digest=file_digest(out / "tasks.jsonl"), policy=policy.digest, harness=tasks.version)


def _rows(told: Row) -> Iterator[Row]:
    """Yield the figures of what `simple_evaluate` returned."""
    groups: dict[str, list[str]] = told["group_subtasks"]
    figures = {name: {k: v for k, v in found.items() if "," in k} for name, found in told["results"].items()}
    inner = {name for group, names in groups.items() if figures.get(group) for name in names}

    def items(name: str) -> int:
        held = groups.get(name)
        return sum(map(items, held)) if held else int(told["n-samples"][name]["effective"])

    for name, found in figures.items():
        for key, value in found.items():
            metric, _, picked = key.partition(",")
            if name in inner or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            better = told["higher_is_better"].get(name, {}).get(metric)
            yield {
                "task": name,
                "version": str(told["versions"].get(name, "")),
                "metric": metric if picked == "none" else f"{metric} ({picked})",
                "better": "" if better is None else "high" if better else "low",
                "n": items(name),
                "value": _number(value),
                "stderr": _number(found.get(f"{metric}_stderr,{picked}")),
            }


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _manager(tasks: list[str]) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=not all(map(is_file, tasks)))


def _content(task: Path) -> str:
    """Return one digest of a task file and of every file that it names."""
    import yaml

    class Plain(yaml.SafeLoader):  # type: ignore[misc]
        """Reads `!function utils.score` as the file that holds the function."""

    Plain.add_multi_constructor("!", lambda _, __, node: f"{node.value.partition('.')[0]}.py")
    try:
        tree = yaml.load(task.read_text("utf-8"), Plain)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise BadData(f"evaluation.tasks: {str(task)!r}: {why}; give a task file of lm-evaluation-harness") from error
    places = {text: [p for p in (Path(text), task.parent / text) if os.path.isfile(p)] for text in _texts(tree)}
    named = {text: [_content(p) if is_file(text) else file_digest(p) for p in found] for text, found in places.items()}
    return content_digest([file_digest(task), named])


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    for inner in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _texts(inner)
