"""Lines of a FASTA text, checked and made into records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from performers.proteins.inputs.records import FastaError, LetterReport, ProteinRecord

# Bytes that are not UTF-8 reach us as lone surrogates (errors="surrogateescape").
_BINARY = re.compile("[\x00\udc80-\udcff]")
_ILLEGAL = re.compile(r"[^A-Za-z*]")
_LOWER = re.compile(r"[a-z]")


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
    draft = None
    for line in lines:
        place.number += 1
        if _BINARY.search(line):
            raise FastaError(
                str(place),
                "binary data or text that is not UTF-8",
                "give FASTA text in UTF-8, plain or compressed",
            )
        if line.startswith(">"):
            if draft is not None:
                yield from _finished(draft, report, skip_invalid)
            draft = _Draft(str(place), line[1:].strip().split(maxsplit=1))
        elif residues := "".join(line.split()):
            if draft is None:
                raise FastaError(
                    str(place),
                    f"not FASTA: the first line must begin with '>', not with {residues[:12]!a}",
                    "give a FASTA file",
                )
            draft.add(residues, place)
            if draft.fault is not None and not skip_invalid:
                raise draft.fault
    if draft is None:
        raise FastaError(place.name, "the file is empty", "give a FASTA file with records")
    yield from _finished(draft, report, skip_invalid)


@dataclass
class _Draft:
    """A record whose lines are read: its place, name and description, and its first fault."""

    place: str
    header: list[str]
    parts: list[str] = field(default_factory=list)
    fault: FastaError | None = None
    stop: str | None = None

    def add(self, residues: str, place: Place) -> None:
        """Add a line without white space."""
        self.parts.append(residues)
        if illegal := _ILLEGAL.search(residues):
            letter = illegal.group()
            self._find(str(place), f"illegal letter {letter!a}", _remedy(letter))
            return
        stop = residues.find("*")
        # Legal only if the record has no residue after it, which later lines tell.
        is_inside = self.stop is not None or 0 <= stop < len(residues) - 1
        if stop >= 0 and self.stop is None:
            self.stop = str(place)
        if is_inside and self.stop is not None:
            self._find(
                self.stop,
                "illegal letter '*' (a stop) before the end",
                "remove the record or cut it at the stop",
            )

    def _find(self, place: str, problem: str, remedy: str) -> None:
        name = self.header[0] if self.header else ""
        self.fault = self.fault or FastaError(place, problem, remedy, name)

    def record(self, report: LetterReport) -> ProteinRecord:
        """The record; what is changed in it is counted."""
        if self.fault is not None:
            raise self.fault
        if not self.header:
            raise FastaError(self.place, "the header has no name", "write a name right after '>'")
        letters = "".join(self.parts)
        sequence = letters.removesuffix("*")
        if not sequence:
            raise FastaError(self.place, "no residues", "remove it or complete it", self.header[0])
        report.stops_removed += len(letters) - len(sequence)
        if not sequence.isupper():
            report.lower_case += len(_LOWER.findall(sequence))
        description = self.header[1] if len(self.header) > 1 else ""
        return ProteinRecord(self.header[0], description, sequence.upper())


def _finished(draft: _Draft, report: LetterReport, skip_invalid: bool) -> Iterator[ProteinRecord]:
    try:
        record = draft.record(report)
    except FastaError as fault:
        if not skip_invalid:
            raise
        report.skip(fault)
        return
    report.count(record)
    yield record


def _remedy(letter: str) -> str:
    """Name the remedy for an illegal letter."""
    if letter in "-.":
        return "remove the gaps of the alignment"
    if letter.isdigit():
        return "remove the position numbers"
    if letter == ">":
        return "a header's '>' must be the first character of its line"
    return "only the letters A to Z and a final '*' are read as protein"
