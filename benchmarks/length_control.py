"""Our length-controlled win rates beside AlpacaEval 2's published ones.

    python benchmarks/length_control.py alpaca_lc.csv [--choose]

The file has one row per model and prompt: model, published_lc and published_win_rate (%), prompt, won (0 to 1), length
and baseline_length (characters). Prints a table of models and what the aims are about: mean error, rank correlation,
and how often the 95 % interval holds the published value. With `--choose` the prior of the slope is chosen again, from
a grid, for each model on the others only (leaving one out), and the error is that of models which chose nothing.
"""

import argparse
import time
from collections import Counter
from itertools import product

import numpy as np
import pandas as pd
from scipy import stats

from models.metrics.length_control import LengthControlled, Normal, length_controlled

MEANS, SDS = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3), (0.05, 0.1, 0.15, 0.2, 0.3)
GRID = [Normal(mean, sd) for mean, sd in product(MEANS, SDS)]
Model = tuple[list[float], list[tuple[float, float]]]
"""Wins, and both lengths."""


def main() -> None:
    """Read the file, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--choose", action="store_true")
    asked = parser.parse_args()
    rows = pd.read_csv(asked.file)
    models = {str(name): _model(own) for name, own in rows.groupby("model")}
    published = rows.groupby("model").published_lc.first() / 100
    started = time.process_time()
    ours = {name: length_controlled(*model) for name, model in models.items()}
    seconds = (time.process_time() - started) / len(models)
    _table(ours, models, published)
    _aims(ours, models, published)
    print(f"- {seconds:.3f} CPU seconds per fit with its interval")
    if asked.choose:
        _choose(list(models.values()), published.to_numpy())


def _model(rows: pd.DataFrame) -> Model:
    return rows.won.tolist(), list(zip(rows.length, rows.baseline_length, strict=True))


def _table(ours: dict[str, LengthControlled], models: dict[str, Model], published: "pd.Series[float]") -> None:
    print("| model | raw | ours | 95 % interval | published | error | overlap | leans |")
    print("|---|---|---|---|---|---|---|---|")
    for name, estimate in ours.items():
        raw = np.mean(models[name][0])
        cells = [f"{100 * raw:.1f}", f"{100 * estimate.value:.1f}"]
        cells += [f"{100 * estimate.low:.1f} – {100 * estimate.high:.1f}"]
        cells += [f"{100 * published[name]:.1f}", f"{100 * (estimate.value - published[name]):+.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {estimate.overlap:.2f} | {'yes' if estimate.leans else 'no'} |")


def _aims(ours: dict[str, LengthControlled], models: dict[str, Model], published: "pd.Series[float]") -> None:
    truth = published.to_numpy()
    estimates = ours.values()
    value, low, high = (np.array([getattr(one, end) for one in estimates]) for end in ("value", "low", "high"))
    raw = np.array([np.mean(won) for won, _ in models.values()])
    held = (low <= truth) & (truth <= high)
    for title, figure in (("ours", value), ("raw win rate", raw)):
        error, rank = 100 * np.abs(figure - truth), stats.spearmanr(figure, truth).statistic
        print(f"- {title}: mean |error| {error.mean():.2f} points, at most {error.max():.1f}; Spearman {rank:.3f}")
    print(f"- the interval holds the published value for {held.mean():.2f} of {len(truth)} models", end="; ")
    print(f"mean width {100 * (high - low).mean():.1f} points")


def _choose(models: list[Model], truth: np.ndarray) -> None:
    """Choose the prior for each model on the others only, and print what that gave."""
    errors = np.array([[_error(model, t, prior) for model, t in zip(models, truth, strict=True)] for prior in GRID])
    chosen: Counter[Normal] = Counter()
    left_out = []
    for i in range(len(truth)):
        best = int(np.delete(errors, i, axis=1).mean(axis=1).argmin())
        chosen[GRID[best]] += 1
        left_out.append(errors[best, i])
    print(f"- leaving one out: mean |error| {np.mean(left_out):.2f} points; chosen: ", end="")
    print(", ".join(f"N({prior.mean:g}, {prior.sd:g}) {count} times" for prior, count in chosen.most_common()))


def _error(model: Model, truth: float, prior: Normal) -> float:
    """Return the absolute error in points that our fit has with another prior."""
    return 100 * abs(length_controlled(*model, slope=prior).value - truth)


if __name__ == "__main__":
    main()
