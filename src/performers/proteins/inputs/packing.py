"""Training rows from token sequences: packing, windows, the data set and its batch sampler.

A token sequence is a 1-D integer array that carries its own begin and end tokens, as
`encode_sequences` makes them. Sequences become rows in one of two ways: `pack_sequences` fills rows
of one length without any padding; `split_windows` only cuts what is too long, and
`LengthBucketedBatchSampler` then keeps padding low by batching similar lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

__all__ = [
    "LengthBucketedBatchSampler",
    "PackedRow",
    "TokenDataset",
    "pack_sequences",
    "split_windows",
]

_Tokens = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PackedRow:
    """A row cut from concatenated sequences.

    Attributes:
        input_ids: The tokens, (length,).
        sequence_ids: For each token the sequence that it belongs to, (length,), int32, counted from
            0 in each row and never decreasing.
    """

    input_ids: _Tokens
    sequence_ids: npt.NDArray[np.int32]


def pack_sequences(token_sequences: Sequence[_Tokens], row_length: int) -> list[PackedRow]:
    """Concatenate sequences in order and cut them into rows of one length.

    A sequence may be cut and continue in the next row. No token is lost, added or moved.

    Args:
        token_sequences: Non-empty token sequences, with their begin and end tokens.
        row_length: Tokens in a row, at least 1; the last row may be shorter.

    Returns:
        The rows.

    Raises:
        ValueError: ``row_length`` is below 1, or a sequence is empty.
    """
    if row_length < 1:
        raise ValueError(f"row_length: expected at least 1 token, got {row_length}")
    if not token_sequences:
        return []
    lengths = _lengths(token_sequences)
    tokens = np.concatenate(token_sequences)
    sequence_ids = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
    rows = []
    for start in range(0, tokens.size, row_length):
        ids = sequence_ids[start : start + row_length]
        rows.append(PackedRow(tokens[start : start + row_length], ids - ids[0]))
    return rows


def split_windows(token_sequence: _Tokens, max_length: int) -> list[_Tokens]:
    """Split a sequence into the fewest consecutive windows of at most ``max_length`` tokens.

    The windows' lengths differ by at most one, so that no window is a mere remainder. Joined, they
    give the sequence back; only the first has its begin token and only the last its end token.

    Args:
        token_sequence: The tokens, (length,).
        max_length: The longest window in tokens, at least 1.

    Returns:
        The windows, views of the sequence; the sequence itself if it is short enough.

    Raises:
        ValueError: ``max_length`` is below 1.
    """
    if max_length < 1:
        raise ValueError(f"max_length: expected at least 1 token, got {max_length}")
    count = max(1, -(-len(token_sequence) // max_length))
    return list(np.array_split(token_sequence, count))


class TokenDataset(Dataset[dict[str, Any]]):
    """Token rows as a map-style data set.

    ``dataset[index]`` is ``{"input_ids", "index", "epoch": 0}``, with ``"sequence_ids"`` for packed
    rows; ``dataset[epoch, index]`` is the same with that epoch. Collators draw what is random from
    epoch and index, so whoever yields the keys, a batch sampler, decides it; no worker or copy
    needs to be told which epoch it is in.

    Args:
        rows: Token sequences or windows, or packed rows; not a mix of both.

    Raises:
        ValueError: ``rows`` is empty, has an empty row, or mixes packed rows with others.
    """

    def __init__(self, rows: Iterable[_Tokens | PackedRow]) -> None:
        self._input_ids: list[_Tokens] = []
        self._sequence_ids: list[npt.NDArray[np.int32]] = []
        for row in rows:
            if isinstance(row, PackedRow):
                self._input_ids.append(row.input_ids)
                self._sequence_ids.append(row.sequence_ids)
            else:
                self._input_ids.append(np.asarray(row))
        if not self._input_ids:
            raise ValueError("rows: expected at least one row of tokens, got none")
        if len(self._sequence_ids) not in (0, len(self._input_ids)):
            raise ValueError(
                f"rows: {len(self._sequence_ids)} of {len(self._input_ids)} are packed rows; "
                "give packed rows only, or none"
            )
        self.lengths: npt.NDArray[np.int64] = _lengths(self._input_ids)
        """Tokens in each row, (rows,)."""

    def __len__(self) -> int:
        return len(self._input_ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        example = {"input_ids": self._input_ids[index], "index": index, "epoch": epoch}
        if self._sequence_ids:
            example["sequence_ids"] = self._sequence_ids[index]
        return example


class LengthBucketedBatchSampler(Sampler[list[tuple[int, int]]]):
    """Shuffled batches of rows of similar lengths, as (epoch, index) keys of a `TokenDataset`.

    An epoch is shuffled by a generator seeded with (seed, epoch), cut into pools of about
    ``pool_batches`` batches, sorted by length within a pool, cut into batches, and the batches are
    shuffled. Every row is in exactly one batch of an epoch. Order and contents depend on the
    arguments and the epoch alone.

    With ``num_batches`` one iteration runs through as many epochs as it takes to yield exactly so
    many batches. This is how to train: the whole run is then one pass of the data loader, and
    resuming is skipping batches. (Nothing has to call `set_epoch`, which data loaders that shard or
    skip do not forward reliably.) Multiply by accumulation steps and processes as needed.

    Args:
        lengths: Tokens in each row, (rows,), such as ``TokenDataset.lengths``.
        batch_size: Rows in a batch; the last of an epoch may have fewer.
        max_tokens: Instead, a budget of tokens for a batch with its padding: rows times the longest
            row. Give either this or ``batch_size``.
        seed: Seed of the shuffling, at least 0.
        num_batches: Batches in an iteration; None: one epoch.
        shuffle: False keeps the rows sorted by length, longest first, without pools: for
            evaluation, with the least padding, and out of memory at once or never.
        pool_batches: Batches in a pool; more mean less padding and less randomness.

    Raises:
        ValueError: An argument is out of range, both or neither of ``batch_size`` and
            ``max_tokens`` are given, or a row is longer than ``max_tokens``.
    """

    def __init__(
        self,
        lengths: Sequence[int] | npt.NDArray[np.integer[Any]],
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        num_batches: int | None = None,
        shuffle: bool = True,
        pool_batches: int = 50,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int64)
        if self._lengths.ndim != 1 or not self._lengths.size or self._lengths.min() < 1:
            raise ValueError(
                "lengths: expected one or more lengths of at least 1, in one dimension"
            )
        if (batch_size is None) == (max_tokens is None):
            raise ValueError("batch_size, max_tokens: expected exactly one of them; give the other")
        for name, value in [
            ("batch_size", batch_size),
            ("max_tokens", max_tokens),
            ("num_batches", num_batches),
            ("pool_batches", pool_batches),
        ]:
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {seed}")
        longest = int(self._lengths.argmax())
        if max_tokens is not None and self._lengths[longest] > max_tokens:
            raise ValueError(
                f"max_tokens: row {longest} has {self._lengths[longest]} tokens, more than "
                f"{max_tokens}; raise max_tokens or cut long sequences with split_windows"
            )
        # Not named batch_size: accelerate would then expect every batch to have that many rows.
        self._rows = batch_size or 0
        self._max_tokens = max_tokens
        self._seed = seed
        self._num_batches = num_batches
        self._shuffle = shuffle
        self._pool_batches = pool_batches
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, that the next iteration is or begins with."""
        if epoch < 0:
            raise ValueError(f"epoch: expected at least 0, got {epoch}")
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches in an iteration; with ``max_tokens`` an epoch may have a few more or fewer."""
        return self._num_batches or len(self._epoch_batches(self._epoch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, count = self._epoch, 0
        while True:
            for batch in self._epoch_batches(epoch):
                yield [(epoch, index) for index in batch.tolist()]
                count += 1
                if count == self._num_batches:
                    return
            if self._num_batches is None:
                return
            epoch += 1

    def _epoch_batches(self, epoch: int) -> list[npt.NDArray[np.intp]]:
        if not self._shuffle:
            return self._cut(np.argsort(-self._lengths, kind="stable"))
        random = np.random.default_rng((self._seed, epoch))
        order = random.permutation(self._lengths.size)
        batches = []
        pool_size = self._pool_size()
        for start in range(0, order.size, pool_size):
            pool = order[start : start + pool_size]
            # A stable sort keeps rows of one length in their shuffled order.
            batches += self._cut(pool[np.argsort(-self._lengths[pool], kind="stable")])
        return [batches[i] for i in random.permutation(len(batches))]

    def _pool_size(self) -> int:
        """Rows in a pool; a multiple of the batch size, so that only the last batch is short."""
        if self._max_tokens is None:
            return self._rows * self._pool_batches
        rows = self._max_tokens / float(self._lengths.mean())
        return max(1, round(rows * self._pool_batches))

    def _cut(self, order: npt.NDArray[np.intp]) -> list[npt.NDArray[np.intp]]:
        """Cut rows sorted from long to short into batches."""
        batches = []
        start = 0
        while start < order.size:
            if self._max_tokens is None:
                size = self._rows
            else:
                size = self._max_tokens // int(self._lengths[order[start]])
            batches.append(order[start : start + size])
            start += batches[-1].size
        return batches


def _lengths(rows: Sequence[_Tokens]) -> npt.NDArray[np.int64]:
    """Return the lengths of token rows, all of which must be non-empty."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    if (lengths == 0).any():
        raise ValueError(
            f"token row {int(lengths.argmin())} is empty; every row needs at least one token"
        )
    return lengths
