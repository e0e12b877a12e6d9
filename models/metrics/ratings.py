"""Bradley–Terry ratings of all candidates, on the scale of Elo, the base at 1000.

The fit is evalica's; it does not depend on the order of the comparisons. Only differences of ratings mean something:
shifting all of them changes no expected score.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import evalica
import numpy as np

from models.metrics.candidate import Candidate
from models.metrics.figures import prompt_means
from models.metrics.statistics import Estimate

BASE = 1000.0
AT_ONCE = 32
"""Pairs of candidates whose comparisons are resampled together; all pairs of 30 candidates would fill the memory."""
Answer = tuple[str, str, int]
"""Suite, prompt (as JSON) and sample: the answers of two candidates with the same three are compared."""
Played = dict[tuple[str, str], np.ndarray]
"""(first, second candidate) → array (prompts,): 1, ½ or 0 for the first, or between where a prompt has several answers;
NaN where the two were not compared. The prompts are the same in all arrays."""


def matches(candidates: Sequence[Candidate], metric: str) -> Played:
    """Return every comparison there is: of all pairs by their scores, or those that a comparing judge has made."""
    places: dict[Answer, int] = {}  # answer → its place in the arrays of all candidates
    scored = {c.policy.name: _scored(c, metric, places) for c in candidates}
    if all(len(values) for _, values in scored.values()):
        return _by_score(scored, list(places))
    base, names = candidates[0].policy.name, {c.policy.digest: c.policy.name for c in candidates}
    compared = {}
    for candidate in candidates[1:]:
        policy = candidate.policy
        # A merge has the parents (safe, reward); its reference is the policy before the safety step, the last of them.
        parents = policy.parents[-1:] if policy.kind == "merge" else policy.parents[:1]
        parent = names.get(parents[0], "") if parents else ""
        rivals = {"base": base} | ({"reference": parent} if parent not in ("", base) else {})
        for against, rival in rivals.items():
            compared[policy.name, rival] = prompt_means(candidate.compared(metric, against), lambda row: row.win)
    prompts = list(dict.fromkeys(prompt for means in compared.values() for prompt in means))
    return {pair: np.array([means.get(prompt) for prompt in prompts], dtype=float) for pair, means in compared.items()}


def _scored(candidate: Candidate, metric: str, places: dict[Answer, int]) -> tuple[list[int], list[float]]:
    """Return the places of a candidate's answers, and their scores, NaN without one; `places` grows by new answers."""
    rows = candidate.scored(metric, metric)
    return [places.setdefault((r.suite, r.key, r.sample), len(places)) for r in rows], [row.score for row in rows]


def _by_score(scored: dict[str, tuple[list[int], list[float]]], answers: list[Answer]) -> Played:
    """Compare all candidates by their scores: of several answers the first with the first (`figures.matched_wins`)."""
    aligned = {name: np.full(len(answers), math.nan) for name in scored}
    for name, (places, values) in scored.items():
        aligned[name][places] = values
    numbers: dict[tuple[str, str], int] = {}  # (suite, prompt) → the number of the prompt
    prompt = np.array([numbers.setdefault(answer[:2], len(numbers)) for answer in answers])
    return {(a, b): _means(_wins(aligned[a], aligned[b]), prompt, len(numbers)) for a, b in combinations(scored, 2)}


def _wins(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return 1, ½ or 0 for the first score of each answer (`protocol.win`, for arrays), NaN without both scores."""
    judged = ~(np.isnan(first) | np.isnan(second))
    return np.where(judged, 0.5 + 0.5 * (1.0 * (first > second) - (first < second)), math.nan)


def _means(values: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """Return the mean of each group without the NaNs, NaN where there is nothing else."""
    valid = ~np.isnan(values)
    sums, counts = np.bincount(group[valid], values[valid], size), np.bincount(group[valid], minlength=size)
    return np.where(counts, sums / np.maximum(counts, 1), math.nan)


def ratings(
    played: Mapping[tuple[str, str], np.ndarray],
    base: str,
    confidence: float = 0.95,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return each candidate's rating, with an interval that resamples prompts with all their comparisons.

    One imaginary tie with the base keeps the rating of a candidate finite that won, or lost, everything. The interval
    describes, and decides nothing: at 0.95 it missed the truth in 0 to 2 of 40 draws of 20 to 200 prompts.
    """
    wins_of = {pair: wins for pair, wins in played.items() if not np.isnan(wins).all()}
    if not wins_of:
        return {}
    names, pairs = list(dict.fromkeys([base, *(name for pair in wins_of for name in pair)])), list(wins_of)
    prompts = _prompts(list(wins_of.values()))
    size = len(prompts)
    drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), resamples)
    weights = np.concatenate([np.ones((1, size)), drawn])  # each prompt once, then the resamples
    won, lost = np.zeros((2, len(weights), len(pairs)))
    for i in range(0, len(pairs), AT_ONCE):
        wins = np.stack([wins_of[pair][prompts] for pair in pairs[i : i + AT_ONCE]], axis=1)
        won[:, i : i + AT_ONCE] = weights @ np.nan_to_num(wins)
        # A NaN is 0 in both sums: what was not compared was neither won nor lost.
        lost[:, i : i + AT_ONCE] = weights @ np.nan_to_num(1 - wins)
    values, *spread = (_fit(names, pairs, *sums) for sums in zip(won, lost, strict=True))
    low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    method = "Bradley–Terry, bootstrap over prompts; describes"
    return {
        name: Estimate(float(values[i]), float(low[i]), float(high[i]), size, 0, method) for i, name in enumerate(names)
    }


def _prompts(played: Sequence[np.ndarray]) -> np.ndarray:
    """Return the places of the prompts with any comparison, in the order in which the pairs first reach them.

    The order decides which column of the drawn weights a prompt gets, and so the digits of the interval.
    """
    seen, places = np.zeros(len(played[0]), dtype=bool), []
    for wins in played:
        new = ~np.isnan(wins) & ~seen
        seen |= new
        places.append(np.flatnonzero(new))
    return np.concatenate(places)


def _fit(names: list[str], pairs: list[tuple[str, str]], won: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Return ratings in the order of `names`, the first of which stands at BASE.

    Args:
        won, lost: (pairs,), weighted counts of prompts, with ties as half in both.
    """
    # Each candidate but the base ties once with the base: the last len(names) − 1 entries.
    xs = [a for a, _ in pairs] * 2 + names[1:]
    ys = [b for _, b in pairs] * 2 + names[:1] * (len(names) - 1)
    outcomes = [evalica.Winner.X] * len(pairs) + [evalica.Winner.Y] * len(pairs)
    outcomes += [evalica.Winner.Draw] * (len(names) - 1)
    weights = [*won, *lost, *[1.0] * (len(names) - 1)]
    strengths = evalica.bradley_terry(xs, ys, outcomes, weights=weights, tolerance=1e-9, limit=10_000).scores
    points: np.ndarray = np.array([400 * math.log10(strengths[name]) for name in names])
    shifted: np.ndarray = points - points[0] + BASE
    return shifted
