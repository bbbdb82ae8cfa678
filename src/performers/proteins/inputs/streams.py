"""Bytes of files and of standard input, decompressed: gzip, bzip2, xz and Zstandard.

The compression is told from the first bytes, never from the name. Data that end too early raise
EOFError, and damaged data one of `DAMAGED` or an OSError without a number.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STANDARD_INPUT = Path("-")
"""Path that means standard input."""

DAMAGED = (zlib.error, lzma.LZMAError)

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def shown_name(path: Path) -> str:
    """Name of a source in messages."""
    return "standard input" if path == STANDARD_INPUT else str(path)


@contextmanager
def open_bytes(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file, or standard input for ``-``, as it is."""
    if path == STANDARD_INPUT:
        yield cast(io.BufferedReader, sys.stdin.buffer)
        return
    with path.open("rb") as raw:
        yield raw


def compression(start: bytes) -> str | None:
    """Name of the compression of data with these first bytes; None for plain data."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def decompressed(raw: io.BufferedReader, kind: str | None) -> IO[bytes]:
    """Data of a stream, decompressed as they are read.

    Args:
        raw: The compressed data.
        kind: Their `compression`.

    Raises:
        ImportError: The data are compressed with Zstandard, whose package is missing.
    """
    if kind == "gzip":
        # GzipFile reads as a binary file does, though its type does not say so.
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    return raw if kind is None else io.BufferedReader(_ZstandardReader(raw))


@contextmanager
def rereadable(paths: Sequence[Path]) -> Iterator[list[tuple[Path, str]]]:
    """Context of paths that can be read more than once, each with its name in messages.

    Pipes and standard input are copied to temporary files, as compressed as they are.
    """
    with ExitStack() as stack:
        sources = []
        for path in paths:
            name = shown_name(path)
            if path == STANDARD_INPUT or path.is_fifo():
                copy = stack.enter_context(tempfile.NamedTemporaryFile(delete=False))
                stack.callback(os.unlink, copy.name)
                with open_bytes(path) as raw, copy:
                    shutil.copyfileobj(raw, copy)
                path = Path(copy.name)
            sources.append((path, name))
        yield sources


class _ZstandardReader(io.RawIOBase):
    """Zstandard frames, one after another; unlike the package's reader it refuses half a frame."""

    def __init__(self, raw: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise ImportError(
                "reading Zstandard files needs zstandard: pip install 'performers[proteins]'"
            ) from error
        self._package = zstandard
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._between = True
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._pending:
            data = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = self._package.ZstdDecompressor().decompressobj()
                self._between = True
            data = data or self._raw.read(1 << 16)
            if not data:
                if self._between:
                    return 0
                raise EOFError
            self._between = False
            try:
                self._pending = memoryview(self._frame.decompress(data))
            except self._package.ZstdError as error:
                raise OSError(str(error)) from error
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._pending))
        target[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
