"""What a person sees in the terminal while a run goes on: a bar per running stage, a line per finished one."""

import os
import threading
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tasks.work import plain_text
from tasks.work.progress_rows import ProgressRow


def _fall_silent(console: Console) -> None:
    """Print nothing any more on a console whose output has no reader; rich itself would end the process."""
    console.quiet = True
    # What is printed past rich goes to the same file, and would fail as well. Some file objects of Python have no
    # descriptor.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


# A flow run outlives the worker that started it and read its output. rich's way to go on is a subclass (rich 15,
# `Console.on_broken_pipe`), but Prefect logs through a console that it makes itself, so the class itself is changed.
# setattr, since mypy allows no assignment to a method.
setattr(Console, "on_broken_pipe", _fall_silent)  # noqa: B010
console = Console()
_lock = threading.Lock()
"""Stages report from threads of their own; it guards `_bars`."""
_bars: dict[str, TaskID] = {}
_progress = Progress(
    TextColumn("  {task.description}", markup=False),
    BarColumn(30),
    MofNCompleteColumn(),
    TextColumn("{task.fields[loss]}"),
    TimeRemainingColumn(),
    console=console,
    transient=True,
)


def say(text: str, style: str = "") -> None:
    """Print one line above the bars.

    Args:
        text: printed as it is. Names and answers that others wrote may look like rich's markup, which is not obeyed.
        style: of rich, for instance `dim`.
    """
    console.print(Text(text, style))


def start() -> None:
    """Show bars, where the output is a terminal."""
    if console.is_terminal:
        _progress.start()
    # once more: moving bars have put a stream of their own in the place of stdout
    plain_text.guard()


def stop() -> None:
    """Take the bars away."""
    _progress.stop()


def update_bar(title: str, row: ProgressRow) -> None:
    """Show in a stage's bar how far it is."""
    loss = f"loss {row['loss']:.4f}" if "loss" in row else ""
    with _lock:
        if title not in _bars:
            _bars[title] = _progress.add_task(title, total=row["of"], loss=loss)
        _progress.update(_bars[title], completed=row["done"], loss=loss)


def finish_bar(title: str, seconds: float, fresh: bool) -> None:
    """Remove the bar of a finished stage, and print its line.

    Args:
        seconds: that the stage took.
        fresh: whether it was done now, not found in the store.
    """
    with _lock:
        if title in _bars:
            _progress.remove_task(_bars.pop(title))
    remark = f"{seconds:.1f} s" if fresh else "already done"
    console.print(Text.assemble(("✓", "green"), f" {title}  ", (remark, "dim")))
