"""Files that may be compressed, opened by what their name says, and never larger than is sane."""

import gzip
import lzma
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from models.errors import BadData

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAGIC = {".gz": ("gzip", b"\x1f\x8b"), ".xz": ("xz", b"\xfd7zXZ\x00")}
EXPANDS = 200
"""A compressed file may become this many times larger."""
UNPACKED = 2**26
"""Bytes that any compressed file may expand to."""


def largest_size(source: Path) -> int:
    """Return the number of bytes that a compressed file may expand to."""
    return max(UNPACKED, EXPANDS * source.stat().st_size)


class _Unpacked(RawIOBase):
    """What a compressed file expands to, up to a bound: 4 GiB fit into 600 kB."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.inner: gzip.GzipFile | lzma.LZMAFile
        if source.suffix == ".gz":
            self.inner = gzip.GzipFile(source, "rb")
        else:
            self.inner = lzma.LZMAFile(source, "rb")  # noqa: SIM115  # closed by `close`, as the other
        self.remaining = largest_size(source)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        # Counted while it expands, block by block: the size that a gzip file names at its end can be wrong
        target = memoryview(buffer)
        data = self.inner.read(target.nbytes)
        self.remaining -= len(data)
        if self.remaining < 0:
            raise BadData(
                f"{self.source}: expands to more than {EXPANDS} times its size; if that is right, unpack it and give "
                "the unpacked file"
            )
        target[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.inner.close()
        super().close()


def open_unpacked(source: Path) -> IO[bytes]:
    """Open a file, unpacking it if its name says so.

    Raises:
        BadData: the content is not what the name says.
    """
    with source.open("rb") as file:
        start = file.read(8)
    # An empty file has no magic number, and passes: what is wrong with it is told by its reader
    for ending, (name, magic) in MAGIC.items():
        if start and start.startswith(magic) != (source.suffix == ending):
            raise BadData(
                f"{source}: the name ends in {ending} but the file is not {name}; rename it, or pack it"
                if source.suffix == ending
                else f"{source}: the file is {name}; add {ending} to its name"
            )
    return cast(IO[bytes], BufferedReader(_Unpacked(source), 2**16) if source.suffix in MAGIC else source.open("rb"))
