"""Everything reaches the terminal as text, nothing as a command.

Names of columns, files and models, answers, replies of judges and descriptions in a registry are written by others. A
terminal obeys control sequences in them: it overwrites what was printed before, or fills the clipboard. After `guard`,
everything that goes to stdout or stderr goes through `visible`, so that no function that prints has to think of it.
"""

import re
import sys
from collections.abc import Iterable
from typing import TextIO, cast

COMMANDS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and line feed, characters that change the direction of writing, and lone surrogates."""
MOVES = re.compile(r"\r|(?:\x1b\[A)+")
"""What a bar of tqdm begins with: a move to the start of its line, or to a line above."""


def visible(text: str) -> str:
    """Return a text in which each character that a terminal would obey is spelled as in a Python string."""
    return COMMANDS.sub(lambda match: ascii(match[0])[1:-1], text)


def guard() -> None:
    """Let only text through stdout and stderr from now on, and the control sequences that rich and tqdm write."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded):
            setattr(sys, name, cast(TextIO, _Guarded(stream)))


class _Guarded:
    """A stream that writes what it gets as text."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        safe_text = visible(text)
        if safe_text != text:
            # The calling module decides what may pass, not the text: a foreign text cannot pretend to be a bar.
            writer = sys._getframe(1).f_globals.get("__name__", "")
            if writer == "rich.console":
                safe_text = text  # _guard_rich has made its segments visible one by one
            elif writer.startswith("tqdm."):
                match = MOVES.match(text)
                moves = match[0] if match else ""
                safe_text = moves + visible(text.removeprefix(moves))
        self._stream.write(safe_text)
        # a caller expects the length of what it passed, not of what was written
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    @property
    def rich_proxied_file(self) -> object:
        """The stream to which rich writes.

        rich reads this attribute before it renders anything, so rich is changed here, and only where it is used.
        """
        _guard_rich()
        # while bars move, rich has put a stream of its own around stdout, which names the one below
        return getattr(self._stream, "rich_proxied_file", self)

    def __getattr__(self, name: str) -> object:
        # bytes that are written to these would go past `write`
        if name in ("buffer", "detach"):
            raise AttributeError(name)
        return getattr(self._stream, name)


def _guard_rich() -> None:
    """Make every console of rich write the text of its segments through `visible`.

    Styles and movements are rich's own and stay. rich 15 has render hooks for single consoles only, and typer and
    Prefect make consoles of their own; so a method of the class is replaced.
    """
    from rich.console import Console
    from rich.segment import Segment

    render = Console._render_buffer
    if render.__module__ == __name__:
        return

    def _render_buffer(console: Console, buffer: Iterable[Segment]) -> str:
        segments = (
            Segment(part.text if part.control else visible(part.text), part.style, part.control) for part in buffer
        )
        return render(console, segments)

    # setattr, since mypy allows no assignment to a method
    setattr(Console, "_render_buffer", _render_buffer)  # noqa: B010
