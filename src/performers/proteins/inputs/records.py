"""Protein records, and counts of what was read, changed or is unusual in their files."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from performers.app.errors import UserError

_T = TypeVar("_T")
_AMBIGUOUS = "XBZUOJ"
# And nucleotides.
_COUNTED = _AMBIGUOUS + "NACGT"
# Residues from which on nucleotides are suspected, and the least share of the letters that they
# are together (IUPAC codes of ambiguous bases are the rest) and that each of them is.
_NUCLEOTIDE_RESIDUES = 200
_NUCLEOTIDE_SHARE, _EACH_NUCLEOTIDE_SHARE = 0.9, 0.01
_FIELD = re.compile(r"(?:^|\s)(\w+)=(\S+)")
# Databases whose identifiers are written database|accession|name.
_ACCESSION = re.compile(r"(?:sp|tr|gb|emb|dbj|ref)\|([^|]+)\|[^|]*")


class FastaError(UserError, ValueError):
    """A FASTA file that cannot be used: ``path:line: what is wrong; what to do``, in one line.

    Attributes:
        place: The path, and the line where there is one.
        problem: The fault, in the same words for all records with it.
    """

    def __init__(self, place: str, problem: str, remedy: str, record: str | None = None) -> None:
        where = "" if record is None else f" in the record {record!a}"
        super().__init__(f"{place}: {problem}{where}; {remedy}")
        self.place = place
        self.problem = problem


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

    @property
    def accession(self) -> str:
        """The accession in a name such as ``sp|P12345|NAME_HUMAN``; other names as they are."""
        match = _ACCESSION.fullmatch(self.name)
        return match[1] if match else self.name

    @property
    def header(self) -> str:
        """The header without its ``>``."""
        return f"{self.name} {self.description}".rstrip()

    def field(self, name: str) -> str | None:
        """Value of the first ``name=value`` in the header, or None."""
        return next((value for key, value in _FIELD.findall(self.description) if key == name), None)

    def look_up(self, table: Mapping[str, _T]) -> _T | None:
        """Entry of a table under the name or else the accession; None where there is neither."""
        return table.get(self.name, table.get(self.accession))


@dataclass
class LetterReport:
    """Counts of what was read, changed or is unusual.

    Attributes:
        records: Number of records.
        residues: Number of residues, after trailing ``*`` were removed.
        longest: Residues of the longest record.
        lower_case: Number of lower-case letters that were upper-cased.
        stops_removed: Number of trailing ``*`` that were removed.
        duplicate_names: Number of records whose name an earlier record already has.
        skipped: Number of records left out for each fault, and the place of the first.
    """

    records: int = 0
    residues: int = 0
    longest: int = 0
    lower_case: int = 0
    stops_removed: int = 0
    duplicate_names: int = 0
    skipped: dict[str, tuple[int, str]] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set, repr=False, compare=False)
    _letters: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    @property
    def ambiguous(self) -> dict[str, int]:
        """Count of each of the letters ``X B Z U O J`` that occurs."""
        return {letter: n for letter in _AMBIGUOUS if (n := self._letters[letter])}

    @property
    def looks_like_nucleotides(self) -> bool:
        """True if the letters are those of DNA or RNA; see the module's policy."""
        if self.residues <= _NUCLEOTIDE_RESIDUES:
            return False
        a, c, g, t, u, n, x = map(self._letters.__getitem__, "ACGTUNX")
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

    def skips(self) -> str | None:
        """Describe the records that were left out in one line; None where there are none."""
        if not self.skipped:
            return None
        reasons = ", ".join(
            f"{problem} {count:,} (first at {place})"
            for problem, (count, place) in self.skipped.items()
        )
        total = sum(count for count, _ in self.skipped.values())
        return f"{total:,} record{'s' * (total > 1)} skipped: {reasons}"

    def skip(self, fault: FastaError) -> None:
        """Count a record that is left out."""
        count, place = self.skipped.get(fault.problem, (0, fault.place))
        self.skipped[fault.problem] = (count + 1, place)

    def count(self, record: ProteinRecord) -> None:
        """Count a record."""
        self.records += 1
        self.residues += len(record.sequence)
        self.longest = max(self.longest, len(record.sequence))
        for letter in _COUNTED:
            self._letters[letter] += record.sequence.count(letter)
        self.duplicate_names += record.name in self._names
        self._names.add(record.name)
