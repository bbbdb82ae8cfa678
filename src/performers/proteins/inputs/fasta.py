"""Protein FASTA files in and out, plain or compressed, with one policy for odd letters.

Biopython's ``SimpleFastaParser`` does the parsing; it reads through a line checker of ours, so that
every complaint names the file and the exact line.

The policy:

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser

from performers.app.files import replacement
from performers.proteins.inputs.lines import CheckedLines, Header
from performers.proteins.inputs.records import FastaError, LetterReport, ProteinRecord
from performers.proteins.inputs.streams import (
    STANDARD_INPUT,
    compression,
    decompressed,
    open_bytes,
    shown_name,
)

__all__ = [
    "FastaError",
    "LetterReport",
    "ProteinRecord",
    "iter_fasta",
    "iter_fasta_blocks",
    "open_fasta",
    "read_fasta",
    "write_fasta",
]

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_LOWER = re.compile(r"[a-z]")
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
    """Yield the records of one FASTA file, one in memory at a time.

    Args:
        path: The file, plain or compressed, or ``-`` for standard input.
        report: Counts are added to it as records are yielded; one report may serve many files.
        skip_invalid: Leave out records at fault and count them in the report.
        name: Name of the file in messages; its path by default.

    Yields:
        The records in file order.

    Raises:
        FastaError: The file cannot be used; raised when the iteration reaches the fault.
        ImportError: The file is compressed with Zstandard, whose package is missing.
    """
    path = Path(path)
    with _reading(path, name or shown_name(path)) as reading:
        text = io.TextIOWrapper(reading.data, encoding="utf-8-sig", errors="surrogateescape")
        lines = reading.lines = CheckedLines(reading.name, text, skip_invalid)
        yield from _parsed(lines, LetterReport() if report is None else report)
        if not lines.headers_seen:
            raise _empty(reading.name)
        if path == STANDARD_INPUT:
            # Closing the wrapper would close standard input.
            text.detach()


def iter_fasta_blocks(
    path: Path,
    wanted: Callable[[int], bool],
    *,
    block: int = 1 << 24,
    progress: Callable[[int], None] | None = None,
) -> Iterator[tuple[int, list[ProteinRecord]]]:
    """Yield the number and the records of blocks of a FASTA file; the others are not parsed.

    Block k has the records whose header begins in bytes ``k * block`` to ``(k + 1) * block`` of the
    file, decompressed. What is in memory is one block, or one record where that is longer.

    Args:
        path: A file, plain or compressed.
        wanted: Of a block's number, whether to yield it.
        block: Bytes.
        progress: Called after each block with the bytes of the file that were read, as compressed.

    Raises:
        FastaError: The file cannot be used; raised when the iteration reaches the fault.
        ImportError: The file is compressed with Zstandard, whose package is missing.
    """
    with _reading(path, str(path)) as reading:
        for number, line, content in _cut(reading, block, wanted):
            text = io.TextIOWrapper(
                io.BytesIO(content),
                encoding="utf-8" if number else "utf-8-sig",
                errors="surrogateescape",
            )
            lines = reading.lines = CheckedLines(reading.name, text, False, line)
            records = list(_parsed(lines, LetterReport()))
            if not lines.headers_seen:
                raise _empty(reading.name)
            yield number, records
            # Not kept while the next block is parsed.
            del records
            if progress is not None:
                progress(reading.raw.tell())


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
        path_or_handle: Where to write: a path, or a text handle, which is left open.
        records: The records to write.
        width: Residues on a line, at least 1.

    Raises:
        ValueError: ``width`` is below 1, or a record could not be read back: a name that is empty
            or has white space, a line break in the description, or a sequence that is empty or has
            something other than upper-case letters.
        OSError: The file cannot be written.
    """
    if width < 1:
        raise ValueError(f"width: expected at least 1 residue on a line, got {width}")
    if not isinstance(path_or_handle, (str, os.PathLike)):
        _write_records(path_or_handle, records, width)
        return
    path = Path(path_or_handle).resolve()
    if path.exists() and not path.is_file():
        with path.open("w", encoding="utf-8", newline="\n") as handle:
            _write_records(handle, records, width)
        return
    with open_fasta(path) as handle:
        _write_records(handle, records, width)


@contextmanager
def open_fasta(path: Path) -> Iterator[TextIO]:
    """Context of a FASTA file to write; it takes its place if nothing is raised.

    A path that ends in ``.gz`` is gzip-compressed, without a date: the same records are the same
    bytes.
    """
    with replacement(path) as temporary, temporary.open("wb") as raw:
        if path.suffix != ".gz":
            with io.TextIOWrapper(raw, encoding="utf-8", newline="\n") as handle:
                yield handle
            return
        with (
            gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as data,
            io.TextIOWrapper(cast(IO[bytes], data), encoding="utf-8", newline="\n") as handle,
        ):
            yield handle


@dataclass
class _Reading:
    """A file that is read.

    Attributes:
        name: Its name in messages.
        raw: The file as it is.
        kind: Its compression.
        data: The file decompressed.
        lines: Lines being parsed.
    """

    name: str
    raw: io.BufferedReader
    kind: str | None
    data: IO[bytes]
    lines: CheckedLines | None = None


@contextmanager
def _reading(path: Path, name: str) -> Iterator[_Reading]:
    """Context of an open file, in which faults become a `FastaError`."""
    reading, kind = None, None
    try:
        with open_bytes(path) as raw:
            start = raw.peek(8)[:8]
            if start.startswith(_UTF16_MARKS):
                raise FastaError(name, "this is UTF-16 text", "save it as UTF-8")
            kind = compression(start)
            reading = _Reading(name, raw, kind, decompressed(raw, kind))
            yield reading
    except EOFError:
        raise _error(
            name, reading, f"the {kind} data end too early", "copy the file again"
        ) from None
    except FileNotFoundError:
        raise FastaError(name, "no such file", "check the path") from None
    except IsADirectoryError:
        raise FastaError(name, "this is a directory", "name the FASTA files in it") from None
    except OSError as fault:
        if fault.errno is None:
            problem = f"the {kind} data are corrupt ({fault})"
            raise _error(name, reading, problem, "copy the file again") from None
        reason = fault.strerror or str(fault)
        raise _error(
            name, reading, f"cannot be read ({reason})", "check the file and its permissions"
        ) from None


def _cut(
    reading: _Reading, block: int, wanted: Callable[[int], bool]
) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number, the lines before and the text of the blocks wanted."""
    number = lines = first_line = 0
    parts: list[bytes] = []
    before = b""
    place = -1
    while piece := _read(reading.data, block):
        place += 1
        header = _HEADER.search(before + piece) if place else None
        start = header.end() - 1 - len(before) if header else len(piece)
        if header or not place:
            if place and wanted(number):
                yield number, first_line, b"".join([*parts, piece[:start]])
            head = piece[:start] if place else b""
            first_line = lines + _count_lines(before, head)
            number, parts, kept = place, [], piece[len(head) :]
        else:
            kept = piece
        if wanted(number):
            parts.append(kept)
        lines += _count_lines(before, piece)
        before = piece[-1:]
    if wanted(number):
        yield number, first_line, b"".join(parts)


def _read(data: IO[bytes], size: int) -> bytes:
    """So many bytes, or fewer at the end only."""
    pieces: list[bytes] = []
    while size and (piece := data.read(size)):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _count_lines(before: bytes, text: bytes) -> int:
    """Ends of lines in a text that follows another; a carriage return with a newline is one."""
    returns = text.count(b"\r")
    both = text.count(b"\r\n") if returns else 0
    return text.count(b"\n") + returns - both - (before == b"\r" and text[:1] == b"\n")


def _parsed(lines: CheckedLines, report: LetterReport) -> Iterator[ProteinRecord]:
    """The records in lines, counted."""
    for title, letters in SimpleFastaParser(lines):
        header = lines.headers.popleft()
        try:
            record = _to_record(header, title, letters, report)
        except FastaError as fault:
            if not lines.skip_invalid:
                raise
            report.skip(fault)
            continue
        report.count(record)
        yield record


def _empty(name: str) -> FastaError:
    return FastaError(name, "the file is empty", "give a FASTA file with records")


def _to_record(header: Header, title: str, letters: str, report: LetterReport) -> ProteinRecord:
    """Build a record from what the parser yielded for a header."""
    if header.fault is not None:
        raise header.fault
    words = title.split(None, 1)
    if not words:
        raise FastaError(header.place, "the header has no name", "write a name right after '>'")
    sequence = letters.removesuffix("*")
    if not sequence:
        raise FastaError(header.place, "no residues", "remove it or complete it", words[0])
    report.stops_removed += len(letters) - len(sequence)
    if not sequence.isupper():
        report.lower_case += len(_LOWER.findall(sequence))
    description = words[1].strip() if len(words) > 1 else ""
    return ProteinRecord(words[0], description, sequence.upper())


def _error(name: str, reading: _Reading | None, problem: str, remedy: str) -> FastaError:
    """An error at the line last read, if any was."""
    lines = reading and reading.lines
    return FastaError(lines.place if lines and lines.number else name, problem, remedy)


def _write_records(handle: TextIO, records: Iterable[ProteinRecord], width: int) -> None:
    for record in records:
        name, description, sequence = record.name, record.description, record.sequence
        if name.split() != [name]:
            raise ValueError(f"record name: expected one word, got {name!r}; rename the record")
        if re.search(r"[\r\n\x00]", name + description):
            raise ValueError(f"record {name!r}: the header has a line break or NUL; remove it")
        if not re.fullmatch(r"[A-Z]+", sequence):
            raise ValueError(
                f"record {name!r}: expected a sequence of upper-case letters, "
                f"got {sequence[:20]!r}; remove the record or correct it"
            )
        handle.write(f">{name} {description}".rstrip() + "\n")
        for start in range(0, len(sequence), width):
            handle.write(sequence[start : start + width] + "\n")
