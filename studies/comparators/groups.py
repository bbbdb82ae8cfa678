"""Tokens sorted into groups, each of which sees its nearest of the group."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.comparators.blocks import (
    Comparator,
    SequenceRows,
    distances,
    split_blocks,
    with_neighbours,
)


class GroupedComparator(Comparator):
    """A mechanism that sorts tokens into groups; subclasses implement ``group``.

    Attributes:
        num_groups: Groups in a round.
        reach: Tokens of a group that one sees to each side.
    """

    num_groups: int
    reach: int

    def group(self, query: Tensor, rows: SequenceRows) -> Tensor:
        """The group of each token in each round, from 0: ``(N, H, rounds, longest)``."""
        raise NotImplementedError

    @torch.no_grad()
    def sort(self, query: Tensor, rows: SequenceRows) -> Sorted:
        """The order of the tokens, the one it was where a layer is computed once more."""
        choices = rows.context.choices
        if choices is None:
            group = self.group(query, rows)
        elif self in choices:
            group = choices[self].long()
        else:
            group = self.group(query, rows)
            choices[self] = group.to(torch.int16 if self.num_groups <= 2**15 else torch.int32)
        return Sorted(group, rows, min(self.reach, query.shape[2]))


class Sorted:
    """The order of tokens by group and place, and differences between places in this order.

    Attributes:
        reach: Tokens of a group that one sees to each side, at most the sequence's.
        rounds: Number of rounds.
        places: The place of each token in the order of each round, shape of ``group``: numbers that
            differ by as much as the order within a group, by more than ``reach`` between groups.
    """

    def __init__(self, group: Tensor, rows: SequenceRows, reach: int) -> None:
        self.rounds = group.shape[2]
        # Padding has a separate group, the last.
        group = group.masked_fill(~rows.real[:, None, None], torch.iinfo(group.dtype).max)
        self._order = group.argsort(dim=-1, stable=True)
        self.reach, self._after = reach, 0 if rows.is_causal else 1
        group = group.gather(-1, self._order)
        starts = torch.zeros_like(group, dtype=torch.bool)
        starts[..., 1:] = group[..., 1:] != group[..., :-1]
        steps = torch.arange(group.shape[-1], device=group.device)
        places = (reach + 1) * starts.cumsum(-1) + steps
        if group.shape[-1] * (reach + 2) < 2**30:
            # Comparing them is most of the work.
            places = places.int()
        self.places = torch.empty_like(places).scatter_(-1, self._order, places)

    def blocks(self, x: Tensor, number: int) -> Tensor:
        """Rows ``(N, H, longest, width)`` in the order of a round, as blocks of ``reach``."""
        order = self._order[:, :, number, :, None]
        return split_blocks(x.gather(2, order.expand(*x.shape[:2], -1, x.shape[-1])), self.reach)

    def seen(self, x: Tensor, number: int) -> Tensor:
        """The blocks of `blocks` that each block sees, one after another."""
        return with_neighbours(self.blocks(x, number), self._after)

    def gaps(self, places: Tensor, number: int) -> Tensor:
        """Differences of places ``(N, H, longest)`` between a block's tokens and those it sees."""
        order = self._order[:, :, number]
        return distances(places.gather(2, order), self.reach, self._after)

    def hidden(self, difference: Tensor) -> Tensor:
        """True where the gap of a pair in its own order is too large, or the key is later."""
        hidden = difference.abs() > self.reach
        return hidden if self._after else hidden | (difference < 0)

    def join(self, blocks: Tensor, number: int) -> Tensor:
        """The inverse of `blocks`."""
        order = self._order[:, :, number, :, None]
        x = blocks.flatten(2, 3)[:, :, : order.shape[2]]
        return torch.empty_like(x).scatter(2, order.expand_as(x), x)
