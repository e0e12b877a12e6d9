"""Bradley–Terry ratings: by hand, against evalica, free of order, anchored by a shift."""

import math
from pathlib import Path

import evalica
import numpy as np
import pytest

from models.artifacts import Policy, Scores
from models.files import jsonl
from models.metrics.candidate import Candidate
from models.metrics.ratings import BASE, Played, matches, ratings


def expected(ours: float, theirs: float) -> float:
    """Return the expected score of one rating against another (Elo 1978); it depends on their difference only."""
    return 1 / (1 + 10 ** ((theirs - ours) / 400))


def played(wins: dict[tuple[str, str], tuple[int, int]]) -> Played:
    """(ours, theirs) → (won, lost); no prompt was asked of two pairs."""
    size, first = sum(map(sum, wins.values())), 0
    results = {}
    for pair, (won, lost) in wins.items():
        results[pair] = np.full(size, math.nan)
        results[pair][first : first + won] = 1
        results[pair][first + won : first + won + lost] = 0
        first += won + lost
    return results


def test_two_candidates_by_hand() -> None:
    """30 of 40 won, and one tie with the base: the odds are 30.5 to 10.5."""
    estimates = ratings(played({("a", "base"): (30, 10)}), "base")
    assert estimates["base"].value == BASE and estimates["base"].low == estimates["base"].high == BASE
    assert estimates["a"].value == pytest.approx(BASE + 400 * math.log10(30.5 / 10.5), abs=1e-3)
    assert expected(estimates["a"].value, BASE) == pytest.approx(30.5 / 41, abs=1e-6)
    assert estimates["a"].low < estimates["a"].value < estimates["a"].high and estimates["a"].n == 40


def test_the_order_of_comparisons_and_of_names_changes_nothing() -> None:
    matches = played({("a", "base"): (30, 10), ("b", "a"): (12, 28), ("base", "b"): (15, 25)})
    estimates = ratings(matches, "base", resamples=2)
    back = ratings({pair: matches[pair][::-1] for pair in reversed(matches)}, "base", resamples=2)
    turned = ratings({(b, a): 1 - wins for (a, b), wins in matches.items()}, "base", resamples=2)
    for name in estimates:
        assert estimates[name].value == pytest.approx(back[name].value, abs=1e-4)
        assert estimates[name].value == pytest.approx(turned[name].value, abs=1e-4)


def test_random_tournaments_agree_with_evalica() -> None:
    draw = np.random.default_rng(0)
    names = ["base", "a", "b", "c"]
    strength = dict(zip(names, draw.normal(0, 1, 4), strict=True))
    matches: Played = {}
    xs, ys, outcome = [], [], []
    for i in range(600):
        a, b = map(str, draw.choice(names, 2, replace=False))
        won = draw.random() < 1 / (1 + math.exp(strength[b] - strength[a]))
        matches.setdefault((a, b), np.full(600, math.nan))[i] = won
        xs, ys = [*xs, a], [*ys, b]
        outcome.append(evalica.Winner.X if won else evalica.Winner.Y)
    xs, ys, outcome = [*xs, *names[1:]], [*ys, *["base"] * 3], [*outcome, *[evalica.Winner.Draw] * 3]
    there = evalica.bradley_terry(xs, ys, outcome, tolerance=1e-9, limit=10_000).scores
    estimates = ratings(matches, "base", resamples=50)
    for name in names:
        assert estimates[name].value == pytest.approx(BASE + 400 * math.log10(there[name] / there["base"]), abs=1e-3)
        truth = BASE + 400 * (strength[name] - strength["base"]) / math.log(10)
        assert estimates[name].low - 30 < truth < estimates[name].high + 30


def test_one_that_wins_everything_has_a_finite_rating() -> None:
    estimates = ratings(played({("a", "base"): (50, 0)}), "base")
    assert math.isfinite(estimates["a"].value) and estimates["a"].value > BASE + 500


def test_with_several_answers_the_rating_says_what_the_win_rate_says(tmp_path: Path) -> None:
    """Each prompt is won by two of three answers and lost by far in the third: by mean scores all would be lost."""
    scores = {"base": [0.0, 0.0, 0.0], "a": [1.0, 1.0, -9.0]}
    candidates = []
    for name, values in scores.items():
        folder = tmp_path / name
        folder.mkdir()
        named = [
            {"metric": "helpful", "suite": "helpful", "prompt": f"{i}", "sample": k}
            | {"category": "", "status": "ok", "good": None, "label": ""}
            for i in range(60)
            for k in range(3)
        ]
        jsonl.write(folder / "scores.jsonl", ({**row, "score": values[row["sample"]]} for row in named))
        policy = Policy(path=folder, digest=name, name=name, kind="base")
        verdicts = Scores(path=folder, digest=name, policy=name, split="test", judges={}, failed=0)
        candidates.append(Candidate(policy, None, verdicts, None, None))  # type: ignore[arg-type]
    played = matches(candidates, "helpful")
    wins = 1 - played["base", "a"]
    assert np.mean(wins) == pytest.approx(2 / 3)
    assert expected(ratings(played, "base")["a"].value, BASE) == pytest.approx(2 / 3, abs=0.01)


def test_only_differences_mean_something() -> None:
    assert expected(1200, 1000) == expected(700, 500) == pytest.approx(1 - expected(1000, 1200))
    assert expected(5, 5) == 0.5


def test_nothing_played_is_no_rating() -> None:
    assert ratings({}, "base") == {}
