"""Bytes of files and of standard input, decompressed: gzip, bzip2, xz and Zstandard.

The compression is told from the first bytes, never from the name. Data that end too early raise
EOFError, and damaged data an OSError without a number.
"""

from __future__ import annotations

import bz2
import io
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

STANDARD_INPUT = Path("-")
"""Path that means standard input."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


def shown_name(path: Path) -> str:
    """Name of a source in messages."""
    return "standard input" if path == STANDARD_INPUT else str(path)


def open_bytes(path: Path) -> AbstractContextManager[io.BufferedReader]:
    """Open a file, or standard input for ``-``, as it is."""
    if path == STANDARD_INPUT:
        return nullcontext(cast(io.BufferedReader, sys.stdin.buffer))
    return path.open("rb")


def compression(start: bytes) -> str | None:
    """Name of the compression of data with these first bytes; None for plain data."""
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def decompressed(raw: io.BufferedReader, kind: str | None) -> IO[bytes]:
    """Data of a stream of a `compression`, decompressed as they are read."""
    return raw if kind is None else io.BufferedReader(_Frames(raw, *_decompressor(kind)))


def _decompressor(kind: str) -> tuple[Callable[[], Any], type[Exception]]:
    """Maker of a frame's decompressor, and the error that it raises."""
    if kind == "gzip":
        # The window of 32 KiB, with gzip's header.
        return partial(zlib.decompressobj, 15 + 16), zlib.error
    if kind == "bzip2":
        return bz2.BZ2Decompressor, OSError
    if kind == "xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "reading Zstandard files needs zstandard: pip install 'performers[proteins]'"
        ) from error
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


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


class _Frames(io.RawIOBase):
    """Frames one after another, zeros between them left out.

    Other data after a frame are an error, where the readers of ``bz2``, ``lzma`` and ``zstandard``
    end as if the data did.
    """

    def __init__(
        self, raw: io.BufferedReader, start: Callable[[], Any], damage: type[Exception]
    ) -> None:
        self._raw, self._start, self._damage = raw, start, damage
        self._frame = start()
        self._between = True
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        while not self._pending:
            data = b""
            if self._frame.eof:
                data, self._frame, self._between = self._frame.unused_data, self._start(), True
            data = data or self._raw.read(1 << 16)
            if not data:
                if self._between:
                    return 0
                raise EOFError
            if self._between and not (data := data.lstrip(b"\0")):
                continue
            self._between = False
            try:
                self._pending = memoryview(self._frame.decompress(data))
            except self._damage as error:
                raise OSError(str(error)) from error
        target = memoryview(buffer).cast("B")
        count = min(len(target), len(self._pending))
        target[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count
