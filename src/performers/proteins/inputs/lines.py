"""Lines of a FASTA text, checked before they are parsed."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

from performers.proteins.inputs.records import FastaError

# Bytes that are not UTF-8 reach us as lone surrogates (errors="surrogateescape").
_BINARY = re.compile("[\x00\udc80-\udcff]")
_ILLEGAL = re.compile(r"[^A-Za-z*]")


@dataclass
class Header:
    """A header whose record the parser has not yet yielded.

    Attributes:
        place: Name of the file and number of the line.
        fault: First fault in the lines of its record.
    """

    place: str
    fault: FastaError | None = None


class CheckedLines:
    """The lines of a FASTA text, checked and cleaned on their way to the parser.

    Attributes:
        number: The line last read, counted from 1; ``before`` the first, the lines before it.
        skip_invalid: Whether records at fault are left out.
        headers: Headers whose records the parser has not yet yielded.
        headers_seen: Number of headers.
    """

    def __init__(self, name: str, text: TextIO, skip_invalid: bool, before: int = 0) -> None:
        self.name = name
        self.number = before
        self.headers: deque[Header] = deque()
        self.headers_seen = 0
        self._text = text
        self.skip_invalid = skip_invalid
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
                self.headers.append(Header(self.place))
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
                elif not self.skip_invalid:
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


def _remedy(letter: str) -> str:
    """Name the remedy for an illegal letter."""
    if letter in "-.":
        return "remove the gaps of the alignment"
    if letter.isdigit():
        return "remove the position numbers"
    if letter == ">":
        return "a header's '>' must be the first character of its line"
    return "only the letters A to Z and a final '*' are read as protein"
