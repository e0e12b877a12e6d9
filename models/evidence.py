"""What the test prompts of a recipe can prove, told before anything is trained: bounds, power, too few prompts."""

from collections import Counter

import numpy as np

from models.artifacts import Sources
from models.data import suites
from models.files import jsonl
from models.gate.gate import CLIP, too_few
from models.metrics.statistics import enough_prompts, needed, power, ruled_out
from models.recipe import Constraint, JudgeKind, Recipe
from models.words import counted


def evidence(recipe: Recipe, origin: Sources | None) -> list[str]:
    """Say what the test prompts can prove, or what is missing for any proof."""
    if recipe.evaluation.judges.harmless.kind is JudgeKind.none:
        return [
            "no judge of harmlessness: the run ends undecided, and its policy is registered without an alias; set "
            "evaluation.judges.harmless, for instance to one of the open models in docs/evidence.md (`Who judges`)"
        ]
    files = origin.suites("test") if origin else {}
    if "harmless" not in files:
        return [
            "no suite of harmful prompts: the constraint cannot be tested; name a file of them in "
            "evaluation.suites.harmless"
        ]
    prompts = {role: list(jsonl.read(path)) for role, path in files.items()}
    categories = Counter(row.get("category", "") for row in prompts["harmless"])
    counts = {role: len(rows) for role, rows in prompts.items()}
    smallest = min(categories.values(), default=0)
    # One answer is sampled per prompt for the KL, also where a prompt stands in several suites; incidents have none.
    sampled = [row for role, rows in prompts.items() if role != suites.MUST_PASS for row in rows]
    distinct = {suites.prompt_digest(row["prompt"]) for row in sampled}
    checks = other_checks(recipe, counts, smallest, len(distinct))
    return [*unjudged_helpfulness(recipe), *powers(recipe.bound, counts["harmless"]), *checks]


def unjudged_helpfulness(recipe: Recipe) -> list[str]:
    """Say that the gate will ask how helpful the candidate is, where no judge tells it; nothing otherwise."""
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


def other_checks(recipe: Recipe, counts: dict[str, int], smallest: int, distinct: int) -> list[str]:
    """Say what the gate's checks beside the constraint can show, each at the confidence at which it will be made.

    Args:
        recipe: with the constraint and the gate.
        counts: role → test prompts.
        smallest: harmful test prompts of the category that has the fewest.
        distinct: different test prompts that have a sampled answer.
    """
    gate, bound, sentences = recipe.gate, recipe.bound, []
    if bound.per_category:
        of_category = bound.model_copy(update={"at_least": bound.per_category})
        sentences += powers(of_category, smallest, " of the smallest category")
    n = counts.get("helpful", 0)
    if gate.margin < 0.5 and not unjudged_helpfulness(recipe):
        even, coins = (
            passing((0.0, 0.5, 1.0), chances, n, 0.5 - gate.margin, recipe.constraint.error)
            for chances in ((0.25, 0.5, 0.25), (0.5, 0.0, 0.5))
        )
        sentences.append(
            f"{n} helpful test prompts: a policy that helps as much as the champion shows it to within a margin of "
            f"{gate.margin:g} at confidence {bound.confidence:g} in {100 * even:.0f} % of the cases if half of the "
            f"comparisons are ties, in {100 * coins:.0f} % if none is"
        )
    n = counts.get("over_refusal", 0)
    if gate.over_refusal < 1:
        sentences.append(
            f"{n} prompts that only look unsafe: a policy that refuses {gate.over_refusal / 2:g} of them shows at most "
            f"{gate.over_refusal:g} at confidence {bound.confidence:g} in "
            f"{100 * power(1 - gate.over_refusal / 2, 1 - gate.over_refusal, n, bound.confidence):.0f} % of the cases"
        )
    n = min(recipe.evaluation.kl_prompts, distinct)
    if gate.kl:
        # The gate bounds the mean of 1 − min(KL, CLIP·limit) / (CLIP·limit), in [0, 1]: it must reach 1 − 1/CLIP.
        near = passing((1 - 0.25 / CLIP, 1 - 0.75 / CLIP), (0.5, 0.5), n, 1 - 1 / CLIP, recipe.constraint.error)
        sentences.append(
            f"{n} sampled answers: a policy at half of gate.kl = {gate.kl:g} (half of the answers at a quarter of it, "
            f"half at three quarters) shows the limit at confidence {bound.confidence:g} in {100 * near:.0f} % of the "
            "cases"
        )
    return sentences


def passing(
    values: tuple[float, ...], chances: tuple[float, ...], n: int, limit: float, error: float, draws: int = 400
) -> float:
    """Return how often n values, drawn with these chances, show a mean above `limit`.

    It is simulated with the bound that will decide, `ruled_out` at this error, in so many draws.
    """
    if not n:
        return 0.0
    drawn = np.random.default_rng(0).choice(values, (n, draws), p=chances)
    return float(ruled_out(drawn, limit, error).mean())
