"""Tasks that need tokens from anywhere in a row: recall of one, and a count over many.

A token has two parts, whose embeddings a model adds; 0 is an empty part. The last quarter of a row
is what counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Label of a token that predicts nothing."""
_MARGIN = 4


class Task(NamedTuple):
    """A task.

    Attributes:
        parts: Number of values of each part of a token, the empty one included.
        classes: Different labels; all are equally frequent.
        draw: Function of rows, tokens and a generator: tokens ``(rows, length, 2)``, and labels
            ``(rows, length)``.
    """

    parts: tuple[int, int]
    classes: int
    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]


def recall(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Values of keys: eight pairs lie anywhere in the first three quarters, between empty tokens.

    A pair is one token with a key and a value, a token of the last quarter a key without one; its
    label is the value.
    """
    keys, values, border = 8, 4, length * 3 // 4
    tokens = torch.zeros(rows, length, 2, dtype=torch.int64)
    labels = torch.full((rows, length), IGNORED)
    value = torch.randint(values, (rows, keys), generator=generator)
    place = torch.rand(rows, border, generator=generator).argsort(dim=1)[:, :keys]
    row = torch.arange(rows)[:, None]
    tokens[row, place, 0] = torch.arange(1, keys + 1)
    tokens[row, place, 1] = value + 1
    asked = torch.randint(keys, (rows, length - border), generator=generator)
    tokens[:, border:, 0] = asked + 1
    labels[:, border:] = value.gather(1, asked)
    return tokens, labels


def majority(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of the marked tokens up to a place, are there more of the one kind or of the other?

    Tokens are of either kind, and marked, with equal chances. They have a label where the
    difference is four or more.
    """
    kind, marked = torch.randint(2, (2, rows, length), generator=generator)
    ahead = ((2 * kind - 1) * marked).cumsum(1)
    labels = (ahead > 0).long().masked_fill(ahead.abs() < _MARGIN, IGNORED)
    return torch.stack((kind + 1, marked), dim=-1), labels


TASKS = {
    "recall": Task((9, 5), 4, recall),
    "majority": Task((3, 2), 2, majority),
}
"""By name."""
