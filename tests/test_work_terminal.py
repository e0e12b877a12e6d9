"""What others wrote reaches the terminal as text: no escape sequence of theirs is obeyed, rich's and tqdm's are."""

import json
import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVIL = "\x1b]52;c;cm0gLXJm\x07\x1b[2J\x9b31m\u202e\r\x08"
SHOWN = r"\x1b]52;c;cm0gLXJm"
"""What a person sees of it, wherever it came from."""
COMMANDS = ("\x1b]", "\x1b[2J", "\x9b", "\u202e", "\x07", "\x08")


def bare(text: str) -> str:
    """The characters of a text that a terminal obeys, but line breaks."""
    return "".join(c for c in text if c != "\n" and (ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u202e\u2066"))


def sacpo(*arguments: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "flows", *arguments], cwd=ROOT, capture_output=True)
    return done.returncode, (done.stdout + done.stderr).decode()


def on_a_terminal(code: str) -> str:
    """Run code after `plain_text.guard()` with a terminal for its output, and return what the terminal got."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 200))
    code = f"from tasks.work import plain_text; plain_text.guard(); evil = {EVIL!r}\n{code}"
    environment = os.environ | {"TERM": "xterm-256color"}
    child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT,
                             env=environment)  # fmt: skip
    os.close(theirs)
    got = b""
    while chunk := _read(ours):
        got += chunk
    os.close(ours)
    assert child.wait() == 0, got.decode()
    return got.decode().replace("\r\n", "\n")


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other end is closed
        return b""


def test_names_of_columns_files_and_folders_are_shown_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "esc\x1b]52;c;cm0gLXJm\x07\x9b2Jdir"
    folder.mkdir()
    (folder / "columns.jsonl").write_text("".join(json.dumps({EVIL: i, f"x{EVIL}": 2}) + "\n" for i in range(9)))
    recipe = folder / "recipe.toml"
    steps = "".join(f'[[steps]]\nmetric = "{metric}"\ndata = "columns.jsonl"\n' for metric in ("helpful", "harmless"))
    recipe.write_text(f'name = "a"\nbase = "town"\n{steps}')
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "recipe.toml").write_text(recipe.read_text())
    (plain / "columns.jsonl").write_text((folder / "columns.jsonl").read_text())
    for wanted in (
        ["check", str(recipe)],
        ["check", str(plain / "recipe.toml")],
        ["init", str(tmp_path / "new.toml"), "--helpful", str(folder / "columns.jsonl")],
    ):
        code, out = sacpo(*wanted)
        assert code == 2 and SHOWN in out and not bare(out), wanted


def test_arguments_and_unknown_options_are_shown_as_text() -> None:
    for wanted in (["chat", EVIL], ["champion", f"--{EVIL}"]):
        code, out = sacpo(*wanted)
        assert code and SHOWN in out and not bare(out), wanted


@pytest.mark.parametrize(
    "prints",
    [
        "print(evil)",
        "print('a', evil)",
        "import typer; typer.echo(evil)",
        "import typer; typer.echo(evil, err=True)",
        "import typer; typer.echo(evil, color=True)",
        "import sys; sys.stderr.writelines([evil, '\\n'])",
        "import warnings; warnings.warn(evil)",
        "import logging; logging.warning(evil)",
        "import sys; sys.excepthook(ValueError, ValueError(evil), None)",
        "from rich.console import Console; Console().print(evil, markup=False, highlight=False)",
        "from rich.console import Console; Console(stderr=True).print(evil, highlight=False)",
        "from rich.text import Text; from rich.console import Console; Console(color_system=None).print(Text(evil))",
        "from tasks.work import terminal; terminal.say(evil)",
        "from tasks.work import terminal; terminal.say(evil, 'dim'); terminal.finish_bar(evil, 1.0, True)",
        "from tasks.work import terminal; terminal.start(); print(evil); terminal.stop()",
        "from tqdm import tqdm; tqdm.write(evil)",
        "print(chr(0xdc9b), evil)",
    ],
)
def test_whoever_prints_a_foreign_text_prints_no_command(prints: str) -> None:
    out = on_a_terminal(prints)
    assert SHOWN in out and not [command for command in COMMANDS if command in out]


def test_rich_goes_on_painting_and_its_bars_go_on_moving() -> None:
    out = on_a_terminal("""
from tasks.work import terminal
terminal.say("a line", "bold red")
terminal.start()
terminal.update_bar("training", {"of": 4, "done": 1})
terminal.update_bar("training", {"of": 4, "done": 2, "loss": 0.5})
terminal.say("beside")
terminal.finish_bar("training", 1.0, True)
terminal.stop()
print("after")
""")
    assert "\x1b[1;31ma line\x1b[0m" in out and "\x1b[?25l" in out and "\x1b[2K" in out and "after\n" in out
    assert "\\x1b" not in out and "training" in out and "\x1b[32m✓\x1b[0m" in out


def test_the_bars_of_downloads_go_on_moving() -> None:
    out = on_a_terminal("""
from tqdm import tqdm
with tqdm(total=2, desc="all") as outer, tqdm(total=2, desc=f"file{evil}", position=1) as inner:
    inner.update(); outer.update()
""")
    assert "\rall:" in out and "\x1b[A" in out and f"\rfile{SHOWN}" in out
    assert not [command for command in COMMANDS if command in out]


def test_what_is_asked_for_and_helped_with_still_looks_the_same() -> None:
    out = on_a_terminal("""
import sys
from flows.__main__ import app
print("tab\\there, Umlaut ä, emoji 👩‍🚀, מה\u200f")
try: app(["--help"])
except SystemExit: pass
""")
    assert "tab\there, Umlaut ä, emoji 👩‍🚀, מה\u200f" in out and "\\x1b" not in out and "\x1b[1m" in out
