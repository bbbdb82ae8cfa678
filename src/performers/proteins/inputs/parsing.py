"""Lines of a FASTA text, checked and made into records."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from performers.proteins.inputs.records import FastaError, LetterReport, ProteinRecord

# Bytes that are not UTF-8 reach us as lone surrogates (errors="surrogateescape").
_BINARY = re.compile("[\x00\udc80-\udcff]")
# A stop is legal at the end of a record.
_ILLEGAL = re.compile(r"[^A-Za-z*]|\*(?=.)")
_LOWER = re.compile(r"[a-z]")

# A header or residues, without white space around or in it, and the number of its line.
_Line = tuple[int, str]


@dataclass
class Place:
    """File and the number of the line last read, for messages."""

    name: str
    number: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.number}" if self.number else self.name


def parse(
    lines: Iterable[str], place: Place, report: LetterReport, *, skip_invalid: bool
) -> Iterator[ProteinRecord]:
    """Yield the records of the lines of a text, counted in a report.

    ``place`` is that of the line before the first, and moves with the lines.

    Raises:
        FastaError: The text is no FASTA, or a record is at fault.
    """
    for header, *body in _records(lines, place):
        try:
            record = _checked(header, body, place.name, report)
        except FastaError as fault:
            if not skip_invalid:
                raise
            report.skip(fault)
        else:
            report.count(record)
            yield record


def _records(lines: Iterable[str], place: Place) -> Iterator[list[_Line]]:
    """Yield the lines of each record, the header first."""
    record: list[_Line] = []
    for line in lines:
        place.number += 1
        if _BINARY.search(line):
            raise FastaError(
                str(place),
                "binary data or text that is not UTF-8",
                "give FASTA text in UTF-8, plain or compressed",
            )
        if line.startswith(">"):
            if record:
                yield record
            record = [(place.number, line[1:].strip())]
        elif residues := "".join(line.split()):
            if not record:
                raise FastaError(
                    str(place),
                    f"not FASTA: the first line must begin with '>', not with {residues[:12]!a}",
                    "give a FASTA file",
                )
            record.append((place.number, residues))
    if not record:
        raise FastaError(place.name, "the file is empty", "give a FASTA file with records")
    yield record


def _checked(header: _Line, body: list[_Line], file: str, report: LetterReport) -> ProteinRecord:
    """The record of some lines; what is changed in it is counted."""
    name, description = [*header[1].split(maxsplit=1), "", ""][:2]
    letters = "".join(residues for _, residues in body)
    if illegal := _ILLEGAL.search(letters):
        ends = [*accumulate(len(residues) for _, residues in body)]
        number, _ = body[bisect_right(ends, illegal.start())]
        problem = f"illegal letter {illegal.group()!a}"
        if illegal.group() == "*":
            problem += " (a stop) before the end"
        raise FastaError(f"{file}:{number}", problem, _remedy(illegal.group()), name)
    place = f"{file}:{header[0]}"
    if not name:
        raise FastaError(place, "the header has no name", "write a name right after '>'")
    sequence = letters.removesuffix("*")
    if not sequence:
        raise FastaError(place, "no residues", "remove it or complete it", name)
    report.stops_removed += len(letters) - len(sequence)
    if not sequence.isupper():
        report.lower_case += len(_LOWER.findall(sequence))
    return ProteinRecord(name, description, sequence.upper())


def _remedy(letter: str) -> str:
    """Name the remedy for an illegal letter."""
    if letter == "*":
        return "remove the record or cut it at the stop"
    if letter in "-.":
        return "remove the gaps of the alignment"
    if letter.isdigit():
        return "remove the position numbers"
    if letter == ">":
        return "a header's '>' must be the first character of its line"
    return "only the letters A to Z and a final '*' are read as protein"
