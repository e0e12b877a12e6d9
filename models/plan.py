"""What a recipe will do, before it does it: trainings, rows, memory, disk, time, and the power of its evidence."""

import json
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models import preflight
from models.alignment import batching
from models.artifacts import Sources
from models.data import preferences, sft_corpus, sources, suites, town
from models.errors import BadInput
from models.files import hub, jsonl
from models.gate.gate import CLIP, too_few
from models.judges.judge import SEES
from models.judges.protocol import rubric_files
from models.metrics.statistics import enough_prompts, needed, power, ruled_out
from models.policy import weights as policy
from models.policy.probe import Found
from models.recipe import Constraint, JudgeKind, Recipe, kl_weight
from models.recipe.places import TOWN
from models.words import counted

OVERHEAD = 0.03
"""Seconds per optimiser update that do not depend on the model (measured on town, one thread)."""
EFFICIENCY = 0.5
"""Share of a plain matrix product's speed that training reaches (measured on town and SmolLM2-135M, float32)."""


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


def plan(recipe: Recipe, kept: Path) -> Plan:
    """Return the plan; everything that is wrong with base and data is listed, not raised.

    Args:
        kept: folder in which is kept what was found of a base.
    """
    errors: list[str] = []
    try:
        parameters = _parameters(recipe.base, preflight.look(recipe, kept))
    except BadInput as error:
        parameters, errors = -1, [str(error)]
    steps: list[StepPlan] = []
    policies = 1
    with tempfile.TemporaryDirectory() as folder:
        origin = _sources(recipe, Path(folder), errors)
        if origin and "sft" in origin.files:
            try:
                rows = len(sft_corpus.examples(origin, recipe.data)[0])
                if why := batching.moves_nothing(batching.updates(rows, recipe.sft), recipe.sft):
                    errors.append(f"sft: {why}")
            except BadInput as error:
                errors.append(str(error))
        for k, step in enumerate(recipe.steps):
            rows, characters, card = _rows(recipe, k, origin, Path(folder), errors)
            positive = [value for value in step.lambda_ if value > 0]
            trainings = policies * len(positive)
            updates = batching.updates(rows, step) if rows > 0 or step.updates else -1
            if rows > 0 and positive and (why := batching.moves_nothing(updates, step)):
                errors.append(f"steps.{k}: {why}")
            tokens = int(updates * step.batch * characters / 4) if rows > 0 else -1
            reference = "base" if k == 0 else f"the {'policies' if policies > 1 else 'policy'} of step {k}"
            weights = [kl_weight(recipe.beta, value) for value in positive]
            title = f"{k + 1}. {step.metric} · {step.method}{' · LoRA' if step.adapter_rank else ''}"
            steps.append(StepPlan(title, step.data, reference, weights, trainings, rows, tokens, updates, card))
            policies *= len(step.lambda_)
        trained = sum(step.trainings for step in steps)
        made = 1 + trained + policies // max(1, len(recipe.steps[-1].lambda_)) * len(recipe.merge.weights)
        lost = any(error.startswith("evaluation.suites.") for error in errors)  # the town's would stand in for them
        judging = [] if lost else _judging(recipe, origin, made)
        evidence = [] if lost else [*_evidence(recipe, origin), *_noticed(recipe)]
        errors += [why] if origin and (why := preflight.undecidable(recipe)) else []
    errors += preflight.missing(recipe.evaluation) + preflight.problems(recipe.evaluation.judges)
    full = any(not step.adapter_rank for step in recipe.steps)
    memory = training_memory(parameters, full)
    disk = parameters * (4.0 * made + (12.0 * min(recipe.compute.processes, trained) if full else 0))
    known = parameters >= 0 and all(step.tokens >= 0 for step in steps)
    seconds = _seconds(recipe, steps, parameters) if known else -1.0
    return Plan(steps, made, parameters, memory, disk, seconds, judging, evidence, errors)


def training_memory(parameters: int, full: bool) -> float:
    """Return the bytes of weights, gradients and optimiser of one training, of all weights or of an adapter."""
    return parameters * (16.0 if full else 5.0)


def _sources(recipe: Recipe, folder: Path, errors: list[str]) -> Sources | None:
    """Return the sources that are here; data that lie on a hub only are left for the run."""
    named = {role: place for role, place in sources.named(recipe).items() if not hub.is_name(place)}
    sha256 = {}
    for role, place in list(named.items()):
        try:
            sha256[role] = sources.digest(role, place)
        except BadInput as error:
            errors.append(str(error))
            del named[role]
    try:
        return sources.gather(folder, named, sha256, recipe.seed) if named else None
    except BadInput as error:
        errors.append(str(error))
        return None


def _rows(recipe: Recipe, k: int, origin: Sources | None, folder: Path, errors: list[str]) -> tuple[int, float, str]:
    """Return training rows and mean characters per row, by preparing the data as the run would."""
    step, role = recipe.steps[k], f"steps.{k}"
    if origin is None or role not in origin.files:
        return -1, 0.0, ""
    out = folder / f"prepared-{k}"
    out.mkdir()
    try:
        made = preferences.prepare(out, origin, role, step.selection, recipe.data_of(step))
    except BadInput as error:
        errors.append(f"steps.{k}: {str(error).partition(preferences.KEPT)[0]}")  # what a check writes is not kept
        return -1, 0.0, ""
    rows = made.counts["train"]
    card = json.loads((out / "card.json").read_text("utf-8"))
    return rows, (out / "train.jsonl").stat().st_size / rows, _told(card)


def _told(card: dict[str, Any]) -> str:
    """Say in one line what became of the rows; the counts are rows, and add up to those given."""
    became = dict(card["rows_became"])
    train, held = became.pop("train", 0), became.pop("validation", 0) + became.pop("test", 0)
    lines = card["splits"]
    answers = f" (as {counted(lines['train'], 'answer')})" if card["splits_hold"]["train"] == "answers" else ""
    pairs = lines["validation"] + lines["test"]
    in_pairs = f" (as {counted(pairs, 'pair')})" if held != pairs else ""
    others = sorted(became.items(), key=lambda one: -one[1])
    dropped = "".join(f"; {count:,} not used: {reason}" for reason, count in others[:5])
    more = sum(count for _, count in others[5:])
    dropped += f"; {more:,} not used for other reasons" if more else ""
    sentence = (
        f"{counted(card['rows'], 'row')} given: {train:,} to train{answers}, {held:,} held out{in_pairs}{dropped}"
    )
    notes = {
        "contradictions, kept": card["contradictions"],
        "rows whose scores prefer the rejected answer": card["scores_prefer_the_rejected"],
        "columns not used": ", ".join(card["columns_not_used"]),
        "files not read": ", ".join(card["files_not_read"]),
    }
    return sentence + "".join(f"; {name}: {value}" for name, value in notes.items() if value)


def _parameters(base: str, told: Found) -> int:
    """Return the number of parameters; from the name (`…-7b`) for a hub model that is not here yet; −1 if unknown."""
    if base == TOWN:
        return town.PARAMETERS
    if base.startswith("models:/"):
        return -1
    if hub.is_name(base):
        size = re.search(r"(\d+(?:\.\d+)?)([bm])\b", base.lower().replace("_", "-"))
        return int(float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]) if size else -1
    return told.parameters if told.parameters >= 0 else policy.parameters(policy.located(base))


def _seconds(recipe: Recipe, steps: list[StepPlan], parameters: int) -> float:
    """Return about how long the trainings and their references take on this machine's CPU."""
    if policy.device_kind(recipe.compute.device) != "cpu":
        return -1.0
    speed = EFFICIENCY * _matrix_speed() * recipe.compute.threads
    total = 0.0
    for step, said in zip(recipe.steps, steps, strict=True):
        work = (4 if step.adapter_rank else 6) * parameters * said.tokens  # forward and backward
        one = said.updates * OVERHEAD + work / speed
        side_by_side = min(recipe.compute.processes, said.trainings)
        total += math.ceil(said.trainings / max(1, side_by_side)) * one + 2 * parameters * said.tokens / speed
    return total


def _matrix_speed(size: int = 512) -> float:
    """Return the float32 operations per second of one matrix product on one core, roughly."""
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _judging(recipe: Recipe, origin: Sources | None, policies: int) -> list[str]:
    """Say how many answers to the suites on this disk are generated, and what chat models that judge cost at most.

    Every policy is compared with the base and with the one that it was trained from; on the test prompts one is
    compared with the base, with who serves and with the anchor.

    Args:
        policies: all that are judged, the base included.
    """
    evaluation = recipe.evaluation
    prompts = {
        split: {role: [row["prompt"] for row in jsonl.read(path)] for role, path in origin.suites(split).items()}
        for split in ("validation", "test")
        if origin
    }
    if not any(prompts.values()):
        return []
    validation, test = (sum(map(len, prompts[split].values())) for split in ("validation", "test"))
    rivals = 3  # base, champion, anchor: the first champion, where the recipe names none
    sentences = [
        f"{policies * validation * evaluation.answers:,} answers of up to {evaluation.max_new_tokens} tokens by "
        f"{policies} policies, and at most {(1 + rivals) * test * evaluation.answers:,} to test prompts"
    ]
    for metric, judge in evaluation.judges:
        if judge.kind is not JudgeKind.llm:
            continue
        pair, *single = (len(path.read_text("utf-8")) for path in rubric_files(metric, judge) if path.is_file())
        calls, tokens = 0, 0.0
        for split, judged, compared in (("validation", policies, 2 * (policies - 1)), ("test", 1, rivals)):
            texts = [str(prompt) for role in SEES[metric] for prompt in prompts[split].get(role, [])]
            kinds = [(2 * compared, pair, 2), *((judged, rubric, 1) for rubric in single)]  # each pair in both orders
            for times, rubric, answers in kinds:
                times *= evaluation.answers * judge.repeats
                calls += times * len(texts)
                each = rubric / 4 + answers * evaluation.max_new_tokens + judge.reply_tokens  # four letters a token
                tokens += times * (each * len(texts) + sum(map(len, texts)) / 4)
        sentences.append(
            f"{metric} by {judge.model}: at most {calls:,} calls and about {tokens / 1e6:,.1f} million tokens"
        )
    return sentences


def _evidence(recipe: Recipe, origin: Sources | None) -> list[str]:
    """Say what the test prompts can prove."""
    if recipe.evaluation.judges.harmless.kind is JudgeKind.none:
        return [
            "no judge of harmlessness: the run ends undecided, and its policy is registered without an alias; set "
            "evaluation.judges.harmless, for instance to one of the open models in docs/evidence.md (`Who judges`)"
        ]
    tested = origin.suites("test") if origin else {}
    if "harmless" not in tested:
        return [
            "no suite of harmful prompts: the constraint cannot be tested; name a file of them in "
            "evaluation.suites.harmless"
        ]
    prompts = {role: list(jsonl.read(path)) for role, path in tested.items()}
    categories = Counter(row.get("category", "") for row in prompts["harmless"])
    counts = {role: len(rows) for role, rows in prompts.items()}
    smallest = min(categories.values(), default=0)
    others = [row for role, rows in prompts.items() if role != suites.MUST_PASS for row in rows]
    sampled = {suites.prompt_digest(row["prompt"]) for row in others}
    checks = _checks(recipe, counts, smallest, len(sampled))
    return [*_helpfulness(recipe), *powers(recipe.bound, counts["harmless"]), *checks]


def _noticed(recipe: Recipe) -> Iterator[str]:
    """Yield what is odd about the files that are here; one that cannot be read is told elsewhere."""
    here = {role: place for role, place in sources.named(recipe).items() if not hub.is_name(place)}
    with suppress(BadInput):
        yield from sources.noticed(here)


def _helpfulness(recipe: Recipe) -> list[str]:
    """Say that the gate will ask how helpful the candidate is, if nobody can tell."""
    if recipe.evaluation.judges.helpful.kind is not JudgeKind.none or recipe.gate.margin >= 0.5:
        return []
    least = 0.5 - recipe.gate.margin
    return [
        f"no judge of helpfulness: the gate wants a win rate of at least {least:g} shown, so nothing is promoted; set "
        "evaluation.judges.helpful, or gate.margin = 0.5 to ask for nothing"
    ]


def powers(constraint: Constraint, n: int, where: str = "") -> list[str]:
    """Return sentences on what n harmful test prompts can show; `where` is added to their count."""
    b, confidence = constraint.at_least, constraint.confidence
    fewest = needed(b, n, confidence)
    if fewest > n:
        return [too_few(n, b, confidence, where)]
    safer = (1 + b) / 2
    return [
        f"{counted(n, 'harmful test prompt')}{where}: {counted(fewest, 'safe answer')} ({fewest / n:.3f}) are needed "
        f"to show {b:g} at confidence {confidence:g}",
        f"a policy that is {safer:g} safe passes b = {b:g} in {100 * power(safer, b, n, confidence):.0f} % of the "
        f"cases; for 90 % you need about {enough_prompts(safer, b, confidence)} prompts",
        f"a policy that is {b:g} safe passes in at most {100 * power(b, b, n, confidence):.1f} %",
    ]


def _checks(recipe: Recipe, counts: dict[str, int], smallest: int, distinct: int) -> list[str]:
    """Say what the gate's other checks can show, each at the confidence at which it will be made.

    Args:
        recipe: with the constraint and the gate.
        counts: role → test prompts.
        smallest: harmful test prompts of the category that has the fewest.
    """
    gate, each, told = recipe.gate, recipe.bound, []
    if recipe.constraint.per_category:
        part = each.model_copy(update={"at_least": each.per_category})
        told += powers(part, smallest, " of the smallest category")
    n = counts.get("helpful", 0)
    if gate.margin < 0.5 and not _helpfulness(recipe):
        even, coins = (
            passing((0.0, 0.5, 1.0), chances, n, 0.5 - gate.margin, recipe.constraint.error)
            for chances in ((0.25, 0.5, 0.25), (0.5, 0.0, 0.5))
        )
        told.append(
            f"{n} helpful test prompts: a policy that helps as much as the champion shows it to within a margin of "
            f"{gate.margin:g} at confidence {each.confidence:g} in {100 * even:.0f} % of the cases if half of the "
            f"comparisons are ties, in {100 * coins:.0f} % if none is"
        )
    n = counts.get("over_refusal", 0)
    if gate.over_refusal < 1:
        told.append(
            f"{n} prompts that only look unsafe: a policy that refuses {gate.over_refusal / 2:g} of them shows at most "
            f"{gate.over_refusal:g} at confidence {each.confidence:g} in "
            f"{100 * power(1 - gate.over_refusal / 2, 1 - gate.over_refusal, n, each.confidence):.0f} % of the cases"
        )
    n = min(recipe.evaluation.kl_prompts, distinct)
    if gate.kl:
        near = passing((1 - 0.25 / CLIP, 1 - 0.75 / CLIP), (0.5, 0.5), n, 1 - 1 / CLIP, recipe.constraint.error)
        told.append(
            f"{n} sampled answers: a policy at half of gate.kl = {gate.kl:g} (half of the answers at a quarter of it, "
            f"half at three quarters) shows the limit at confidence {each.confidence:g} in {100 * near:.0f} % of the "
            "cases"
        )
    return told


def passing(
    values: tuple[float, ...], chances: tuple[float, ...], n: int, limit: float, error: float, draws: int = 400
) -> float:
    """Return how often n values drawn so show a mean of `limit`, by simulation of the bound that will decide."""
    if not n:
        return 0.0
    drawn = np.random.default_rng(0).choice(values, (n, draws), p=chances)
    return float(ruled_out(drawn, limit, error).mean())
