"""Files that may be compressed, opened by what their name says, and never larger than is sane."""

import gzip
import lzma
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, cast

from models.errors import BadData

MAGIC = {".gz": ("gzip", b"\x1f\x8b"), ".xz": ("xz", b"\xfd7zXZ\x00")}
EXPANDS = 200
"""A compressed file may become this many times larger."""
UNPACKED = 2**26
"""Bytes that any compressed file may expand to."""


def most(source: Path) -> int:
    """Return the number of bytes that a compressed file may expand to."""
    return max(UNPACKED, EXPANDS * source.stat().st_size)


class _Unpacked(RawIOBase):
    """What a compressed file expands to, up to a bound: 4 GiB fit into 600 kB."""

    def __init__(self, source: Path) -> None:
        unpack: Any = {".gz": gzip.open, ".xz": lzma.open}[source.suffix]
        self.source, self.inner = source, cast(IO[bytes], unpack(source, "rb"))
        self.left = most(source)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.inner.read(len(buffer))
        self.left -= len(data)
        if self.left < 0:
            raise BadData(
                f"{self.source}: expands to more than {EXPANDS} times its size; if that is right, unpack it and give "
                "the unpacked file"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.inner.close()
        super().close()


def opened(source: Path) -> IO[bytes]:
    """Open a file, unpacking it if its name says so.

    Raises:
        BadData: the content is not what the name says.
    """
    with source.open("rb") as file:
        start = file.read(8)
    for ending, (name, magic) in MAGIC.items():
        if start and start.startswith(magic) != (source.suffix == ending):
            raise BadData(
                f"{source}: the name ends in {ending} but the file is not {name}; rename it, or pack it"
                if source.suffix == ending
                else f"{source}: the file is {name}; add {ending} to its name"
            )
    return cast(IO[bytes], BufferedReader(_Unpacked(source), 2**16) if source.suffix in MAGIC else source.open("rb"))
