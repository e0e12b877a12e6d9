"""What a person sees in the terminal while a run goes on: a bar per running stage, a line per finished one."""

import os
import threading
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from tasks.work import plain_text


def _quietly(console: Console) -> None:
    """Go on in silence where nobody reads any more; rich would end the process."""
    console.quiet = True
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())


# a flow run outlives the worker that started it; Prefect's log goes through a console of its own
Console.on_broken_pipe = _quietly  # type: ignore[method-assign,assignment]
console = Console()
_lock = threading.Lock()
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
    """Print one line above the bars, as it is: names and answers of others may look like rich's markup."""
    console.print(Text(text, style))


def start() -> None:
    """Show bars, where the terminal can."""
    if console.is_terminal:
        _progress.start()
    plain_text.guard()  # also around the stream that moving bars put in the place of stdout


def stop() -> None:
    """Take the bars away."""
    _progress.stop()


def moved(title: str, line: dict[str, Any]) -> None:
    """Show how far a stage is."""
    loss = f"loss {line['loss']:.4f}" if "loss" in line else ""
    with _lock:
        if title not in _bars:
            _bars[title] = _progress.add_task(title, total=line["of"], loss=loss)
        _progress.update(_bars[title], completed=line["done"], loss=loss)


def done(title: str, seconds: float, fresh: bool) -> None:
    """Print the line of a finished stage."""
    with _lock:
        if title in _bars:
            _progress.remove_task(_bars.pop(title))
    spent = f"{seconds:.1f} s" if fresh else "already done"
    console.print(Text.assemble(("✓", "green"), f" {title}  ", (spent, "dim")))
