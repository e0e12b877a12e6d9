"""What a recipe will do, told before it does it: trainings, rows, errors; costs.py and evidence.py say the rest."""

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypedDict

from models import costs, preflight
from models.alignment import batching
from models.artifacts import Sources
from models.data import preferences, sft_corpus, sources
from models.errors import BadInput
from models.evidence import evidence
from models.files import hub
from models.recipe import Recipe, kl_weight
from models.words import counted


@dataclass(frozen=True)
class StepPlan:
    """One line of the plan."""

    title: str
    data: str
    reference: str
    weights: list[float]
    """β/λ of each value of the grid."""
    trainings: int
    """Grid values times the policies of the step before."""
    rows: int
    """Training rows; −1 where they lie on a hub and are not here yet."""
    tokens: int
    """About how many tokens one training reads; −1 if unknown."""
    updates: int
    card: str = ""
    """What became of the rows that were given, in one line."""


@dataclass(frozen=True)
class Plan:
    """The whole plan; −1 is unknown."""

    steps: list[StepPlan]
    policies: int
    parameters: int
    memory: float
    """Bytes of weights, gradients and optimiser of one training; activations come on top."""
    disk: float
    """Bytes of all policies and of the checkpoints of those in training."""
    seconds: float
    """About how long on this machine; −1 if unknown."""
    judging: list[str]
    """How many answers are generated, and what chat models cost as judges."""
    evidence: list[str]
    errors: list[str]


class Prepared(NamedTuple):
    """What preparing the data of one step showed."""

    rows: int = -1
    """Training rows; −1 if unknown."""
    characters: float = 0.0
    """Mean characters of a training row, as JSON."""
    card: str = ""
    """What became of the rows that were given, in one line."""


class DataCard(TypedDict):
    """What we read of a `card.json` that `preferences.prepare` writes."""

    rows: int
    rows_became: dict[str, int]
    """Split, or reason why rows are not used → rows."""
    splits: dict[str, int]
    """Split → lines of its file: pairs or answers."""
    splits_hold: dict[str, str]
    """Split → `pairs` or `answers`."""
    contradictions: int
    scores_prefer_the_rejected: int
    columns_not_used: dict[str, int]
    files_not_read: list[str]


def plan(recipe: Recipe, store: Path) -> Plan:
    """Return the plan; everything that is wrong with base and data is listed, not raised.

    Args:
        store: folder that keeps what a look at a base found.
    """
    errors: list[str] = []
    try:
        parameters = costs.parameters(recipe.base, preflight.examine(recipe, store))
    except BadInput as error:
        parameters, errors = -1, [str(error)]
    with tempfile.TemporaryDirectory() as folder:
        origin = _sources(recipe, Path(folder), errors)
        _look_at_corpus(recipe, origin, errors)
        steps = _steps(recipe, origin, Path(folder), errors)
        trainings = sum(step.trainings for step in steps)
        merges = math.prod(len(step.lambda_) for step in recipe.steps[:-1]) * len(recipe.merge.weights)
        policies = 1 + trainings + merges
        # `origin` lacks a suite that cannot be read, or holds the town's in its place: then nothing is told of suites.
        suites_fail = any(error.startswith("evaluation.suites.") for error in errors)
        judging = [] if suites_fail else costs.judging(recipe, origin, policies)
        proofs = [] if suites_fail else [*evidence(recipe, origin), *_noticed(recipe)]
        errors += [reason] if origin and (reason := preflight.undecidable(recipe)) else []
    errors += preflight.missing(recipe.evaluation) + preflight.problems(recipe.evaluation.judges)
    full = any(not step.adapter_rank for step in recipe.steps)
    memory = costs.training_memory(parameters, full)
    disk = costs.disk(parameters, policies, min(recipe.compute.processes, trainings) if full else 0)
    seconds = -1.0
    if parameters >= 0 and all(step.tokens >= 0 for step in steps):
        work = [costs.Trainings(step.trainings, step.tokens, step.updates) for step in steps]
        seconds = costs.seconds(recipe, work, parameters)
    return Plan(steps, policies, parameters, memory, disk, seconds, judging, proofs, errors)


def _sources(recipe: Recipe, folder: Path, errors: list[str]) -> Sources | None:
    """Return the sources that are here; data that lie on a hub only are left for the run."""
    places = {role: place for role, place in sources.places_of(recipe).items() if not hub.is_name(place)}
    sha256 = {}
    for role, place in list(places.items()):
        try:
            sha256[role] = sources.digest(role, place)
        except BadInput as error:
            errors.append(str(error))
            del places[role]
    try:
        return sources.gather(folder, places, sha256, recipe.seed) if places else None
    except BadInput as error:
        errors.append(str(error))
        return None


def _look_at_corpus(recipe: Recipe, origin: Sources | None, errors: list[str]) -> None:
    """Add what is wrong with the supervised corpus, if there is one here."""
    if origin is None or "sft" not in origin.files:
        return
    try:
        rows = len(sft_corpus.examples(origin, recipe.data)[0])
    except BadInput as error:
        errors.append(str(error))
        return
    if reason := batching.moves_nothing(batching.updates(rows, recipe.sft), recipe.sft):
        errors.append(f"sft: {reason}")


def _steps(recipe: Recipe, origin: Sources | None, folder: Path, errors: list[str]) -> list[StepPlan]:
    """Return one line per step; what is wrong with its data is added to the errors."""
    steps: list[StepPlan] = []
    policies = 1  # as many start the step, and each is trained once per value of λ
    for k, step in enumerate(recipe.steps):
        prepared = _prepared(recipe, k, origin, folder, errors)
        rows = prepared.rows
        positive = [value for value in step.lambda_ if value > 0]  # λ = 0 skips the step and trains nothing
        updates = batching.updates(rows, step) if rows > 0 or step.updates else -1
        if rows > 0 and positive and (reason := batching.moves_nothing(updates, step)):
            errors.append(f"steps.{k}: {reason}")
        steps.append(
            StepPlan(
                title=f"{k + 1}. {step.metric} · {step.method}{' · LoRA' if step.adapter_rank else ''}",
                data=step.data,
                reference="base" if k == 0 else f"the {'policies' if policies > 1 else 'policy'} of step {k}",
                weights=[kl_weight(recipe.beta, value) for value in positive],
                trainings=policies * len(positive),
                rows=rows,
                tokens=int(updates * step.batch * prepared.characters / costs.CHARACTERS_PER_TOKEN) if rows > 0 else -1,
                updates=updates,
                card=prepared.card,
            )
        )
        policies *= len(step.lambda_)
    return steps


def _prepared(recipe: Recipe, k: int, origin: Sources | None, folder: Path, errors: list[str]) -> Prepared:
    """Prepare the data of a step as the run would, in a folder that is deleted afterwards; unknown if that fails."""
    step, role = recipe.steps[k], f"steps.{k}"
    if origin is None or role not in origin.files:
        return Prepared()
    out = folder / f"prepared-{k}"
    out.mkdir()
    try:
        pairs = preferences.prepare(out, origin, role, step.selection, recipe.data_of(step))
    except BadInput as error:
        # The message ends with the place of a file that is deleted with this folder.
        errors.append(f"steps.{k}: {str(error).partition(preferences.KEPT)[0]}")
        return Prepared()
    rows = pairs.counts["train"]
    card = json.loads((out / "card.json").read_text("utf-8"))
    return Prepared(rows, (out / "train.jsonl").stat().st_size / rows, _rows_in_words(card))


def _rows_in_words(card: DataCard) -> str:
    """Say in one line what became of the rows; the counts are rows, and add up to all rows of the file."""
    became = dict(card["rows_became"])
    train, heldout = became.pop("train", 0), became.pop("validation", 0) + became.pop("test", 0)
    lines = card["splits"]
    answers = f" (as {counted(lines['train'], 'answer')})" if card["splits_hold"]["train"] == "answers" else ""
    pairs = lines["validation"] + lines["test"]
    in_pairs = f" (as {counted(pairs, 'pair')})" if heldout != pairs else ""
    reasons = sorted(became.items(), key=lambda item: -item[1])
    dropped = "".join(f"; {count:,} not used: {reason}" for reason, count in reasons[:5])
    more = sum(count for _, count in reasons[5:])
    dropped += f"; {more:,} not used for other reasons" if more else ""
    sentence = (
        f"{counted(card['rows'], 'row')} given: {train:,} to train{answers}, {heldout:,} held out{in_pairs}{dropped}"
    )
    notes = {
        "contradictions, kept": card["contradictions"],
        "rows whose scores prefer the rejected answer": card["scores_prefer_the_rejected"],
        "columns not used": ", ".join(card["columns_not_used"]),
        "files not read": ", ".join(card["files_not_read"]),
    }
    return sentence + "".join(f"; {name}: {value}" for name, value in notes.items() if value)


def _noticed(recipe: Recipe) -> Iterator[str]:
    """Yield what is odd about the files that are here."""
    places = {role: place for role, place in sources.places_of(recipe).items() if not hub.is_name(place)}
    with suppress(BadInput):  # a file that cannot be read is in the plan's errors already
        yield from sources.oddities(places)
