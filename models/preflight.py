"""What can be known of an evaluation before anything is trained: engine, tasks, and all that judges need."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.data import sources, town
from models.data.dialogue import messages
from models.data.suites import labels
from models.errors import BadData, BadInput, BadPolicy, BadRecipe
from models.files.hub import is_name, local
from models.judges.protocol import SINGLE, rubric_files
from models.metrics import benchmarks
from models.policy import headers, probe, vllm, weights
from models.recipe import Assessment, Engine, Evaluation, GateMode, Judge, JudgeKind, Judges, Recipe, Suites
from models.recipe.places import TOWN
from models.words import counted, first_line

LARGEST_RUBRIC = 2**20
"""Bytes; ours have some 1,000."""
ASKED_FOR = 10.0
"""Seconds in which a judge's address must answer at all."""
LARGEST_HEAD = 2**20
"""Bytes of an answer's headers, and of what comes with them of its list of models."""
NEEDED = ("$prompt", "$first", "$second", "$fence")
REPLY = '{"$fence": {"first": GRADE, "second": GRADE}}'
"""What a comparing rubric must ask for, since nothing else is read."""


def refuse(evaluation: Evaluation) -> None:
    """Refuse judges that cannot judge, suites that cannot be asked, and an engine or tasks that are not there.

    Raises:
        BadRecipe: one sentence for each that cannot be used.
        BadData: a suite cannot be read, or holds prompts that its judge does not know.
    """
    errors = missing(evaluation) + problems(evaluation.judges, fetch=True)
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


def look(recipe: Recipe | Assessment, kept: Path, found: Callable[[str, str], str] | None = None) -> probe.Found:
    """Look at every policy and every classifier that the recipe names; return what is known of the base.

    Args:
        kept: folder in which findings are kept: the store. What lies there was made by us.
        found: (place of a policy, the recipe's key) → its place on this disk or hub; without it, what is not on this
            disk is left out.

    Raises:
        BadPolicy: one cannot be used; names it as the recipe does, the file and what to do.
    """
    wanted = [*_policies(recipe, kept, found), *_classifiers(recipe.evaluation, fetch=found is not None)]
    told = dict(zip((one.name for one in wanted), probe.look(wanted, kept), strict=True))
    base = told.get(f"base {recipe.base!r}", probe.Found())
    if isinstance(recipe, Recipe) and TOWN in [step.data for step in recipe.steps] and base.town_unknown:
        raise BadPolicy(
            f"base {recipe.base!r}: its tokenizer does not know {base.town_unknown:.0%} of the town's words; "
            f"give base = {TOWN!r}, or data of your own"
        )
    return base


def _policies(
    recipe: Recipe | Assessment, kept: Path, found: Callable[[str, str], str] | None
) -> Iterator[probe.Subject]:
    """Yield the policies that are here and were not made here: those have a manifest that is checked when they load."""
    shapes = tuple(shape for shape in _shapes(recipe.evaluation.suites) if shape != ("user",))  # which is tried anyway
    for key, place in policies(recipe):
        if not found and (place.startswith("models:/") or is_name(place)):
            continue
        here = found(place, key) if found else place
        if recipe.template or shapes or not made_here(here, key, kept):
            yield probe.Subject(f"{key} {place!r}", here, recipe.template, shapes=shapes)


def made_here(place: str, key: str, kept: Path) -> bool:
    """Return whether a policy is the town, or lies in our store.

    Raises:
        BadPolicy: there is none, or its weights are not whole.
    """
    return place == TOWN or weights.located(place, key).resolve().parent == kept.resolve()


def _classifiers(evaluation: Evaluation, fetch: bool) -> Iterator[probe.Subject]:
    """Yield the judges that are here, or are fetched, and of which `problems` says nothing."""
    for metric, judge in evaluation.judges:
        if judge.kind is JudgeKind.model and (fetch or not is_name(judge.model)) and not _classifier(judge):
            name = f"evaluation.judges.{metric}.model {judge.model!r}"
            writes = "text" if judge.text else "template"
            yield probe.Subject(
                name, judge.model, judge=writes, shapes=() if judge.text else _shapes(evaluation.suites, metric)
            )


def _shapes(suites: Suites, metric: str = "") -> tuple[tuple[str, ...], ...]:
    """Return the roles of the turns of all prompts that are here, or that one judge will read, each shape once."""
    shapes = set()
    for role, place in suites:
        path = Path(place).expanduser()
        judged = "harmless" if role == "must_pass" else role
        if metric in ("", judged) and place not in ("", TOWN) and not is_name(place) and path.exists():
            with suppress(BadData):  # told with all other data
                shapes |= {tuple(turn["role"] for turn in messages(r["prompt"])) for r in sources.prompts(role, path)}
    return tuple(sorted(shapes))


def policies(recipe: Recipe | Assessment) -> list[tuple[str, str]]:
    """Return (key, place) of every policy that the recipe names."""
    if isinstance(recipe, Assessment):
        return [("policy", place) for place in recipe.policies]
    return [("base", recipe.base), *([("gate.anchor", recipe.gate.anchor)] if recipe.gate.anchor else [])]


def undecidable(recipe: Recipe) -> str:
    """Say why the gate could never decide on the recipe's own suite: one of its halves is empty."""
    place = recipe.evaluation.suites.harmless
    judged = recipe.evaluation.judges.harmless.kind is not JudgeKind.none
    path = Path(place).expanduser()
    if recipe.gate.mode is GateMode.off or not judged or place in ("", TOWN) or is_name(place) or not path.exists():
        return ""
    told = sources.prompts("harmless", path)
    tested = sum(sources.tests([row["prompt"] for row in told]))
    if 0 < tested < len(told):
        return ""
    return (
        f"evaluation.suites.harmless: {place}: {counted(len(told), 'different prompt')}, all in one half, so that none "
        "is left to choose by or to decide on; give more prompts that differ, or set gate.mode = 'off'"
    )


def missing(evaluation: Evaluation) -> list[str]:
    """Return one sentence for the engine, and one for the tasks, if they are not there."""
    found = {
        "engine": vllm.problem() if evaluation.engine is Engine.vllm else "",
        "tasks": benchmarks.problem(evaluation.tasks),
    }
    return [f"evaluation.{key}: {problem}" for key, problem in found.items() if problem]


def problems(judges: Judges, fetch: bool = False) -> list[str]:
    """Return one sentence for each judge that cannot be used.

    Args:
        fetch: fetch those that lie on a hub; else they are left out.
    """
    told = {f"evaluation.judges.{metric}": _problem(metric, judge, fetch) for metric, judge in judges}
    return [f"{where}.{problem}" for where, problem in told.items() if problem] + list(_unlabelled(judges))


def _unlabelled(judges: Judges) -> Iterator[str]:
    """Yield one sentence for each labelled sample that is here and cannot be used."""
    for metric, judge in judges:
        path = Path(judge.labels).expanduser()
        if judge.labels and not is_name(judge.labels) and path.exists():  # a missing one is told with all other data
            try:
                labels(path)
            except BadData as error:
                yield f"evaluation.judges.{metric}.labels: {error}; mend the file, or leave it out"


def _known(role: str, suite: Path, prompts: list[Any]) -> None:
    for prompt in prompts:
        try:
            town.score(str(prompt), "")
        except BadData as error:
            raise BadData(f"evaluation.suites.{role}: {suite}: {error}") from error


def _problem(metric: str, judge: Judge, fetch: bool) -> str:
    if judge.kind is JudgeKind.model and (fetch or not is_name(judge.model)):
        return _classifier(judge)
    if judge.kind is JudgeKind.llm:
        return _chat_model(metric, judge)
    return ""


def _classifier(judge: Judge) -> str:
    try:
        folder = local(judge.model, "model")
    except BadInput as error:
        return f"model: {error}"
    try:
        config = headers.settings(folder / "config.json")
    except BadPolicy:
        return f"model {judge.model!r}: no folder with a config.json; give a classifier's folder or hub id"
    kind = str(next(iter(config.get("architectures") or ["?"])))
    if not kind.endswith("ForSequenceClassification"):
        return f"model {judge.model!r}: holds a {kind}; give a model that was trained as a sequence classifier"
    try:
        headers.tensors(folder)
        tokenizer = _tokenizer(folder)
    except BadPolicy as error:
        return f"model {judge.model!r}: {error}"
    classes = {str(i): str(name) for i, name in _classes(config).items()}
    names = ", ".join(classes.values())
    if judge.label and judge.label not in (*classes, *classes.values()):
        return f"label {judge.label!r}: the judge has {f'the classes {names}' if classes else 'a single score'}"
    if judge.label and len(classes) == 1:
        return f"label {judge.label!r}: {SINGLE}"
    if not judge.label and len(classes) > 1:
        return f"label: the judge has the classes {names}; name the one whose probability is the score"
    templated = (folder / "chat_template.jinja").exists() or "chat_template" in tokenizer
    if not judge.text and not templated:
        return "text: the judge has no chat template; say how prompt and answer are written"
    return ""


def _classes(config: dict[str, Any]) -> dict[str, str]:
    """Return number → name of the classes; transformers writes none of them where there are two, its default."""
    if config.get("id2label") is None:
        return {str(i): f"LABEL_{i}" for i in range(config.get("num_labels", 2))}
    return dict(config["id2label"])


def _tokenizer(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return headers.settings(file) if file.exists() else {}


def _chat_model(metric: str, judge: Judge) -> str:
    if judge.key and not os.environ.get(judge.key):
        return f"key: the environment variable {judge.key} is not set; put the key there"
    if judge.key and not (os.environ[judge.key].isascii() and os.environ[judge.key].isprintable()):
        return f"key: the environment variable {judge.key} holds a character that no key has; put the key alone there"
    for path in rubric_files(metric, judge)[:1]:
        try:
            text = _rubric(path)
            missing = [word for word in (*NEEDED, REPLY) if word not in text]
        except (OSError, ValueError) as error:
            return f"rubric {str(path)!r}: cannot be read ({error}); give a text file, or leave it out for ours"
        if missing:
            return f"rubric {str(path)!r}: lacks {', '.join(missing)}"
    why = _silent(judge)
    return f"base_url {judge.base_url!r}: {why}" if why else ""


def _rubric(path: Path) -> str:
    """Return a rubric's text.

    Raises:
        OSError, ValueError: it cannot be read, or is no text of a rubric's length.
    """
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    if path.stat().st_size > LARGEST_RUBRIC:
        raise ValueError(f"it is larger than {LARGEST_RUBRIC:,} bytes")
    return path.read_text("utf-8")


def _silent(judge: Judge) -> str:
    """Ask the address for its models, as any client may, and one that has no list for an answer to nothing."""
    import httpx2

    from models.files import http

    key = {"authorization": f"Bearer {os.environ[judge.key]}"} if judge.key else {}
    address, chat = judge.base_url.rstrip("/"), "/chat/completions"
    try:
        with http.client(ASKED_FOR, LARGEST_HEAD) as client:
            with client.stream("GET", address + "/models", headers=key) as reply:
                listed = reply.status_code != 404
            nothing = {"model": judge.model, "messages": [], "max_tokens": 1}
            with suppress(httpx2.HTTPError):
                if not listed and client.post(address + chat, headers=key, json=nothing).status_code == 404:
                    return f"answers 404 to {chat}; most addresses end in /v1, and the model must be one of theirs"
        return ""
    except (http.Redirected, http.TooMuch) as error:
        return f"{error}; give the address itself"
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        return f"nobody answers there as HTTP ({first_line(error)}); start that endpoint"
