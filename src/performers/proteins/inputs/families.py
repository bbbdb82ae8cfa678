"""Training rows of proteins with their relatives, unaligned, in one context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from performers.app.errors import UserError
from performers.proteins.inputs.packing import learnable_windows, sequence_lengths
from performers.proteins.inputs.records import ProteinRecord

# Beside the seed, where rows draw with their epoch and index.
_ALONE = 2**32 - 1

_Tokens = npt.NDArray[np.integer[Any]]


class ProteinFamilies(NamedTuple):
    """Proteins and the family of each.

    Attributes:
        tokens: Token sequences with their begin and end tokens.
        names: Name of the family of each.
    """

    tokens: Sequence[_Tokens]
    names: Sequence[str]


def header_families(records: Sequence[ProteinRecord]) -> list[str]:
    """Families of proteins by ``family=NAME`` in their headers.

    Raises:
        UserError: A header has none.
    """
    families = []
    for record in records:
        family = record.field("family")
        if family is None:
            raise UserError(
                f"--families: the header of {record.name!a} names no family; write family=NAME "
                "in each, or train on a corpus of performers data"
            )
        families.append(family)
    return families


class FamilyRows(Dataset[dict[str, Any]]):
    """Rows of a protein and relatives of it, laid end to end.

    There is a row for each protein, or window of one that is longer than ``max_length``. Members of
    its family precede it in random order until the row has ``max_length`` tokens; the first of them
    may be cut at its end. Begin and end tokens separate the members.

    Keys are those of `TokenDataset`. An example has ``input_ids``, ``index`` and ``epoch``, and

    - ``position_ids``: positions that restart at 0 in each member, (length,);
    - ``may_be_target``: whether a token may be predicted, (length,): all but the first token of
      each member, or those of the protein itself.

    The row is a function of the seed, the epoch and the index alone. No ``sequence_ids`` are given:
    members attend to each other. Proteins are best distinct: a copy shows what is hidden.

    Args:
        proteins: The proteins, one or more.
        max_length: Most tokens of a row.
        hidden: Members that may have targets: ``"all"``, or the protein itself (``"one"``).
        relatives: Proteins that relatives are drawn from; None: the other ones of ``proteins``.
        max_relatives: Most relatives in a row; None: as many as ``max_length`` allows. The
            relatives of a smaller number are the last ones of a larger number.
        alone: Share of the rows that have no relatives, drawn once for all epochs.
        seed: Seed of the draws, at least 0.

    Raises:
        ValueError: Names do not fit, or no row has two residues.
    """

    def __init__(
        self,
        proteins: ProteinFamilies,
        *,
        max_length: int,
        hidden: str = "all",
        relatives: ProteinFamilies | None = None,
        max_relatives: int | None = None,
        alone: float = 0.0,
        seed: int = 0,
    ) -> None:
        for argument, given in (("proteins", proteins), ("relatives", relatives)):
            if given is not None and len(given.tokens) != len(given.names):
                raise ValueError(
                    f"{argument} has {len(given.tokens)} token sequences and {len(given.names)} "
                    "names of families; give one for each"
                )
        self._proteins = proteins
        self._among_themselves = relatives is None
        self._relatives = proteins if relatives is None else relatives
        self._max_length, self._max_relatives = max_length, max_relatives
        self._hidden, self._seed = hidden, seed
        members: dict[str, list[int]] = {}
        for index, name in enumerate(self._relatives.names):
            members.setdefault(name, []).append(index)
        self._members = {name: np.array(group) for name, group in members.items()}
        places = learnable_windows(sequence_lengths(proteins.tokens), max_length)
        self.sequence_of_row = places[0]
        """Index of the protein of each row, (rows,)."""
        self._windows = list(zip(*(place.tolist() for place in places), strict=True))
        if not self._windows:
            raise ValueError("proteins: no row has two residues in it to learn from")
        self._alone = np.random.default_rng((self._seed, _ALONE)).random(len(self)) < alone
        self.lengths: npt.NDArray[np.int64] = self._most_tokens()
        """Most tokens of each row, (rows,); the tokens, without ``max_relatives``."""

    def _most_tokens(self) -> npt.NDArray[np.int64]:
        lengths = sequence_lengths(self._relatives.tokens)
        rows = []
        for (index, _, size), alone in zip(self._windows, self._alone, strict=True):
            name = self._proteins.names[index]
            others = lengths[self._members.get(name, [])]
            total = int(others.sum()) - (int(lengths[index]) if self._among_themselves else 0)
            if self._max_relatives is not None:
                total = min(total, self._max_relatives * int(others.max(initial=0)))
            rows.append(size if alone else min(self._max_length, size + total))
        return np.array(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, row = key if isinstance(key, tuple) else (0, key)
        index, start, size = self._windows[row]
        protein = np.asarray(self._proteins.tokens[index])[start : start + size]
        random = np.random.default_rng((self._seed, epoch, row))
        pool = random.permutation(self._members.get(self._proteins.names[index], []))
        if self._among_themselves:
            pool = pool[pool != index]
        most = 0 if self._alone[row] else self._max_relatives
        relatives = (np.asarray(self._relatives.tokens[x]) for x in pool[:most].tolist())
        chosen = fitting(relatives, self._max_length - protein.size)
        made = family_row(protein, chosen, hidden=self._hidden)
        return {**made, "index": row, "epoch": epoch}


def family_row(
    protein: _Tokens, relatives: Sequence[_Tokens], *, hidden: str = "one"
) -> dict[str, Any]:
    """Tokens of a protein after those of its relatives, the nearest of which comes first.

    See `FamilyRows` for the keys.
    """
    pieces = [*reversed(relatives), protein]
    positions = np.concatenate([np.arange(piece.size) for piece in pieces])
    allowed = positions > 0
    if hidden == "one":
        allowed[: -protein.size] = False
    return {
        "input_ids": np.concatenate(pieces).astype(np.int16),
        "position_ids": positions,
        "may_be_target": allowed,
    }


def fitting(relatives: Iterable[_Tokens], room: int, least: int = 1) -> list[_Tokens]:
    """The first relatives that together have a place; the last is cut, to ``least`` at least."""
    pieces: list[_Tokens] = []
    for relative in relatives:
        if room < least:
            break
        pieces.append(relative[:room])
        room -= pieces[-1].size
    return pieces
