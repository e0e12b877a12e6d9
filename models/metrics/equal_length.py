"""How a win rate at equal length is printed: never without its overlap, and marked where it leans on a convention."""

from typing import Any

from models.metrics.length_control import LEANS, OVERLAP

EQUAL_LENGTH = "helpful/win_rate_equal_length"
MARK = (
    f"Below an overlap of {OVERLAP:g} (the share of prompts on which the usually shorter side is the longer one) a win "
    f"rate at equal length {LEANS}, a convention: it neither orders nor gates anything."
)
Tree = dict[str, Any]
"""A report, or a figure in it, as JSON holds it."""


def support(figure: Tree) -> str:
    """Return what a figure at equal length stands on, in words; nothing for other figures."""
    if "overlap" not in figure:
        return ""
    return f"overlap {figure['overlap']:.2f}{f', {LEANS}' if figure['leans'] else ''}"


def table(tree: Tree) -> list[list[str]]:
    """Return the figures of all candidates as rows of text, header first; empty if no candidate has this figure."""
    rows = [
        [candidate["name"], f"{figure['value']:.3f} [{figure['low']:.3f}, {figure['high']:.3f}]", support(figure)]
        for candidate in tree["candidates"]
        if (figure := candidate["metrics"].get(EQUAL_LENGTH))
    ]
    return [["candidate", "helpful win rate at equal length", "stands on"], *rows] if rows else []


def unmarked(metrics: dict[str, Tree]) -> dict[str, float | None]:
    """Return each figure's value for MLflow, which has no marks and sorts runs by any figure.

    A figure that leans on a convention is therefore left out. The overlap of every figure at equal length is added as
    a figure of its own.
    """
    overlaps = {f"{name}_overlap": figure["overlap"] for name, figure in metrics.items() if "overlap" in figure}
    return {name: figure["value"] for name, figure in metrics.items() if not figure.get("leans")} | overlaps
