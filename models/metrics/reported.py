"""A figure as a report holds it, in JSON; and how one at equal length is printed: never without its overlap."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, NotRequired, TypeVar, cast

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from models.metrics.length_control import LEANS, OVERLAP
from models.metrics.statistics import Estimate

T = TypeVar("T")
EQUAL_LENGTH = "helpful/win_rate_equal_length"
MARK = (
    f"Below an overlap of {OVERLAP:g} (the share of prompts on which the usually shorter side is the longer one) a win "
    f"rate at equal length {LEANS}, a convention: it neither orders nor gates anything."
)


@with_config(ConfigDict(extra="forbid"))
class Figure(TypedDict):
    """An `Estimate` in JSON, which knows no NaN: what could not be measured is null."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Prompts that were judged."""
    failed: int
    """Prompts whose verdict failed: not in `value`."""
    method: str
    """How the interval was made."""
    overlap: NotRequired[Annotated[float, Field(ge=0, le=0.5)]]
    """Of a win rate at equal length: share of prompts on which the usually shorter side is the longer one."""
    leans: NotRequired[bool]
    """Whether that win rate leans on a convention, since the overlap is too small."""


def reported(estimate: Estimate) -> Figure:
    """Return an estimate as a report holds it."""
    return cast(Figure, {name: finite(value) for name, value in asdict(estimate).items()})


def finite(value: T) -> T | None:
    """Return the value, or none for a number that JSON does not know."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def interval(figure: Figure, digits: int = 3) -> str:
    """Return value and interval as text, or a dash where nothing could be measured."""
    if figure["value"] is None or figure["low"] is None or figure["high"] is None:
        return "–"
    return f"{figure['value']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def support(figure: Figure) -> str:
    """Return what a figure at equal length stands on, in words; nothing for other figures."""
    if "overlap" not in figure or "leans" not in figure:
        return ""
    return f"overlap {figure['overlap']:.2f}{f', {LEANS}' if figure['leans'] else ''}"


def unmarked(figures: Mapping[str, Figure]) -> dict[str, float | None]:
    """Return each figure's value for a place that knows no marks and orders by figures (MLflow).

    A figure that leans on a convention is left out there; the overlap of every figure at equal length stands beside it.
    """
    overlaps = {f"{name}_overlap": figure["overlap"] for name, figure in figures.items() if "overlap" in figure}
    return {name: figure["value"] for name, figure in figures.items() if not figure.get("leans")} | overlaps
