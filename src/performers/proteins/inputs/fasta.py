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
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser

from performers.app.files import replacement
from performers.proteins.inputs.records import FastaError, LetterReport, ProteinRecord
from performers.proteins.inputs.streams import (
    DAMAGED,
    STANDARD_INPUT,
    compression,
    decompressed,
    open_bytes,
    shown_name,
)

__all__ = ["FastaError", "LetterReport", "ProteinRecord", "iter_fasta", "read_fasta", "write_fasta"]

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# Bytes that are not UTF-8 reach us as lone surrogates (errors="surrogateescape").
_BINARY = re.compile("[\x00\udc80-\udcff]")
_ILLEGAL = re.compile(r"[^A-Za-z*]")
_LOWER = re.compile(r"[a-z]")


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
    name = name or shown_name(path)
    report = LetterReport() if report is None else report
    lines, kind = None, None
    try:
        with open_bytes(path) as raw:
            start = raw.peek(8)[:8]
            if start.startswith(_UTF16_MARKS):
                raise FastaError(name, "this is UTF-16 text", "save it as UTF-8")
            kind = compression(start)
            data = decompressed(raw, kind)
            text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape")
            lines = _CheckedLines(name, text, skip_invalid)
            for title, letters in SimpleFastaParser(lines):
                header = lines.headers.popleft()
                try:
                    record = _to_record(header, title, letters, report)
                except FastaError as fault:
                    if not skip_invalid:
                        raise
                    report.skip(fault)
                    continue
                report.count(record)
                yield record
            if not lines.headers_seen:
                raise FastaError(name, "the file is empty", "give a FASTA file with records")
            if path == STANDARD_INPUT:
                # Closing the wrapper would close standard input.
                text.detach()
    except EOFError:
        raise _error(name, lines, f"the {kind} data end too early", "copy the file again") from None
    except DAMAGED as fault:
        raise _damaged(name, lines, kind, fault) from None
    except FileNotFoundError:
        raise FastaError(name, "no such file", "check the path") from None
    except IsADirectoryError:
        raise FastaError(name, "this is a directory", "name the FASTA files in it") from None
    except OSError as fault:
        if fault.errno is None:
            raise _damaged(name, lines, kind, fault) from None
        reason = fault.strerror or str(fault)
        raise _error(
            name, lines, f"cannot be read ({reason})", "check the file and its permissions"
        ) from None


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
    opener = gzip.open if path.suffix == ".gz" else open
    with (
        replacement(path) as temporary,
        cast(TextIO, opener(temporary, "wt", encoding="utf-8", newline="\n")) as handle,
    ):
        _write_records(handle, records, width)


@dataclass
class _Header:
    """A header whose record the parser has not yet yielded.

    Attributes:
        place: Name of the file and number of the line.
        fault: First fault in the lines of its record.
    """

    place: str
    fault: FastaError | None = None


class _CheckedLines:
    """The lines of a FASTA text, checked and cleaned on their way to the parser.

    Attributes:
        number: The line last read, counted from 1; 0 before the first.
        headers: Headers whose records the parser has not yet yielded.
        headers_seen: Number of headers.
    """

    def __init__(self, name: str, text: TextIO, skip_invalid: bool) -> None:
        self.name = name
        self.number = 0
        self.headers: deque[_Header] = deque()
        self.headers_seen = 0
        self._text = text
        self._skip_invalid = skip_invalid
        self._record = ""
        self._stop_place: str | None = None

    @property
    def place(self) -> str:
        """Name of the file and number of the line last read."""
        return f"{self.name}:{self.number}"

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            self.number += 1
            if _BINARY.search(line):
                raise FastaError(
                    self.place,
                    "binary data or text that is not UTF-8",
                    "give FASTA text in UTF-8, plain or compressed",
                )
            if line.startswith(">"):
                self.headers.append(_Header(self.place))
                self.headers_seen += 1
                self._record = next(iter(line[1:].split()), "")
                self._stop_place = None
                yield line
            elif residues := "".join(line.split()):
                if not self.headers_seen:
                    raise FastaError(
                        self.place,
                        "not FASTA: the first line must begin with '>', not with "
                        f"{residues[:12]!a}",
                        "give a FASTA file",
                    )
                fault = self._fault(residues)
                if fault is None:
                    yield residues + "\n"
                elif not self._skip_invalid:
                    raise fault
                elif self.headers[-1].fault is None:
                    self.headers[-1].fault = fault

    def _fault(self, residues: str) -> FastaError | None:
        if illegal := _ILLEGAL.search(residues):
            letter = illegal.group()
            return FastaError(
                self.place, f"illegal letter {letter!a}", _remedy(letter), self._record
            )
        place = self._stop_place
        stop = residues.find("*")
        if place is None and stop >= 0:
            # Legal only if the record has no residue after it, which later lines tell.
            self._stop_place = self.place
            place = self.place if stop < len(residues) - 1 else None
        if place is None:
            return None
        return FastaError(
            place,
            "illegal letter '*' (a stop) before the end",
            "remove the record or cut it at the stop",
            self._record,
        )


def _to_record(header: _Header, title: str, letters: str, report: LetterReport) -> ProteinRecord:
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


def _remedy(letter: str) -> str:
    """Name the remedy for an illegal letter."""
    if letter in "-.":
        return "remove the gaps of the alignment"
    if letter.isdigit():
        return "remove the position numbers"
    if letter == ">":
        return "a header's '>' must be the first character of its line"
    return "only the letters A to Z and a final '*' are read as protein"


def _error(name: str, lines: _CheckedLines | None, problem: str, remedy: str) -> FastaError:
    """An error at the line last read, if any was."""
    return FastaError(lines.place if lines and lines.number else name, problem, remedy)


def _damaged(
    name: str, lines: _CheckedLines | None, kind: str | None, fault: Exception
) -> FastaError:
    return _error(name, lines, f"the {kind} data are corrupt ({fault})", "copy the file again")


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
