"""What reaches the terminal: every text as a text, none as a command.

Others write names of columns, files and models, answers, replies of judges, descriptions in a registry. A terminal
obeys what stands in them: it paints over what was printed before, it fills the clipboard. So no printer has to think of
it: after `guard`, everything that goes to stdout or stderr goes through `visible`.
"""

import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

COMMANDS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and line feed, what turns the direction of writing, halves of characters."""
MOVES = re.compile(r"\r|(?:\x1b\[A)+")
"""How a bar of tqdm begins what it writes: at the start of its line, or in a line above."""


def visible(text: str) -> str:
    """Return a text as a terminal may have it: what it would obey is spelled, as Python writes it in quotes."""
    return COMMANDS.sub(lambda match: ascii(match[0])[1:-1], text)


def guard() -> None:
    """Let nothing but text, and what rich and tqdm make of it, through stdout and stderr from now on."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guarded):
            setattr(sys, name, cast(TextIO, _Guarded(stream)))


class _Guarded:
    """A stream that shows what it is given, whoever gives it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        shown = visible(text)
        if shown != text:  # who writes decides, not what is written: nobody's text can claim to be a bar
            writer = sys._getframe(1).f_globals.get("__name__", "")
            if writer == "rich.console":  # its segments have been shown one by one
                shown = text
            elif writer.startswith("tqdm."):
                moves = MOVES.match(text)
                begins = moves[0] if moves else ""
                shown = begins + visible(text.removeprefix(begins))
        self._stream.write(shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    @property
    def rich_proxied_file(self) -> Any:
        """Where rich writes. It asks before it renders anything, so here is the place to make it render text only."""
        _guard_rich()
        return getattr(self._stream, "rich_proxied_file", self)  # a bar that moves has put itself around stdout

    def __getattr__(self, name: str) -> Any:
        if name in ("buffer", "detach"):  # ways around
            raise AttributeError(name)
        return getattr(self._stream, name)


def _guard_rich() -> None:
    """Make every console of rich show the text of its segments; styles and movements are its own."""
    from rich.console import Console
    from rich.segment import Segment

    render = Console._render_buffer
    if render.__module__ == __name__:
        return

    def _render_buffer(console: Console, buffer: Iterable[Segment]) -> str:
        shown = (
            Segment(part.text if part.control else visible(part.text), part.style, part.control) for part in buffer
        )
        return render(console, shown)

    Console._render_buffer = _render_buffer  # type: ignore[method-assign,assignment]
