"""Pictures of a run: helpful win rate against safety rate, like the paper's main figure, and the training curves."""

import math
from collections.abc import Sequence
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from models.alignment.methods import CURVE
from models.files import jsonl
from models.metrics.figures import SAFE, WIN
from models.metrics.reported import Figure
from models.recipe import Method
from models.report.sentences import prompts_of
from models.report.tree import CandidateEntry, Report

COLOURS = {"base": "#777777", "step": "#1f77b4", "merge": "#2ca02c"}
FLAT = 0.01
"""Least height of a panel, relative to its values: less would draw the noise of a few updates as a slope."""
PLACES = ((6, 6), (6, -14), (-6, 6), (-6, -14))
"""Where the name of a point may stand, in points from it."""
POINTS = 100
"""Points of one curve: more than a panel is wide would only make the page larger."""
NAMED = 12
"""Curves of one panel with a name of their own, and with their noise: of more, the colours are a scale of λ."""
NATS = ("margin", "chosen", "rejected")
"""Columns of a curve that TRL multiplies by β/λ, and that are shown in nats, as everywhere else."""


class Training(NamedTuple):
    """A trained candidate with its curve: one row per update."""

    candidate: CandidateEntry
    rows: list[dict[str, float]]


def draw(tree: Report, path: Path) -> None:
    """Write the frontier as PNG; nothing where nobody judged both helpfulness and safety."""
    if not _judged(tree):
        return
    figure = _frontier(tree)
    figure.savefig(path, dpi=120)
    _close(figure)


def frontier(tree: Report) -> str:
    """Return the frontier as SVG, or nothing if nobody judged."""
    return _svg(_frontier(tree)) if _judged(tree) else ""


def curves(tree: Report) -> str:
    """Return the curves of every training as SVG, a row of panels per step; nothing if there is none.

    Which columns are shown is said by the step's method (`alignment.methods.CURVE`).
    """
    steps: dict[int, list[Training]] = {}
    for candidate in tree["candidates"]:
        rows = [row for row in jsonl.whole_rows(Path(candidate["path"]) / "progress.jsonl") if "loss" in row]
        if candidate["kind"] == "step" and rows:
            steps.setdefault(candidate["step"], []).append(Training(candidate, rows))
    if not steps:
        return ""
    columns = {step: CURVE[Method(trainings[0].candidate["method"])] for step, trainings in steps.items()}
    widest = max(map(len, columns.values()))
    figure, axes = _pyplot().subplots(len(steps), widest, figsize=(11, 2.7 * len(steps)), squeeze=False)
    for panels, (step, trainings) in zip(axes, sorted(steps.items()), strict=True):
        trainings.sort(key=lambda training: training.candidate["lambda"])
        for axis, (key, title) in zip(panels, columns[step].items(), strict=False):
            _draw_curves(axis, trainings, key)
            axis.set_title(f"step {step}, {trainings[0].candidate['metric']}: {title}", fontsize=10)
            axis.set_xlabel("update", fontsize=9)
            axis.grid(alpha=0.2)
            _readable(axis)
        # steps of different methods may have different numbers of curves
        for axis in panels[len(columns[step]) :]:
            axis.set_axis_off()
        panels[-1].legend(
            *panels[0].get_legend_handles_labels(),
            frameon=False,
            fontsize=8,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
        )
    figure.tight_layout()
    return _svg(figure)


def _draw_curves(axis: Any, trainings: list[Training], key: str) -> None:
    """Draw one column of each training of a step, smoothed, the largest λ in the lightest colour."""
    few = len(trainings) <= NAMED
    for i, training in enumerate(trainings):
        points = _points(training, key)
        if not points:
            continue
        shade = _pyplot().get_cmap("viridis")(i / max(1, len(trainings) - 1) * 0.85)
        x, y = zip(*points, strict=True)
        if few:
            axis.plot(_thin(x), _thin(y), color=shade, linewidth=0.7, alpha=0.3)
        name = f"λ={training.candidate['lambda']:g}" if few or i in _spread(len(trainings)) else "_"
        axis.plot(_thin(x), _thin(_smooth(y)), color=shade, linewidth=1.6 if few else 1, label=name)


def _frontier(tree: Report) -> Any:
    """Draw helpful win rate against safety rate, with intervals, λ and q labelled (the paper's Figure 2)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.5))
    points = _judged(tree)
    for line in (_chain(points, "step"), _chain(points, "merge")):
        axes.plot([_at(c, SAFE) for c in line], [_at(c, WIN) for c in line], color="#bbbbbb", linewidth=1, zorder=1)
    for candidate in points:
        safe, win = candidate["metrics"][SAFE], candidate["metrics"][WIN]
        axes.errorbar(
            _at(candidate, SAFE), _at(candidate, WIN), xerr=_reach(safe), yerr=_reach(win),
            fmt="o", color=COLOURS[candidate["kind"]], ecolor=COLOURS[candidate["kind"]] + "55", markersize=6, zorder=2,
        )  # fmt: skip
    if tree["chosen"] and (chosen := [c for c in points if c["name"] == tree["chosen"]["candidate"]]):
        axes.plot(
            _at(chosen[0], SAFE), _at(chosen[0], WIN), "o", markersize=14, markerfacecolor="none",
            markeredgecolor="#d62728", markeredgewidth=1.8, label="chosen",
        )  # fmt: skip
    bound = tree["constraints"][0]["at_least"]
    axes.axvline(bound, color="#d62728", linestyle="--", linewidth=1, label=f"constraint b = {bound:g}")
    axes.set_xlabel("safety rate on harmful prompts")
    axes.set_ylabel("helpful win rate against the base")
    axes.set_title(f"{tree['recipe']['name']}: helpful against harmless ({prompts_of(tree)}, 95 % intervals)")
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    # names come last: which of them overlap depends on the final size of the axes
    _name(axes, points, (tree["chosen"] or {"candidate": ""})["candidate"])
    return figure


def _name(axes: Any, points: list[CandidateEntry], chosen: str) -> None:
    """Write names beside the points: the chosen one's first, and of the others those for which there is room."""
    from matplotlib.transforms import Bbox

    dots = axes.transData.transform([(_at(c, SAFE), _at(c, WIN)) for c in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in dots]
    renderer = axes.figure.canvas.get_renderer()
    ends = [c for kind in ("step", "merge") for c in _chain(points, kind)[:2] + _chain(points, kind)[-1:]]
    first = {chosen, *(c["name"] for c in points if c["kind"] == "base"), *(c["name"] for c in ends)}
    for candidate in sorted(points, key=lambda c: (c["name"] != chosen, c["name"] not in first)):
        label = candidate["name"].removeprefix("harmless ").removeprefix("merge ")
        point = (_at(candidate, SAFE), _at(candidate, WIN))
        below = candidate["kind"] == "merge"  # names of merges stand below their line, others above the line of λ
        for place in sorted(PLACES, key=lambda place: (place[1] > 0) is below):
            text = axes.annotate(
                label, point, textcoords="offset points", xytext=place, fontsize=9,
                ha="left" if place[0] > 0 else "right",
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            if axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and not any(map(box.overlaps, taken)):
                taken.append(box)
                break
            text.remove()
        else:
            axes.set_xlabel("safety rate on harmful prompts (points without a name: see the table of candidates)")


def _readable(axis: Any) -> None:
    """Number updates in whole numbers, and a curve that hardly moves by its values, not by an offset to one of them."""
    axis.locator_params(axis="x", integer=True)
    low, high = axis.get_ylim()
    middle = (low + high) / 2
    least = FLAT * max(1.0, abs(middle))
    if high - low < least:
        axis.set_ylim(middle - least / 2, middle + least / 2)
    axis.ticklabel_format(axis="y", useOffset=False)


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the mean of each value and those near it, a fifteenth of the curve to either side at most."""
    reach = max(1, len(values) // 15)
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[last] - sums[first]) / (last - first) for first, last in ends]


def _thin(values: Sequence[float]) -> Sequence[float]:
    """Return about POINTS of the values, evenly spread, the last one with them."""
    return values[:: -1 - (len(values) - 1) // POINTS][::-1]


def _spread(count: int) -> set[int]:
    """Return NAMED of so many places, evenly spread, with the first and the last."""
    return {round(i * (count - 1) / (NAMED - 1)) for i in range(NAMED)}


def _points(training: Training, key: str) -> list[tuple[int, float]]:
    """Return (update, value) of one column of a training."""
    unit = training.candidate["beta_over_lambda"] if key in NATS else 1.0
    return [(int(row["done"]), row[key] / unit) for row in training.rows if key in row]


def _judged(tree: Report) -> list[CandidateEntry]:
    """Return the candidates that were judged for both helpfulness and safety."""
    return [c for c in tree["candidates"] if WIN in c["metrics"] and SAFE in c["metrics"]]


def _chain(points: list[CandidateEntry], kind: str) -> list[CandidateEntry]:
    """Return the points that one line joins: λ values from the reward policy on, or merges between their parents."""
    steps = [c for c in points if c["kind"] == "step"]
    if not steps:
        return []
    last = max(c["step"] for c in steps)
    trained = sorted((c for c in steps if c["step"] == last), key=lambda c: c["lambda"])
    start = [c for c in steps if c["step"] == last - 1][:1]
    if kind == "step":
        return start + trained
    merged = sorted((c for c in points if c["kind"] == "merge"), key=lambda c: c["merge_weight"] or 0.0)
    return start + merged + trained[-1:] if merged else []


def _at(candidate: CandidateEntry, metric: str) -> float:
    value = candidate["metrics"][metric]["value"]
    return math.nan if value is None else value


def _reach(figure: Figure) -> list[list[float]]:
    """Return how far the interval reaches below and above the value, as matplotlib wants it."""
    value, low, high = (math.nan if end is None else end for end in (figure["value"], figure["low"], figure["high"]))
    return [[value - low], [high - value]]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "sacpo", "text.parse_math": False}
    from matplotlib import pyplot

    return pyplot


def _svg(figure: Any) -> str:
    text = StringIO()
    # a date or a version of matplotlib in the file would make equal reports differ
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    _close(figure)
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def _close(figure: Any) -> None:
    _pyplot().close(figure)
