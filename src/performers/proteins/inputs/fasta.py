"""Protein FASTA files in and out, plain or gzip-compressed, with one policy for odd letters.

Biopython's ``SimpleFastaParser`` does the parsing; it reads through a line checker of ours, so that
every complaint names the file and the exact line.

The policy:

- The 20 standard amino acids and ``X B Z U O J`` are legal, that is, every letter from A to Z.
- Lower case is upper-cased; one ``*`` that ends a sequence is removed. Both are counted.
- White space inside sequence lines, blank lines, Windows and old Macintosh line ends, a UTF-8
  byte order mark and a missing final newline are ignored.
- Anything else in a sequence (a ``*`` inside it, gaps ``-`` and ``.``, digits, other symbols) is an
  error that names the line and the letter. So are a record without residues, a header without a
  name, text before the first header, and a file that is missing, empty, binary or a damaged gzip.
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
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TextIO, cast

from Bio.SeqIO.FastaIO import SimpleFastaParser

from performers.app.errors import UserError

__all__ = ["FastaError", "LetterReport", "ProteinRecord", "iter_fasta", "read_fasta", "write_fasta"]

_GZIP_MAGIC = b"\x1f\x8b"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_AMBIGUOUS = "XBZUOJ"
# Residues from which on nucleotides are suspected, and the least share of the letters that they
# are together (IUPAC codes of ambiguous bases are the rest) and that each of them is.
_NUCLEOTIDE_RESIDUES = 200
_NUCLEOTIDE_SHARE, _EACH_NUCLEOTIDE_SHARE = 0.9, 0.01
# Bytes that are not UTF-8 reach us as lone surrogates (errors="surrogateescape").
_BINARY = re.compile("[\x00\udc80-\udcff]")
_ILLEGAL = re.compile(r"[^A-Za-z*]")
_LOWER = re.compile(r"[a-z]")


class FastaError(UserError, ValueError):
    """A FASTA file that cannot be used: ``path:line: what is wrong; what to do``, in one line."""


@dataclass(frozen=True)
class ProteinRecord:
    """One protein.

    Attributes:
        name: The first word of the header.
        description: The rest of the header, without surrounding white space; may be empty.
        sequence: The residues, upper case, one letter each, at least one.
    """

    name: str
    description: str
    sequence: str


@dataclass
class LetterReport:
    """Counts of what was read, changed or is unusual.

    Attributes:
        records: Number of records.
        residues: Number of residues, after trailing ``*`` were removed.
        lower_case: Number of lower-case letters that were upper-cased.
        stops_removed: Number of trailing ``*`` that were removed.
        ambiguous: Count of each of the letters ``X B Z U O J`` that occurs.
        duplicate_names: Number of records whose name an earlier record already has.
    """

    records: int = 0
    residues: int = 0
    lower_case: int = 0
    stops_removed: int = 0
    ambiguous: dict[str, int] = field(default_factory=dict)
    duplicate_names: int = 0
    _names: set[str] = field(default_factory=set, repr=False, compare=False)
    _letters: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys("ACGTUNX", 0), repr=False, compare=False
    )

    @property
    def looks_like_nucleotides(self) -> bool:
        """True if the letters are those of DNA or RNA; see the module's policy."""
        if self.residues <= _NUCLEOTIDE_RESIDUES:
            return False
        a, c, g, t, u, n, x = self._letters.values()
        known = self.residues - n - x
        return (
            a + c + g + t + u >= _NUCLEOTIDE_SHARE * known
            and min(a, c, g, t + u) >= _EACH_NUCLEOTIDE_SHARE * known
            and known > 0
        )

    def summary(self) -> str | None:
        """Describe the oddities in one line; None where there are none."""
        parts = []
        if self.looks_like_nucleotides:
            share = sum(self._letters[letter] for letter in "ACGTUNX") / self.residues
            parts.append(
                f"warning: {share:.1%} of the letters are ACGTU, N or X, which looks like DNA or "
                "RNA, not protein; translate it first"
            )
        if self.lower_case:
            parts.append(f"{self.lower_case:,} lower-case letters read as upper case")
        if self.stops_removed:
            parts.append(f"{self.stops_removed:,} trailing '*' removed")
        if self.ambiguous:
            counts = ", ".join(f"{letter} {n:,}" for letter, n in sorted(self.ambiguous.items()))
            parts.append(f"non-standard letters kept: {counts}")
        if self.duplicate_names:
            parts.append(f"{self.duplicate_names:,} records repeat the name of an earlier one")
        return "; ".join(parts) or None

    def _count(self, record: ProteinRecord) -> None:
        self.records += 1
        self.residues += len(record.sequence)
        for letter in _AMBIGUOUS:
            if count := record.sequence.count(letter):
                self.ambiguous[letter] = self.ambiguous.get(letter, 0) + count
        for letter in self._letters:
            self._letters[letter] += record.sequence.count(letter)
        if record.name in self._names:
            self.duplicate_names += 1
        self._names.add(record.name)


def read_fasta(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> tuple[list[ProteinRecord], LetterReport]:
    """Read one or several FASTA files into memory.

    Args:
        paths: A path or a sequence of paths; each file is plain or gzip-compressed, which is told
            from its first bytes.

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
    records = [record for path in paths for record in iter_fasta(path, report)]
    return records, report


def iter_fasta(
    path: str | os.PathLike[str], report: LetterReport | None = None
) -> Iterator[ProteinRecord]:
    """Yield the records of one FASTA file, one in memory at a time.

    Args:
        path: The file, plain or gzip-compressed.
        report: Counts are added to it as records are yielded; one report may serve many files.

    Yields:
        The records in file order.

    Raises:
        FastaError: The file cannot be used; raised when the iteration reaches the fault.
    """
    path = Path(path)
    report = LetterReport() if report is None else report
    lines = None
    try:
        with path.open("rb") as raw:
            start = raw.peek(2)[:2]
            if start in _UTF16_MARKS:
                raise _error(path, None, "this is UTF-16 text", "save it as UTF-8")
            # gzip.GzipFile reads as a binary file does, though its type does not say so.
            data = cast(IO[bytes], gzip.GzipFile(fileobj=raw) if start == _GZIP_MAGIC else raw)
            text = io.TextIOWrapper(data, encoding="utf-8-sig", errors="surrogateescape")
            lines = _CheckedLines(path, text, report)
            for title, sequence in SimpleFastaParser(lines):
                record = _to_record(path, lines.headers.popleft(), title, sequence, report)
                report._count(record)
                yield record
            if not lines.any_header:
                raise _error(path, None, "the file is empty", "give a FASTA file with records")
    except EOFError:
        raise _error(path, lines, "the gzip data end too early", "copy the file again") from None
    except (gzip.BadGzipFile, zlib.error) as fault:
        raise _error(
            path, lines, f"the gzip data are corrupt ({fault})", "copy the file again"
        ) from None
    except FileNotFoundError:
        raise _error(path, None, "no such file", "check the path") from None
    except IsADirectoryError:
        raise _error(path, None, "this is a directory", "name the FASTA files in it") from None
    except OSError as fault:
        reason = fault.strerror or str(fault)
        raise _error(
            path, lines, f"cannot be read ({reason})", "check the file and its permissions"
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with cast(TextIO, opener(partial, "wt", encoding="utf-8", newline="\n")) as handle:
            _write_records(handle, records, width)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class _CheckedLines:
    """The lines of a FASTA text, checked and cleaned on their way to the parser.

    Attributes:
        number: The line last read, counted from 1; 0 before the first.
        headers: Line numbers of the headers whose records the parser has not yet yielded.
        any_header: Whether a header was seen.
    """

    def __init__(self, path: Path, text: TextIO, report: LetterReport) -> None:
        self.path = path
        self.number = 0
        self.headers: deque[int] = deque()
        self.any_header = False
        self._text = text
        self._report = report
        self._stop_line: int | None = None

    def __iter__(self) -> Iterator[str]:
        for line in self._text:
            self.number += 1
            if _BINARY.search(line):
                raise self._error(
                    "binary data or text that is not UTF-8",
                    "give FASTA text in UTF-8, plain or gzip",
                )
            if line.startswith(">"):
                self.headers.append(self.number)
                self.any_header = True
                self._stop_line = None
                yield line
            elif residues := "".join(line.split()):
                self._check(residues)
                yield residues + "\n"

    def _check(self, residues: str) -> None:
        if not self.any_header:
            raise self._error(
                f"not FASTA: the first line must begin with '>', not with {residues[:12]!a}",
                "give a FASTA file",
            )
        if illegal := _ILLEGAL.search(residues):
            letter = illegal.group()
            raise self._error(f"illegal letter {letter!a} in a sequence", _remedy(letter))
        if self._stop_line is not None:
            raise self._stop_inside(self._stop_line)
        stop = residues.find("*")
        if stop >= 0:
            if stop < len(residues) - 1:
                raise self._stop_inside(self.number)
            # Legal only if the record has no residue after it, which later lines tell.
            self._stop_line = self.number
        if not residues.isupper():
            self._report.lower_case += len(_LOWER.findall(residues))

    def _stop_inside(self, line: int) -> FastaError:
        return _error(
            self.path,
            line,
            "illegal letter '*' (a stop) inside a sequence",
            "remove the record or cut it at the stop",
        )

    def _error(self, problem: str, remedy: str) -> FastaError:
        return _error(self.path, self.number, problem, remedy)


def _to_record(
    path: Path, line: int, title: str, sequence: str, report: LetterReport
) -> ProteinRecord:
    """Build a record from what the parser yielded for the header on ``line``."""
    words = title.split(None, 1)
    if not words:
        raise _error(path, line, "the header has no name", "write a name right after '>'")
    if sequence.endswith("*"):
        sequence = sequence[:-1]
        report.stops_removed += 1
    if not sequence:
        raise _error(
            path, line, f"the record {words[0]!a} has no residues", "remove it or complete it"
        )
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


def _error(path: Path, where: int | _CheckedLines | None, problem: str, remedy: str) -> FastaError:
    """Build the one-line error; ``where`` is a line number or the lines being read."""
    line = where.number if isinstance(where, _CheckedLines) else where
    place = f"{path}:{line}" if line else str(path)
    return FastaError(f"{place}: {problem}; {remedy}")


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
