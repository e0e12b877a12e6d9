"""What a disk, a kill or a person can do to a file."""

from collections.abc import Callable
from pathlib import Path
from random import Random

Damage = Callable[[Path], None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def braces(path: Path) -> None:
    path.write_text("{}")


def brackets(path: Path) -> None:
    path.write_text("[]")


def noise(path: Path) -> None:
    path.write_bytes(Random(0).randbytes(5000))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def gone(path: Path) -> None:
    path.unlink()
