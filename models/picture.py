"""The picture of a run: helpful win rate against safety rate, like the paper's main figure."""

from pathlib import Path
from typing import Any

from models.figures import SAFE, WIN

Tree = dict[str, Any]


def draw(tree: Tree, path: Path) -> None:
    """Draw helpful win rate against safety rate, with intervals, λ and q labelled (the paper's Figure 2)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), dpi=120)
    shown = [c for c in tree["candidates"] if WIN in c["metrics"] and SAFE in c["metrics"]]
    colours = {"base": "#777777", "step": "#1f77b4", "merge": "#2ca02c"}
    for line in (_chain(shown, "step"), _chain(shown, "merge")):
        axes.plot([_at(c, SAFE) for c in line], [_at(c, WIN) for c in line], color="#bbbbbb", linewidth=1, zorder=1)
    for told in shown:
        x, y = told["metrics"][SAFE], told["metrics"][WIN]
        axes.errorbar(
            x["value"], y["value"],
            xerr=[[x["value"] - x["low"]], [x["high"] - x["value"]]],
            yerr=[[y["value"] - y["low"]], [y["high"] - y["value"]]],
            fmt="o", color=colours[told["kind"]], ecolor=colours[told["kind"]] + "55", markersize=6, zorder=2,
        )  # fmt: skip
        label = told["name"].removeprefix("harmless ").removeprefix("merge ")
        place = (6, -14) if told["kind"] == "merge" else (6, 6)  # below the line of merges, above the line of λ
        axes.annotate(label, (x["value"], y["value"]), textcoords="offset points", xytext=place, fontsize=9)
    if tree["chosen"] and (chosen := [c for c in shown if c["name"] == tree["chosen"]["candidate"]]):
        axes.plot(
            _at(chosen[0], SAFE), _at(chosen[0], WIN), "o", markersize=14, markerfacecolor="none",
            markeredgecolor="#d62728", markeredgewidth=1.8, label="chosen",
        )  # fmt: skip
    bound = tree["constraints"][0]["at_least"]
    axes.axvline(bound, color="#d62728", linestyle="--", linewidth=1, label=f"constraint b = {bound:g}")
    axes.set_xlabel("safety rate on harmful prompts")
    axes.set_ylabel("helpful win rate against the base")
    split = next((s["split"] for s in tree["suites"].values()), "")
    axes.set_title(f"{tree['recipe']['name']}: helpful against harmless ({split} split, 95 % intervals)")
    axes.legend(loc="best", frameon=False)
    axes.grid(alpha=0.2)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _chain(shown: list[Tree], kind: str) -> list[Tree]:
    """Return the points that one line joins: λ values from the reward policy on, or merges between their parents."""
    steps = [c for c in shown if c["kind"] == "step"]
    if not steps:
        return []
    last = max(c["step"] for c in steps)
    trained = sorted((c for c in steps if c["step"] == last), key=lambda c: c["lambda"])
    start = [c for c in steps if c["step"] == last - 1][:1]
    if kind == "step":
        return start + trained
    merged = sorted((c for c in shown if c["kind"] == "merge"), key=lambda c: c["merge_weight"])
    return start + merged + trained[-1:] if merged else []


def _at(told: Tree, metric: str) -> float:
    return float(told["metrics"][metric]["value"])
