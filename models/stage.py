"""A stage is a plain function with a mark: the name and the version under which its results are stored.

A stage takes an empty folder, and its other inputs as nouns, records of the recipe and plain values. It writes into the
folder and returns the noun that lies there. `tasks/work/` runs stages and finds their results again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_type_hints

from models.artifacts import Noun

F = TypeVar("F", bound=Callable[..., Noun])


@dataclass(frozen=True)
class Mark:
    """Name and version of a stage."""

    name: str
    """`alignment.dpo`: part of every result's name, so it stays when the function moves or is renamed."""
    version: int
    """Raised when what the function computes changes in meaning: results of the old meaning are then made again."""


def stage(name: str, version: int) -> Callable[[F], F]:
    """Mark a function as the stage of this name."""

    def mark(function: F) -> F:
        setattr(function, "mark", Mark(name, version))  # noqa: B010  # mypy knows no attribute of a function
        return function

    return mark


def mark_of(function: Callable[..., Noun]) -> Mark:
    """Return the mark of a stage.

    Raises:
        TypeError: the function has no mark.
    """
    mark = getattr(function, "mark", None)
    if not isinstance(mark, Mark):
        raise TypeError(f"{function.__module__}.{function.__qualname__} is no stage; mark it with @stage")
    return mark


def hints_of(function: Callable[..., Noun]) -> dict[str, Any]:
    """Return name → type of a stage's arguments without the folder, and `return` → the noun that it makes."""
    # The first argument is the folder, under whatever name
    folder, *_ = function.__code__.co_varnames
    return {name: hint for name, hint in get_type_hints(function).items() if name != folder}
