"""What can be known of an evaluation before anything is trained: engine, tasks, and all that judges need."""

import json
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from models import generate_vllm, harness, sources, town
from models.errors import BadData, BadRecipe
from models.hub import is_name
from models.judges import rubric_files
from models.places import TOWN
from models.recipe_evaluation import Engine, Evaluation, Judge, JudgeKind, Judges

NEEDED = ("$prompt", "$first", "$second", "$fence")
REPLY = '{"$fence": {"first": GRADE, "second": GRADE}}'
"""What a comparing rubric must ask for, since nothing else is read."""


def refuse(evaluation: Evaluation) -> None:
    """Refuse judges that cannot judge, suites that cannot be asked, and an engine or tasks that are not there.

    Raises:
        BadRecipe: one sentence for each that cannot be used.
        BadData: a suite cannot be read, or holds prompts that its judge does not know.
    """
    errors = missing(evaluation) + problems(evaluation.judges)
    if errors:
        raise BadRecipe("\n".join(errors))
    for role, place in evaluation.suites:
        path = Path(place).expanduser()
        if place in ("", TOWN) or is_name(place) or not path.exists():  # a missing file is told with all other data
            continue
        told = sources.prompts(role, path)
        judge = getattr(evaluation.judges, "harmless" if role == "must_pass" else role)
        if judge.kind is JudgeKind.oracle:
            _known(role, path, [row["prompt"] for row in told])


def missing(evaluation: Evaluation) -> list[str]:
    """Return one sentence for the engine, and one for the tasks, if they are not there."""
    found = {
        "engine": generate_vllm.problem() if evaluation.engine is Engine.vllm else "",
        "tasks": harness.problem(evaluation.tasks),
    }
    return [f"evaluation.{key}: {problem}" for key, problem in found.items() if problem]


def problems(judges: Judges) -> list[str]:
    """Return one sentence for each judge that cannot be used; a judge on a hub is looked at when it is loaded."""
    told = {f"evaluation.judges.{metric}": _problem(metric, judge) for metric, judge in judges}
    return [f"{where}.{problem}" for where, problem in told.items() if problem]


def _known(role: str, suite: Path, prompts: list[Any]) -> None:
    for prompt in prompts:
        try:
            town.score(str(prompt), "")
        except BadData as error:
            raise BadData(f"evaluation.suites.{role}: {suite}: {error}") from error


def _problem(metric: str, judge: Judge) -> str:
    if judge.kind is JudgeKind.model and not is_name(judge.model):
        return _classifier(judge)
    if judge.kind is JudgeKind.llm:
        return _chat_model(metric, judge)
    return ""


def _classifier(judge: Judge) -> str:
    folder = Path(judge.model).expanduser()
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return f"model {judge.model!r}: no folder with a config.json; give a classifier's folder or hub id"
    kind = next(iter(config.get("architectures") or ["?"]))
    if not kind.endswith("ForSequenceClassification"):
        return f"model {judge.model!r}: holds a {kind}; give a model that was trained as a sequence classifier"
    labels = {str(i): name for i, name in _labels(config).items()}
    names = ", ".join(labels.values())
    if judge.label and judge.label not in (*labels, *labels.values()):
        return f"label {judge.label!r}: the judge has {f'the classes {names}' if labels else 'a single score'}"
    if not judge.label and len(labels) > 1:
        return f"label: the judge has the classes {names}; name the one whose probability is the score"
    templated = (folder / "chat_template.jinja").exists() or "chat_template" in _tokenizer(folder)
    if not judge.text and not templated:
        return "text: the judge has no chat template; say how prompt and answer are written"
    return ""


def _labels(config: dict[str, Any]) -> dict[str, str]:
    """Return number → name of the classes; transformers writes none of them where there are two, its default."""
    if config.get("id2label") is None:
        return {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return dict(config["id2label"])


def _tokenizer(folder: Path) -> str:
    try:
        return (folder / "tokenizer_config.json").read_text("utf-8")
    except OSError:
        return ""


def _chat_model(metric: str, judge: Judge) -> str:
    if judge.key and not os.environ.get(judge.key):
        return f"key: the environment variable {judge.key} is not set; put the key there"
    for path in rubric_files(metric, judge)[:1]:
        try:
            text = path.read_text("utf-8")
            missing = [word for word in (*NEEDED, REPLY) if word not in text]
        except (OSError, UnicodeDecodeError) as error:
            return f"rubric {str(path)!r}: cannot be read ({error}); give a text file, or leave it out for ours"
        if missing:
            return f"rubric {str(path)!r}: lacks {', '.join(missing)}"
    place = urlsplit(judge.base_url)
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname or "", port), timeout=5).close()
    except (OSError, ValueError) as error:
        return f"base_url {judge.base_url!r}: nobody answers there ({error}); start that endpoint"
    return ""
