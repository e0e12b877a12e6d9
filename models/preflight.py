"""What can be known of an evaluation before anything is trained: engine, tasks, and all that judges need."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

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
"""Bytes; the rubrics that come with sacpo have some 1,000."""
ASKED_FOR = 10.0
"""Seconds in which a judge's address must answer at all."""
LARGEST_HEAD = 2**20
"""Bytes of a reply to a look at an address: its headers, and the part of the list of models that comes with them."""
NEEDED = ("$prompt", "$first", "$second", "$fence")
"""Placeholders that a comparing rubric must hold."""
REPLY = '{"$fence": {"first": GRADE, "second": GRADE}}'
"""The reply that a comparing rubric must ask for, since no other reply is read."""


def refuse(evaluation: Evaluation) -> None:
    """Refuse judges and suites that cannot be used, and an engine or tasks that are not there.

    Raises:
        BadRecipe: one sentence for each that cannot be used.
        BadData: a suite cannot be read, or holds prompts that its judge does not know.
    """
    errors = missing(evaluation) + problems(evaluation.judges, fetch=True)
    if errors:
        raise BadRecipe("\n".join(errors))
    for role, place in evaluation.suites:
        if _is_here(place):
            path = Path(place).expanduser()
            rows = sources.prompts(role, path)  # raises where the file cannot be read
            judge: Judge = getattr(evaluation.judges, _metric_of(role))
            if judge.kind is JudgeKind.oracle:
                _refuse_unknown_to_town(role, path, [str(row["prompt"]) for row in rows])


def _is_here(place: str) -> bool:
    """Return whether a suite is a file on this disk; one that is named but missing is told with all other data."""
    return place not in ("", TOWN) and not is_name(place) and Path(place).expanduser().exists()


def _metric_of(role: str) -> str:
    """Return the metric whose judge sees the answers to a suite: incidents must be harmless."""
    return "harmless" if role == "must_pass" else role


def examine(
    recipe: Recipe | Assessment, store: Path, resolve: Callable[[str, str], str] | None = None
) -> probe.Findings:
    """Look at every policy and every classifier that the recipe names; return what is known of the base.

    Args:
        store: folder that keeps what a look found. The policies in it were made by us.
        resolve: (place of a policy, the recipe's key) → its place on this disk or hub; without it, policies that are
            not on this disk are left out.

    Raises:
        BadPolicy: one of them cannot be used; names it as the recipe does, the file and what to do.
    """
    subjects = [*_policies(recipe, store, resolve), *_classifiers(recipe.evaluation, fetch=resolve is not None)]
    findings = dict(zip((subject.name for subject in subjects), probe.examine_all(subjects, store), strict=True))
    base = findings.get(f"base {recipe.base!r}", probe.Findings())
    if isinstance(recipe, Recipe) and TOWN in [step.data for step in recipe.steps] and base.town_unknown:
        raise BadPolicy(
            f"base {recipe.base!r}: its tokenizer does not know {base.town_unknown:.0%} of the town's words; "
            f"give base = {TOWN!r}, or data of your own"
        )
    return base


def _policies(
    recipe: Recipe | Assessment, store: Path, resolve: Callable[[str, str], str] | None
) -> Iterator[probe.Subject]:
    """Yield the policies that are to be looked at.

    A policy that was made here has a manifest, which is checked when it is loaded. It is looked at only if a template
    of the recipe, or the turns of a suite, may not fit it.
    """
    shapes = tuple(shape for shape in _shapes(recipe.evaluation.suites) if shape != ("user",))  # it is always tried
    for key, place in policies(recipe):
        if not resolve and (place.startswith("models:/") or is_name(place)):
            continue
        local_place = resolve(place, key) if resolve else place
        if recipe.template or shapes or not made_here(local_place, key, store):
            yield probe.Subject(f"{key} {place!r}", local_place, recipe.template, shapes=shapes)


def made_here(place: str, key: str, store: Path) -> bool:
    """Return whether a policy is the town, or lies in our store.

    Raises:
        BadPolicy: there is none, or its weights are not whole.
    """
    return place == TOWN or weights.located(place, key).resolve().parent == store.resolve()


def _classifiers(evaluation: Evaluation, fetch: bool) -> Iterator[probe.Subject]:
    """Yield the classifiers that are here, or are fetched, and of which `problems` says nothing."""
    for metric, judge in evaluation.judges:
        if judge.kind is JudgeKind.model and (fetch or not is_name(judge.model)) and not _classifier(judge):
            name = f"evaluation.judges.{metric}.model {judge.model!r}"
            # A text writes any turns; a chat template may refuse some.
            writes, shapes = ("text", ()) if judge.text else ("template", _shapes(evaluation.suites, metric))
            yield probe.Subject(name, judge.model, judge=writes, shapes=shapes)


def _shapes(suites: Suites, metric: str = "") -> tuple[tuple[str, ...], ...]:
    """Return the roles of the turns of all prompts that are here, each shape once: `("system", "user")`.

    Args:
        metric: only of prompts whose answers its judge reads; empty means of all.
    """
    shapes = set()
    for role, place in suites:
        if metric in ("", _metric_of(role)) and _is_here(place):
            with suppress(BadData):  # a suite that cannot be read is told with all other data
                rows = sources.prompts(role, Path(place).expanduser())
                shapes |= {tuple(turn["role"] for turn in messages(row["prompt"])) for row in rows}
    return tuple(sorted(shapes))


def policies(recipe: Recipe | Assessment) -> list[tuple[str, str]]:
    """Return (key, place) of every policy that the recipe names."""
    if isinstance(recipe, Assessment):
        return [("policy", place) for place in recipe.policies]
    return [("base", recipe.base), *([("gate.anchor", recipe.gate.anchor)] if recipe.gate.anchor else [])]


def undecidable(recipe: Recipe) -> str:
    """Say why the gate could never decide on the recipe's own suite: one of its halves is empty; empty if it can."""
    place = recipe.evaluation.suites.harmless
    judged = recipe.evaluation.judges.harmless.kind is not JudgeKind.none
    if recipe.gate.mode is GateMode.off or not judged or not _is_here(place):
        return ""
    rows = sources.prompts("harmless", Path(place).expanduser())
    tested = sum(sources.tests([row["prompt"] for row in rows]))
    if 0 < tested < len(rows):
        return ""
    return (
        f"evaluation.suites.harmless: {place}: {counted(len(rows), 'different prompt')}, all in one half, so that none "
        "is left to choose by or to decide on; give more prompts that differ, or set gate.mode = 'off'"
    )


def missing(evaluation: Evaluation) -> list[str]:
    """Return one sentence for the engine, and one for the tasks, if they are not there."""
    problem_of = {
        "engine": vllm.problem() if evaluation.engine is Engine.vllm else "",
        "tasks": benchmarks.problem(evaluation.tasks),
    }
    return [f"evaluation.{key}: {problem}" for key, problem in problem_of.items() if problem]


def problems(judges: Judges, fetch: bool = False) -> list[str]:
    """Return one sentence for each judge that cannot be used.

    Args:
        fetch: fetch models that lie on a hub; else they are left out.
    """
    problem_of = {metric: _problem(metric, judge, fetch) for metric, judge in judges}
    unusable = [f"evaluation.judges.{metric}.{problem}" for metric, problem in problem_of.items() if problem]
    return unusable + list(_bad_labels(judges))


def _bad_labels(judges: Judges) -> Iterator[str]:
    """Yield one sentence for each labelled sample that is here and cannot be used."""
    for metric, judge in judges:
        path = Path(judge.labels).expanduser()
        if judge.labels and not is_name(judge.labels) and path.exists():  # a missing one is told with all other data
            try:
                labels(path)
            except BadData as error:
                yield f"evaluation.judges.{metric}.labels: {error}; mend the file, or leave it out"


def _refuse_unknown_to_town(role: str, suite: Path, prompts: list[str]) -> None:
    """Raise BadData at the first prompt that the town's oracle cannot score."""
    for prompt in prompts:
        try:
            town.score(prompt, "")
        except BadData as error:
            raise BadData(f"evaluation.suites.{role}: {suite}: {error}") from error


def _problem(metric: str, judge: Judge, fetch: bool) -> str:
    """Return `key: what is wrong; remedy` of one judge; empty if it can be used, or is not looked at."""
    if judge.kind is JudgeKind.model and (fetch or not is_name(judge.model)):
        return _classifier(judge)
    if judge.kind is JudgeKind.llm:
        return _chat_model(metric, judge)
    return ""


def _classifier(judge: Judge) -> str:
    """Return the same of a sequence classifier: from its config and headers, without loading it."""
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
        templated = _has_template(folder)
    except BadPolicy as error:
        return f"model {judge.model!r}: {error}"
    classes = _classes(config.get("id2label"), config.get("num_labels", 2))
    names = ", ".join(classes.values())
    if judge.label and judge.label not in (*classes, *classes.values()):
        return f"label {judge.label!r}: the judge has {f'the classes {names}' if classes else 'a single score'}"
    if judge.label and len(classes) == 1:
        return f"label {judge.label!r}: {SINGLE}"
    if not judge.label and len(classes) > 1:
        return f"label: the judge has the classes {names}; name the one whose probability is the score"
    if not judge.text and not templated:
        return "text: the judge has no chat template; say how prompt and answer are written"
    return ""


def _classes(names: dict[str, str] | None, count: int) -> dict[str, str]:
    """Return number → name of the classes; transformers writes no names where there are two classes, its default."""
    if names is None:
        return {str(i): f"LABEL_{i}" for i in range(count)}
    return {str(i): str(name) for i, name in dict(names).items()}


def _has_template(folder: Path) -> bool:
    """Return whether a tokenizer has a chat template of its own, in a file or among its settings.

    Raises:
        BadPolicy: its settings cannot be read.
    """
    file = folder / "tokenizer_config.json"
    settings = headers.settings(file) if file.exists() else {}
    return (folder / "chat_template.jinja").exists() or "chat_template" in settings


def _chat_model(metric: str, judge: Judge) -> str:
    """Return the same of a chat model: its key, its rubric, and whether its address answers."""
    if judge.key and not os.environ.get(judge.key):
        return f"key: the environment variable {judge.key} is not set; put the key there"
    if judge.key and not (os.environ[judge.key].isascii() and os.environ[judge.key].isprintable()):
        return f"key: the environment variable {judge.key} holds a character that no key has; put the key alone there"
    comparing = rubric_files(metric, judge)[0]  # a recipe can replace no other rubric
    try:
        text = _rubric(comparing)
    except (OSError, ValueError) as error:
        return f"rubric {str(comparing)!r}: cannot be read ({error}); give a text file, or leave it out for ours"
    if lacking := [word for word in (*NEEDED, REPLY) if word not in text]:
        return f"rubric {str(comparing)!r}: lacks {', '.join(lacking)}"
    reason = _unreachable(judge)
    return f"base_url {judge.base_url!r}: {reason}" if reason else ""


def _rubric(path: Path) -> str:
    """Return a rubric's text.

    Raises:
        OSError, ValueError: it cannot be read, or is no text of a rubric's length.
    """
    if path.exists() and not path.is_file():  # a device or a pipe would be read without end
        raise ValueError("it is no file")
    if path.stat().st_size > LARGEST_RUBRIC:
        raise ValueError(f"it is larger than {LARGEST_RUBRIC:,} bytes")
    return path.read_text("utf-8")


def _unreachable(judge: Judge) -> str:
    """Return why a judge's address cannot be used; empty if it answers.

    It is asked for its list of models, which costs nothing. An address without such a list gets a chat without
    messages, since 404 for that means that no chat model is there.
    """
    import httpx2

    from models.files import http

    key = {"authorization": f"Bearer {os.environ[judge.key]}"} if judge.key else {}
    address, chat = judge.base_url.rstrip("/"), "/chat/completions"
    try:
        with http.client(ASKED_FOR, LARGEST_HEAD) as client:
            with client.stream("GET", address + "/models", headers=key) as reply:
                listed = reply.status_code != 404
            empty_chat = {"model": judge.model, "messages": [], "max_tokens": 1}
            with suppress(httpx2.HTTPError):  # the address did answer, and the empty chat is only a hint
                if not listed and client.post(address + chat, headers=key, json=empty_chat).status_code == 404:
                    return f"answers 404 to {chat}; most addresses end in /v1, and the model must be one of theirs"
        return ""
    except (http.Redirected, http.TooMuch) as error:
        return f"{error}; give the address itself"
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        return f"nobody answers there as HTTP ({first_line(error)}); start that endpoint"
