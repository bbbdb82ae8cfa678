"""Relatives that a protein is read with, and rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from performers.app.errors import UserError
from performers.proteins.inputs.families import family_row, fitting
from performers.proteins.inputs.packing import sequence_lengths
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import encode_sequences

_Tokens = npt.NDArray[np.integer[Any]]

# A relative has a residue between its begin and its end token.
_LEAST = 3


class Relatives:
    """Relatives of proteins, and the rows in which they are read.

    Where headers have ``family=NAME``, a protein's relatives are those of the family that its own
    header names, or of its own name; where none has, they are those of every protein. They precede
    the protein in the order that they are listed in, the first one next to it, until the row is
    full; the last may be cut at its end. A relative that is the protein, or a part of it, or holds
    it, is left out: the protein's hidden residues could be read from it.

    Args:
        records: Relatives, one or more.
        tokenizer: The model's tokenizer.
        max_tokens: Most tokens of a protein and its relatives.

    Attributes:
        max_tokens: Most tokens of a row.

    Raises:
        UserError: There are no relatives, or some headers name a family and some do not.
    """

    def __init__(
        self,
        records: Sequence[ProteinRecord],
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
    ) -> None:
        if not records:
            raise UserError("there is no relative; give a FASTA file with one at least")
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer
        families = [record.field("family") for record in records]
        self._by_family = families[0] is not None
        odd = next((n for n, x in enumerate(families) if (x is not None) != self._by_family), None)
        if odd is not None:
            raise UserError(
                f"of the relatives, {records[0].name!a} and {records[odd].name!a} differ: write "
                "family=NAME into each header, or into none where all are relatives of every "
                "protein"
            )
        self._members: dict[str | None, list[tuple[ProteinRecord, _Tokens]]] = {}
        tokens = encode_sequences(tokenizer, [record.sequence for record in records])
        for family, record, encoded in zip(families, records, tokens, strict=True):
            self._members.setdefault(family, []).append((record, encoded))
        self._counts: list[int] = []
        self._longest = self._copies = self._without_place = 0

    def rows(self, proteins: Sequence[ProteinRecord]) -> RelativesRows:
        """Rows of proteins and their relatives.

        Raises:
            UserError: A protein has no relative, or leaves no place for one.
        """
        encoded = encode_sequences(self._tokenizer, [protein.sequence for protein in proteins])
        return RelativesRows(encoded, [self._of(x)[0] for x in proteins])

    def count(self, protein: ProteinRecord) -> None:
        """Check that a protein has relatives, and count them for `summary`.

        Raises:
            UserError: The protein has no relative, or leaves no place for one.
        """
        relatives, copies, others = self._of(protein)
        self._counts.append(len(relatives))
        self._copies += copies
        self._without_place += others
        total = len(protein.sequence) + 2 + sum(len(x) for _, x in relatives)
        self._longest = max(self._longest, total)

    def summary(self) -> str:
        """Numbers of relatives and tokens of the proteins that were counted, in a line."""
        least, most = min(self._counts, default=0), max(self._counts, default=0)
        number = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        text = f"read with {number} relative{'s' * (most != 1)}, {self._longest:,} tokens at most"
        if self._copies:
            text += f"; {self._copies:,} that are the protein, or overlap with it whole, left out"
        if self._without_place:
            text += f"; {self._without_place:,} without a place in {self.max_tokens:,} tokens"
        return text

    def _of(self, protein: ProteinRecord) -> tuple[list[tuple[str, _Tokens]], int, int]:
        """Names and tokens of relatives in a row, and the numbers of copies and others left out."""
        family = (protein.field("family") or protein.name) if self._by_family else None
        members = self._members.get(family, [])
        sequence = protein.sequence
        others = [x for x in members if not overlap_whole(x[0].sequence, sequence)]
        copies = len(members) - len(others)
        if not others:
            of_family = f" of the family {family!a}" if family is not None else ""
            raise UserError(
                f"{protein.name!a} has no relative{of_family} in the file of relatives"
                + (f" but {copies:,} of its own copies or parts" if copies else "")
                + "; add some, or leave the protein out"
            )
        room = self.max_tokens - len(sequence) - 2
        if room < _LEAST:
            raise UserError(
                f"{protein.name!a} with its {len(sequence):,} residues leaves no place for "
                f"relatives in {self.max_tokens:,} tokens; raise --relatives-tokens"
            )
        tokens = fitting((tokens for _, tokens in others), room, _LEAST)
        names = (other.name for other, _ in others)
        return list(zip(names, tokens, strict=False)), copies, len(others) - len(tokens)


def overlap_whole(one: str, other: str) -> bool:
    """Return True if one of two sequences is the other or a part of it, but for ``X`` around it."""
    one, other = one.strip("X"), other.strip("X")
    return one in other or other in one


class RelativesRows(Dataset[dict[str, Any]]):
    """Rows of proteins after their relatives; keys are those of `TokenDataset`.

    Examples have the fields of `FamilyRows`; only residues of the protein may be predicted. The
    names and tokens of relatives come with the nearest to the protein first.

    Attributes:
        names: Names of the relatives of each protein.
        sizes: Tokens of the relatives of each, in the order of their names.
        lengths: Tokens of each row, (rows,).
        starts: Place of each protein's first token in its row, (rows,).
    """

    def __init__(
        self, proteins: Sequence[_Tokens], relatives: Sequence[Sequence[tuple[str, _Tokens]]]
    ) -> None:
        self._proteins = proteins
        self._relatives = [[tokens for _, tokens in row] for row in relatives]
        self.names = [[name for name, _ in row] for row in relatives]
        self.sizes = [[len(tokens) for tokens in row] for row in self._relatives]
        self.starts = np.array([sum(sizes) for sizes in self.sizes], dtype=np.int64)
        self.lengths = self.starts + sequence_lengths(proteins)

    def __len__(self) -> int:
        return len(self._proteins)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = key if isinstance(key, tuple) else (0, key)
        made = family_row(self._proteins[row], self._relatives[row])
        return {**made, "index": row, "epoch": epoch}
