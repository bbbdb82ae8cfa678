"""Protein FASTA files in and out, plain or compressed, with one policy for odd letters.

Every complaint names the file and the exact line. The policy:

- The 20 standard amino acids and ``X B Z U O J`` are legal, that is, every letter from A to Z.
- Lower case is upper-cased; one ``*`` that ends a sequence is removed. Both are counted.
- White space inside sequence lines, blank lines, Windows and old Macintosh line ends, a UTF-8
  byte order mark and a missing final newline are ignored.
- Anything else in a sequence (a ``*`` inside it, gaps ``-`` and ``.``, digits, other symbols) is an
  error that names the record, the line and the letter. So are a record without residues, a header
  without a name, text before the first header, and a file that is missing, empty, binary or
  damaged. On request, records at fault are left out and counted instead; files at fault never are.
- Records that share a name are all kept; the repeats are counted.
- Files of more than 200 residues that look like nucleotides are kept, with a warning: at least 90%
  of the letters other than ``N`` and ``X``, unknown in one alphabet or the other, are ``ACGTU``,
  and at least 1% are each of ``A``, ``C``, ``G`` and ``T`` or ``U``. Proteins of few kinds of
  residues (silk, antifreeze proteins) lack one of them.

What was changed or is unusual is counted in a `LetterReport`; `LetterReport.summary` tells it in
one line.
"""

from __future__ import annotations

import gzip
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import count
from pathlib import Path
from typing import IO, TextIO, cast

from performers.app.files import replacement
from performers.proteins.inputs.parsing import Place, parse
from performers.proteins.inputs.records import FastaError, LetterReport, ProteinRecord
from performers.proteins.inputs.streams import (
    STANDARD_INPUT,
    compression,
    decompressed,
    open_bytes,
    shown_name,
)

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_HEADER = re.compile(rb"[\r\n]>")


def read_fasta(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    skip_invalid: bool = False,
) -> tuple[list[ProteinRecord], LetterReport]:
    """Read one or several FASTA files into memory.

    Args:
        paths: A path or a sequence of paths; each file is plain or compressed (gzip, bzip2, xz,
            Zstandard), which is told from its first bytes. ``-`` is standard input.
        skip_invalid: Leave out records at fault and count them in the report.

    Returns:
        All records in the order of the files, and one report over all of them.

    Raises:
        FastaError: A file cannot be used; see the module's policy.
        ValueError: ``paths`` holds no file.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    if not paths:
        raise ValueError("paths: expected at least one FASTA file, got none; name a file")
    report = LetterReport()
    records = [
        record for path in paths for record in iter_fasta(path, report, skip_invalid=skip_invalid)
    ]
    return records, report


def iter_fasta(
    path: str | os.PathLike[str],
    report: LetterReport | None = None,
    *,
    skip_invalid: bool = False,
    name: str | None = None,
) -> Iterator[ProteinRecord]:
    """Yield the records of one FASTA file as `read_fasta` does, one in memory at a time.

    Counts are added to ``report`` as records are yielded; one report may serve many files. ``name``
    is that of the file in messages, its path by default.

    Raises:
        FastaError: The file cannot be used; raised when the iteration reaches the fault.
    """
    path = Path(path)
    place = Place(name or shown_name(path))
    with _opened(path, place) as (_, data):
        text = _text(data)
        yield from parse(text, place, report or LetterReport(), skip_invalid=skip_invalid)
        if path == STANDARD_INPUT:
            # Closing the wrapper would close standard input.
            text.detach()


def iter_fasta_blocks(
    path: Path, wanted: Callable[[int], bool], *, block: int = 1 << 24
) -> Iterator[tuple[int, list[ProteinRecord], int]]:
    """Yield the number and the records of some blocks of a FASTA file, and the bytes read so far.

    Block k has the records whose header begins in bytes ``k * block`` to ``(k + 1) * block`` of the
    file, decompressed. What is in memory is one block, or one record where that is longer.
    ``wanted`` tells of a block's number if it is parsed and yielded. The bytes are those of the
    file as it is, compressed or not.

    Raises:
        FastaError: The file cannot be used; raised when the iteration reaches the fault.
    """
    place = Place(str(path))
    with _opened(path, place) as (raw, data):
        for number, place.number, content in _cut(data, block, wanted):
            text = _text(io.BytesIO(content), begins=number == 0)
            records = parse(text, place, LetterReport(), skip_invalid=False)
            yield number, list(records), raw.tell()


def write_fasta(
    path_or_handle: str | os.PathLike[str] | TextIO,
    records: Iterable[ProteinRecord],
    width: int = 60,
) -> None:
    """Write records as FASTA that `read_fasta` reads back unchanged.

    A file appears only when it is complete: it is written beside its place under another name and
    moved there at the end (a device or a pipe is written directly). A path that ends in ``.gz`` is
    gzip-compressed.

    Args:
        path_or_handle: A path, or a text handle, which is left open.
        records: The records.
        width: Residues on a line, at least 1.

    Raises:
        ValueError: A record could not be read back: a name that is empty or has white space, a line
            break in the description, or a sequence that is empty or has something other than
            upper-case letters.
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1 residue on a line, got {width}")
    place: AbstractContextManager[TextIO]
    if isinstance(path_or_handle, (str, os.PathLike)):
        path = Path(path_or_handle).resolve()
        is_pipe = path.exists() and not path.is_file()
        place = path.open("w", encoding="utf-8", newline="\n") if is_pipe else open_fasta(path)
    else:
        place = nullcontext(path_or_handle)
    with place as handle:
        for record in records:
            _check_writable(record)
            handle.write(f">{record.header}\n")
            for start in range(0, len(record.sequence), width):
                handle.write(record.sequence[start : start + width] + "\n")


@contextmanager
def open_fasta(path: Path) -> Iterator[TextIO]:
    """Context of a FASTA file to write; it takes its place if nothing is raised.

    A path that ends in ``.gz`` is gzip-compressed, without a date: the same records are the same
    bytes.
    """
    with replacement(path) as temporary, temporary.open("wb") as data, ExitStack() as stack:
        if path.suffix == ".gz":
            compressed = stack.enter_context(gzip.GzipFile("", "wb", fileobj=data, mtime=0))
            data = cast(io.BufferedWriter, compressed)
        yield stack.enter_context(io.TextIOWrapper(data, encoding="utf-8", newline="\n"))


@contextmanager
def _opened(path: Path, place: Place) -> Iterator[tuple[io.BufferedReader, IO[bytes]]]:
    """Context of a file as it is and decompressed, in which faults become a `FastaError`."""
    kind = None
    try:
        with open_bytes(path) as raw:
            start = raw.peek(8)[:8]
            if start.startswith(_UTF16_MARKS):
                raise FastaError(place.name, "this is UTF-16 text", "save it as UTF-8")
            kind = compression(start)
            yield raw, decompressed(raw, kind)
    except EOFError:
        problem, remedy = f"the {kind} data end too early", "copy the file again"
    except FileNotFoundError:
        raise FastaError(place.name, "no such file", "check the path") from None
    except IsADirectoryError:
        raise FastaError(place.name, "this is a directory", "name the FASTA files in it") from None
    except OSError as fault:
        problem, remedy = f"the {kind} data are corrupt ({fault})", "copy the file again"
        if fault.errno is not None:
            problem = f"cannot be read ({fault.strerror or fault})"
            remedy = "check the file and its permissions"
    else:
        return
    raise FastaError(str(place), problem, remedy)


def _text(data: IO[bytes], *, begins: bool = True) -> io.TextIOWrapper:
    encoding = "utf-8-sig" if begins else "utf-8"
    return io.TextIOWrapper(data, encoding=encoding, errors="surrogateescape")


def _cut(
    data: IO[bytes], block: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, the lines before and the text of the blocks wanted."""
    number = lines = first_line = 0
    parts: list[bytes] = []
    before = b""
    for place in count():
        piece = data.read(block)
        header = _HEADER.search(before + piece) if place else None
        start = header.end() - 1 - len(before) if header else len(piece)
        if wanted(number):
            parts.append(piece[:start])
            if header or not piece:
                yield number, first_line, b"".join(parts)
        if not piece:
            return
        if header:
            number, first_line = place, lines + _count_lines(before, piece[:start])
            parts = [piece[start:]] if wanted(place) else []
        lines += _count_lines(before, piece)
        before = piece[-1:]


def _count_lines(before: bytes, text: bytes) -> int:
    """Ends of lines in a text that follows another; a carriage return with a newline is one."""
    returns = text.count(b"\r")
    both = text.count(b"\r\n") if returns else 0
    return text.count(b"\n") + returns - both - (before == b"\r" and text[:1] == b"\n")


def _check_writable(record: ProteinRecord) -> None:
    if record.name.split() != [record.name]:
        raise ValueError(f"record name: expected one word, got {record.name!r}; rename the record")
    if re.search(r"[\r\n\x00]", record.name + record.description):
        raise ValueError(f"record {record.name!r}: the header has a line break or NUL; remove it")
    if not re.fullmatch(r"[A-Z]+", record.sequence):
        raise ValueError(
            f"record {record.name!r}: expected a sequence of upper-case letters, "
            f"got {record.sequence[:20]!r}; remove the record or correct it"
        )
