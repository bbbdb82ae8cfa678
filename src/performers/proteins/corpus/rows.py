"""Training rows of a corpus, cut when they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from performers.app.errors import UserError
from performers.proteins.corpus.shards import TokenShards


class ShardedRows(Dataset[dict[str, Any]]):
    """The rows that `split_windows` or `pack_sequences` would make, without holding any.

    Keys and examples are those of `TokenDataset`. What is in memory is a few numbers a sequence;
    tokens are read from the memory-mapped shards row by row, in any order.

    Args:
        shards: The sequences.
        max_length: Longest row in tokens.
        packed: Fill rows of ``max_length`` with the sequences laid end to end, in an order drawn
            with ``seed``; otherwise one window of one sequence a row.
        seed: Seed of that order.

    Raises:
        UserError: No row has two residues in it.
    """

    def __init__(
        self, shards: TokenShards, *, max_length: int, packed: bool = False, seed: int = 0
    ) -> None:
        self._shards = shards
        lengths = shards.lengths
        if packed:
            self._order = np.random.default_rng(seed).permutation(lengths.size)
            self._ends = np.cumsum(lengths[self._order])
            total = int(self._ends[-1]) if lengths.size else 0
            starts = np.arange(0, total, max_length)
            sizes = np.minimum(max_length, total - starts)
            sequences = np.zeros(0, dtype=np.int64)
        else:
            sequences, starts, sizes = _windows(lengths, max_length)
        self.packed = packed
        self.lengths: npt.NDArray[np.int64] = sizes
        """Tokens in each row, (rows,)."""
        # Where a row starts: in all sequences laid end to end, or in one of them.
        self._starts, self._sequences = starts, sequences
        keep = self._has_targets(max_length)
        self.lengths, self._starts = sizes[keep], starts[keep]
        if not packed:
            self._sequences = sequences[keep]
        if not self.lengths.size:
            raise UserError("the training sequences have no two residues in a row to learn from")

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        example: dict[str, Any] = {"index": index, "epoch": epoch}
        start, size = int(self._starts[index]), int(self.lengths[index])
        if self.packed:
            example["input_ids"], example["sequence_ids"] = self._packed(start, size)
        else:
            tokens = self._shards[int(self._sequences[index])]
            example["input_ids"] = tokens[start : start + size].astype(np.int16)
        return example

    def _packed(self, start: int, size: int) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int32]]:
        """Tokens ``start`` to ``start + size`` of all sequences laid end to end."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        pieces: list[npt.NDArray[np.int16]] = []
        ids: list[npt.NDArray[np.int32]] = []
        place = first
        while size:
            tokens = self._shards[int(self._order[place])]
            begin = start - (int(self._ends[place]) - tokens.size)
            piece = tokens[begin : begin + size].astype(np.int16)
            pieces.append(piece)
            ids.append(np.full(piece.size, place - first, dtype=np.int32))
            start, size, place = start + piece.size, size - piece.size, place + 1
        return np.concatenate(pieces), np.concatenate(ids)

    def _has_targets(self, max_length: int) -> npt.NDArray[np.bool_]:
        """Mask of the rows with at least two residues; all other tokens are begins and ends."""
        keep = np.ones(self.lengths.size, dtype=bool)
        if self.packed:
            # Every third token at least is a residue, even where all proteins are one long.
            short = range(len(keep)) if max_length < 8 else range(len(keep) - 1, len(keep))
            for row in short:
                tokens, _ = self._packed(int(self._starts[row]), int(self.lengths[row]))
                keep[row] = int((tokens > 4).sum()) > 1
            return keep
        begins = self._starts == 0
        ends = self._starts + self.lengths == self._shards.lengths[self._sequences]
        return np.asarray(self.lengths - begins - ends > 1)


def _windows(
    lengths: npt.NDArray[np.int64], max_length: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(sequence, start, size) of the fewest windows of each sequence, alike in size."""
    counts = -(-lengths // max_length)
    sequences = np.repeat(np.arange(lengths.size), counts)
    firsts = np.cumsum(counts) - counts
    window = np.arange(sequences.size) - firsts[sequences]
    base, longer = lengths // counts, lengths % counts
    starts = window * base[sequences] + np.minimum(window, longer[sequences])
    sizes = base[sequences] + (window < longer[sequences])
    return sequences, starts, sizes
