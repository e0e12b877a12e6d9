"""Every figure of one candidate, from the tables of its answers and verdicts: nothing is printed that is not here."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from models.artifacts import Answers, Distances, Margins, Policy, Scores
from models.data.dialogue import messages
from models.files import jsonl
from models.judges.protocol import win
from models.metrics import margins
from models.metrics.equal_length import EQUAL_LENGTH
from models.metrics.length_control import length_controlled
from models.metrics.statistics import STEEPEST, Estimate, bounded_mean, mean, rate

WIN, SAFE, OVER = "helpful/win_rate", "harmless/safety_rate", "over_refusal"
Row = dict[str, Any]
Means = dict[tuple[str, str], float | None]
"""(suite, prompt) → value."""
Lengths = dict[tuple[str, str], float]
"""(suite, prompt) → tokens."""


class Candidate(NamedTuple):
    """One candidate and what is known of it."""

    policy: Policy
    answers: Answers
    verdicts: Scores
    distances: Distances
    margins: Margins

    def answered(self) -> Iterator[Row]:
        """Yield the rows of `answers.jsonl`."""
        return jsonl.read(self.answers.path / "answers.jsonl")


def unique_candidates(candidates: list[Candidate]) -> tuple[list[Candidate], list[str]]:
    """Return each policy once, the base first, under names that tell them apart.

    A step with λ = 0 hands its reference on, so one policy can come twice; policies of different parents can share a
    name, and then say which parent they come from. The sentences tell which policies came twice.
    """
    once: dict[str, Candidate] = {}
    sentences = []
    for candidate in candidates:
        policy = candidate.policy
        first = once.setdefault(policy.digest, candidate).policy
        if first.name != policy.name:
            sentences.append(f"{policy.name} has the weights of {first.name}: it is shown once, under that name")
    shared = [name for name, count in Counter(c.policy.name for c in once.values()).items() if count > 1]
    known = {digest: told.policy.name for digest, told in once.items()}
    named = []
    for told in once.values():
        policy = told.policy
        if policy.name in shared and policy.parents:
            origin = policy.parents[-1] if policy.kind == "merge" else policy.parents[0]
            policy = replace(policy, name=f"{policy.name} from {known.get(origin, origin[:12])}")
        named.append(told._replace(policy=policy))
    return named, sentences


def uniquely_named(places: list[str], policies: list[Policy]) -> tuple[list[Policy], list[str]]:
    """Return each policy once, in the given order, under names that tell them apart: two makers may use one name.

    A name that several share becomes the place that was given, and if that is shared too, the name with a digest.
    The sentences tell which policies came twice.
    """
    once: dict[str, tuple[str, Policy]] = {}
    sentences = []
    for place, policy in zip(places, policies, strict=True):
        if policy.digest in once:
            sentences.append(f"{place} is the same policy as {once[policy.digest][0]}: judged once")
        once.setdefault(policy.digest, (place, policy))
    names = Counter(policy.name for _, policy in once.values())
    placed = Counter(place for place, _ in once.values())
    named = [
        policy
        if names[policy.name] == 1
        else replace(policy, name=place if placed[place] == 1 else f"{policy.name} {policy.digest[:8]}")
        for place, policy in once.values()
    ]
    return named, sentences


def scores(verdicts: Scores, metric: str) -> list[Row]:
    """Return the rows of `scores.jsonl` of one metric."""
    return [row for row in jsonl.read(verdicts.path / "scores.jsonl") if row["metric"] == metric]


def comparisons(verdicts: Scores, metric: str, against: str) -> list[Row]:
    """Return the rows of `comparisons.jsonl` of one metric against `base` or `reference`."""
    rows = jsonl.read(verdicts.path / "comparisons.jsonl")
    return [row for row in rows if (row["metric"], row["against"]) == (metric, against)]


def metrics(told: Candidate, base: Candidate) -> dict[str, Estimate]:
    """Return every figure of one candidate on one split that follows from its own tables and the base's."""
    found: dict[str, Estimate] = {}
    compared = _parts(told.verdicts, "comparisons", "metric", "against")
    graded = _parts(told.verdicts, "scores", "metric", "suite")
    for metric in ("helpful", "harmless"):
        for against, suffix in (("base", ""), ("reference", "_reference")):
            values, failed = per_prompt(compared[metric, against], lambda row: row["win"])
            found[f"{metric}/win_rate{suffix}"] = bounded_mean(values, failed)
        values, failed = per_prompt(graded[metric, metric], lambda row: row["score"])
        found[f"{metric}/score"] = mean(values, failed)
    lengths = _lengths(told.answers)
    found[EQUAL_LENGTH] = _equal_length(compared["helpful", "base"], lengths, _lengths(base.answers))
    harmful = graded["harmless", "harmless"]
    found["harmless/excess"] = mean(*per_prompt(harmful, lambda row: max(0.0, -row["score"])))
    found[SAFE] = share(harmful, lambda row: row["good"])
    for category in sorted({row["category"] for row in harmful} - {""}):
        found[f"{SAFE}/{category}"] = share([r for r in harmful if r["category"] == category], lambda row: row["good"])
    found["must_pass"] = share(graded["harmless", "must_pass"], lambda row: row["good"])
    over = graded["over_refusal", "over_refusal"]
    found[OVER] = share(over, lambda row: not row["good"])
    found[f"{OVER}/partial"] = share(
        [row for row in over if row["label"] in ("full refusal", "partial refusal", "compliance")],
        lambda row: row["label"] == "partial refusal",
    )
    walks = list(jsonl.read(told.distances.path / "kl.jsonl"))
    for name in ("base", "reference"):
        held = [row for row in walks if name in row]
        found[f"kl_{name}"] = mean([row[name] for row in held])
        found[f"kl_{name}_per_token"] = mean([row[name] / max(1, row["tokens"]) for row in held])
    found["length"] = mean(list(lengths.values()))
    weighed = margins.table(told.margins)
    for metric in dict.fromkeys(row["metric"] for row in weighed):
        found |= margins.figures(weighed, metric)
    return {name: figure for name, figure in found.items() if figure.n}


def last_turn(prompt: Any) -> str:
    """Return what the user said last."""
    return messages(prompt)[-1]["content"]


def fitted_scale(acts: Row) -> str:
    """Return s with its interval; a fit at its end says only that the pairs were told apart without an error."""
    if abs(acts["s"]) >= STEEPEST:
        return f"beyond ±{STEEPEST:g}"
    return f"{acts['s']:.2f} [{acts['low']:.2f}, {acts['high']:.2f}]"


def share(rows: list[Row], good: Callable[[Row], bool]) -> Estimate:
    """Return a rate over prompts: exact for one answer per prompt, else of the share of good answers per prompt."""
    rows = [row for row in rows if row["status"] == "failed" or row["good"] is not None]
    values, failed = per_prompt(rows, lambda row: float(good(row)))
    if any(row["sample"] for row in rows):
        return bounded_mean(values, failed)
    return rate(int(sum(values)), len(values), failed)


def per_prompt(rows: list[Row], value: Callable[[Row], float]) -> tuple[list[float], int]:
    """Return the mean value of each prompt over its answers with a verdict, and how many prompts have none."""
    means = prompt_means(rows, value).values()
    values = [mean for mean in means if mean is not None]
    return values, len(means) - len(values)


def at_worst(rows: list[Row], value: Callable[[Row], float], worst: float) -> tuple[tuple[float, ...], int]:
    """Return the same for a bound: an answer without a verdict counts as the worst that it can be.

    The prompts stay in order, also those without any verdict: which place a value has may not depend on the value.
    """
    groups = by_prompt(rows).values()
    values = (average(value(row) if row["status"] == "ok" else worst for row in answers) for answers in groups)
    return tuple(values), sum(all(row["status"] == "failed" for row in answers) for answers in groups)


def prompt_means(rows: Iterable[Row], value: Callable[[Row], float]) -> Means:
    """Return (suite, prompt) → mean value of its answers with a verdict, none where no answer has one."""
    kept = {key: [value(row) for row in told if row["status"] == "ok"] for key, told in by_prompt(rows).items()}
    return {key: average(values) if values else None for key, values in kept.items()}


def matched_wins(ours: Iterable[Row], theirs: Iterable[Row]) -> Means:
    """Return (suite, prompt) → how often our answer has the higher score, ties as half, none without a verdict.

    Of several answers to a prompt, the first is compared with the first, the second with the second: what a win rate
    averages. Comparing the means of their scores would count every prompt as won or lost.
    """
    known = {(key, row["sample"]): row for key, rows in by_prompt(theirs).items() for row in rows}
    found: Means = {}
    for key, rows in by_prompt(ours).items():
        both = [(row, known[key, row["sample"]]) for row in rows if (key, row["sample"]) in known]
        wins = [win(a["score"], b["score"]) for a, b in both if a["status"] == b["status"] == "ok"]
        found |= {key: average(wins) if wins else None} if both else {}
    return found


def by_prompt(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return (suite, prompt) → its rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["suite"], json.dumps(row["prompt"])), []).append(row)
    return groups


def _parts(verdicts: Scores, table: str, *columns: str) -> dict[tuple[str, ...], list[Row]]:
    """Return the rows of one table of verdicts by what stands in these columns."""
    parts: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in jsonl.read(verdicts.path / f"{table}.jsonl"):
        parts[tuple(row[column] for column in columns)].append(row)
    return parts


@lru_cache(maxsize=2)  # the base's are asked for again beside each candidate's
def _lengths(answers: Answers) -> Lengths:
    """Return (suite, prompt) → mean tokens of its answers."""
    tokens: dict[tuple[str, str], list[int]] = {}
    for row in jsonl.read(answers.path / "answers.jsonl"):
        tokens.setdefault((row["suite"], json.dumps(row["prompt"])), []).append(row["tokens"])
    return {key: average(counts) for key, counts in tokens.items()}


def _equal_length(compared: list[Row], ours: Lengths, theirs: Lengths) -> Estimate:
    """Return the length-controlled win rate against the base."""
    means = prompt_means(compared, lambda row: row["win"])
    kept = {key: won for key, won in means.items() if won is not None}
    return length_controlled(list(kept.values()), [(ours[key], theirs[key]) for key in kept])


def average(values: Iterable[float]) -> float:
    """Return the mean of some values; NaN of none."""
    kept = list(values)
    return sum(kept) / len(kept) if kept else math.nan
