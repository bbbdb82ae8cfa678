"""Training rows from token sequences: packing, windows, the data set and its batch sampler.

A token sequence is a 1-D integer array that carries its own begin and end tokens, as
`encode_sequences` makes them. Sequences become rows of a `TokenDataset` in one of two ways: packed
ones fill rows of one length without any padding; windows only cut what is too long, and
`LengthBucketedBatchSampler` then keeps padding low by batching similar lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import SPECIAL_TOKENS

_Tokens = npt.NDArray[np.integer[Any]]
_Numbers = npt.NDArray[np.int64]

_POOL_BATCHES = 50


def window_places(lengths: _Numbers, max_length: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    """Sequence, start and size of the fewest windows of at most ``max_length`` tokens.

    The windows of a sequence follow each other, and their sizes differ by at most one, so that none
    is a mere remainder; only the first has its begin token and only the last its end token.
    """
    counts = -(-lengths // max_length)
    sequences = np.repeat(np.arange(lengths.size), counts)
    window = np.arange(sequences.size) - (np.cumsum(counts) - counts)[sequences]
    base, longer = lengths // counts, lengths % counts
    starts = window * base[sequences] + np.minimum(window, longer[sequences])
    return sequences, starts, base[sequences] + (window < longer[sequences])


def learnable_windows(lengths: _Numbers, max_length: int) -> tuple[_Numbers, _Numbers, _Numbers]:
    """The `window_places` of windows with two residues at least, of which one can be predicted."""
    sequences, starts, sizes = window_places(lengths, max_length)
    ends = starts + sizes == lengths[sequences]
    keep = sizes - (starts == 0) - ends > 1
    return sequences[keep], starts[keep], sizes[keep]


def sequence_lengths(sequences: Sequence[_Tokens]) -> _Numbers:
    """Tokens of each sequence; token files know them without being read."""
    known: _Numbers | None = getattr(sequences, "lengths", None)
    if known is not None:
        return known
    return np.array([len(sequence) for sequence in sequences], dtype=np.int64)


class TokenDataset(Dataset[dict[str, Any]]):
    """Rows of token sequences as a map-style data set, cut when they are asked for.

    ``dataset[index]`` is ``{"input_ids", "index", "epoch": 0}``; ``dataset[epoch, index]`` is the
    same with that epoch. Collators draw what is random from epoch and index, so whoever yields the
    keys, a batch sampler, decides it; no worker or copy needs to be told which epoch it is in.

    Packed rows also have ``"sequence_ids"``: for each token the sequence that it belongs to,
    (length,), int32, counted from 0 in each row. A sequence may be cut and continue in the next
    row; no token is lost, added or moved.

    Args:
        sequences: Token sequences in memory, or a split of a corpus, which stays on disk.
        max_length: Longest row in tokens; by default a row is a sequence.
        packed: Fill rows of ``max_length`` with the sequences laid end to end; the last row may be
            shorter. Otherwise a row is a window of one sequence.
        seed: Seed of the order in which sequences are packed; by default they keep their order.
        learnable: Leave out rows of fewer than two residues, which have nothing to predict.

    Raises:
        ValueError: There is no sequence, one is empty, or ``max_length`` is below 1.
        UserError: All rows are left out.
    """

    def __init__(
        self,
        sequences: Iterable[_Tokens],
        *,
        max_length: int | None = None,
        packed: bool = False,
        seed: int | None = None,
        learnable: bool = False,
    ) -> None:
        self._sequences = sequences if isinstance(sequences, Sequence) else list(sequences)
        lengths = sequence_lengths(self._sequences)
        if not lengths.all():
            raise ValueError(f"sequences: {int(lengths.argmin())} is empty; leave it out")
        max_length = int(lengths.max(initial=1)) if max_length is None else max_length
        if max_length < 1:
            raise ValueError(f"max_length: expected at least 1 token, got {max_length}")
        self._packed = packed
        if packed:
            self._order = np.arange(lengths.size)
            if seed is not None:
                self._order = np.random.default_rng(seed).permutation(lengths.size)
            self._ends = np.cumsum(lengths[self._order])
            starts = np.arange(0, lengths.sum(), max_length)
            sizes = np.minimum(max_length, lengths.sum() - starts)
            # Where a row starts: in all sequences laid end to end, or in one of them.
            self._starts, self.lengths = starts, sizes
            if learnable:
                keep = self._packed_learnable(max_length)
                self._starts, self.lengths = starts[keep], sizes[keep]
        else:
            places = learnable_windows if learnable else window_places
            self.sequence_of_row, self._starts, self.lengths = places(lengths, max_length)
        if learnable and not len(self):
            raise UserError("the training sequences have no two residues in a row to learn from")
        if not len(self):
            raise ValueError("sequences: expected at least one row, got none")

    lengths: _Numbers
    """Tokens in each row, (rows,)."""

    sequence_of_row: _Numbers
    """Index of the sequence that a row is a window of, (rows,)."""

    def __len__(self) -> int:
        return int(self.lengths.size)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        start, size = int(self._starts[index]), int(self.lengths[index])
        if self._packed:
            row = self._packed_row(start, size)
        else:
            sequence = np.asarray(self._sequences[int(self.sequence_of_row[index])])
            row = {"input_ids": sequence[start : start + size]}
        return {**row, "index": index, "epoch": epoch}

    def _packed_row(self, start: int, size: int) -> dict[str, Any]:
        """Tokens ``start`` to ``start + size`` of all sequences laid end to end."""
        first = place = int(np.searchsorted(self._ends, start, side="right"))
        pieces = []
        while size:
            tokens = self._sequences[int(self._order[place])]
            begin = start - (int(self._ends[place]) - len(tokens))
            pieces.append(tokens[begin : begin + size])
            start, size, place = start + len(pieces[-1]), size - len(pieces[-1]), place + 1
        ids = np.arange(place - first, dtype=np.int32)
        return {
            "input_ids": np.concatenate(pieces),
            "sequence_ids": np.repeat(ids, [len(piece) for piece in pieces]),
        }

    def _packed_learnable(self, max_length: int) -> npt.NDArray[np.bool_]:
        keep = np.ones(len(self), dtype=bool)
        # Every third token at least is a residue, even where all proteins are one long.
        short = range(len(keep)) if max_length < 8 else range(len(keep) - 1, len(keep))
        for row in short:
            tokens = self[row]["input_ids"]
            keep[row] = np.count_nonzero(tokens >= len(SPECIAL_TOKENS)) > 1
        return keep


class LengthBucketedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of rows of similar lengths, as (epoch, index) keys of a `TokenDataset`.

    An epoch is shuffled by a generator seeded with (seed, epoch), cut into pools of about 50
    batches, sorted by length within a pool, cut into batches, and the batches are shuffled. Every
    row is in exactly one batch of an epoch. Order and contents depend on the arguments alone.

    With ``num_batches`` one iteration runs through as many epochs as it takes to yield exactly so
    many batches. This is how to train: the whole run is then one pass of the data loader, and
    resuming is skipping batches. Multiply by accumulation steps and processes as needed.

    Args:
        lengths: Tokens in each row, (rows,), such as ``TokenDataset.lengths``.
        max_tokens: Tokens in a batch with its padding: rows times the longest row.
        seed: Seed of the shuffling, at least 0.
        num_batches: Batches in an iteration; None: one epoch.
        shuffle: False keeps the rows sorted by length, longest first, without pools: for
            evaluation, with the least padding, and out of memory at once or never.
        copies: Mean number of times that each row is in an epoch, (rows,); by default each is in it
            once. Copies have numbers of epochs of their own, so that they differ in what is random.

    Raises:
        ValueError: A row is longer than ``max_tokens``.
    """

    def __init__(
        self,
        lengths: _Numbers,
        *,
        max_tokens: int,
        seed: int = 0,
        num_batches: int | None = None,
        shuffle: bool = True,
        copies: npt.NDArray[np.floating[Any]] | None = None,
    ) -> None:
        longest = int(lengths.argmax())
        if lengths[longest] > max_tokens:
            raise ValueError(
                f"max_tokens: row {longest} has {lengths[longest]} tokens, more than {max_tokens}; "
                "raise max_tokens or cut long sequences into windows"
            )
        self._lengths, self._max_tokens, self._seed = lengths, max_tokens, seed
        self._num_batches, self._shuffle, self._copies = num_batches, shuffle, copies
        self._most_copies = 1 if copies is None else int(copies.max()) + 1

    def __len__(self) -> int:
        """Batches in an iteration; later epochs may have a few more or fewer."""
        return self._num_batches or len(self._epoch_batches(0))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epochs = range(1) if self._num_batches is None else count()
        batches = (
            [(number, row) for number, row in batch.tolist()]
            for epoch in epochs
            for batch in self._epoch_batches(epoch)
        )
        return islice(batches, self._num_batches)

    def _epoch_batches(self, epoch: int) -> list[_Numbers]:
        """The keys of each batch, (rows, 2)."""
        numbers = np.full(self._lengths.size, epoch * self._most_copies)
        rows = np.arange(self._lengths.size)
        if not self._shuffle:
            return self._cut(np.stack((numbers, rows), axis=1))
        random = np.random.default_rng((self._seed, epoch))
        if self._copies is not None:
            counts = np.floor(self._copies + random.random(rows.size)).astype(np.int64)
            first = np.repeat(np.cumsum(counts) - counts, counts)
            rows, numbers = np.repeat(rows, counts), np.repeat(numbers, counts)
            numbers += np.arange(rows.size) - first
        keys = np.stack((numbers, rows), axis=1)[random.permutation(rows.size)]
        batches = []
        mean = float(self._lengths[rows].mean())
        pool_size = max(1, round(self._max_tokens / mean * _POOL_BATCHES))
        for start in range(0, len(keys), pool_size):
            batches += self._cut(keys[start : start + pool_size])
        return [batches[i] for i in random.permutation(len(batches))]

    def _cut(self, keys: _Numbers) -> list[_Numbers]:
        """Sort rows from long to short, those of one length as they are, and cut into batches."""
        keys = keys[np.argsort(-self._lengths[keys[:, 1]], kind="stable")]
        batches = []
        start = 0
        while start < len(keys):
            size = self._max_tokens // int(self._lengths[keys[start, 1]])
            batches.append(keys[start : start + size])
            start += len(batches[-1])
        return batches
