"""Texts in segments of one length: shuffled, or in streams whose state is handed on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from performers.streams.text import Texts
from performers.training.trainer import shuffled_epochs

IGNORED = -100
"""Label of places without a prediction."""


class Segment(NamedTuple):
    """Place of a segment: the text, its first token there, and whether the past is another's."""

    document: int
    start: int
    begins: bool


def segment_counts(lengths: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Segments of each text, of which every token but the first is predicted once."""
    return np.maximum(-(-(lengths - 1) // length), 0)


class Segments(Dataset[dict[str, Tensor]]):
    """Examples by `Segment`: ``length`` tokens and the token that follows each.

    The index of a segment among those of all texts stands for it without a past. Places after the
    end of a text have token 0 and no label. As predictions look back only, they change nothing
    before them.
    """

    def __init__(self, texts: Texts, length: int) -> None:
        self.texts, self.length = texts, length
        self._ends = segment_counts(texts.lengths, length).cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, key: int | Segment) -> dict[str, Tensor]:
        document, start, begins = key if isinstance(key, Segment) else self.segment(key)
        read = torch.from_numpy(self.texts.read(document, start, start + self.length + 1))
        tokens = torch.zeros(self.length, dtype=torch.int64)
        labels = torch.full((self.length,), IGNORED)
        tokens[: len(read[:-1])] = read[:-1]
        labels[: len(read[1:])] = read[1:]
        return {
            "input_ids": tokens,
            "labels": labels,
            "shift_labels": labels,
            "begins": torch.tensor(begins),
        }

    def segment(self, index: int) -> Segment:
        """The segment of an index."""
        document = int(np.searchsorted(self._ends, index, side="right"))
        before = int(self._ends[document - 1]) if document else 0
        return Segment(document, (index - before) * self.length, True)


class StreamSegments(Sampler[list[Segment]]):
    """Batches whose rows are streams: row ``r`` of a batch goes on from row ``r`` of the last one.

    A row reads a text from its first segment to its last and then takes the next of all texts,
    which are shuffled in each epoch. A function of the seed. With several processes, of which each
    takes every so-maniest batch, each has streams of its own.

    ``lengths`` are the tokens of each text, ``length`` those of a segment.
    """

    def __init__(
        self,
        lengths: NDArray[np.int64],
        length: int,
        *,
        rows: int,
        seed: int,
        num_batches: int,
        processes: int = 1,
    ) -> None:
        self.length, self.rows, self.seed = length, rows, seed
        self.num_batches, self.processes = num_batches, processes
        self.counts = segment_counts(lengths, length)

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[Segment]]:
        order = shuffled_epochs(len(self.counts), self.seed)
        streams = [self._stream(order) for _ in range(self.rows * self.processes)]
        for batch in range(self.num_batches):
            first = batch % self.processes * self.rows
            yield [next(stream) for stream in streams[first : first + self.rows]]

    def _stream(self, order: Iterator[int]) -> Iterator[Segment]:
        for document in order:
            for index in range(int(self.counts[document])):
                yield Segment(document, index * self.length, index == 0)
