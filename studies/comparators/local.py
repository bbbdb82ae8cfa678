"""Sliding-window attention (Longformer, Beltagy et al. 2020, without global tokens)."""

from torch import Tensor

from performers.models.context import AttentionContext
from studies.comparators.blocks import (
    Comparator,
    SequenceRows,
    attend_allowed,
    distances,
    split_blocks,
    with_neighbours,
)

# Narrower blocks would spend more on calls than on products.
_LEAST_BLOCK = 16


class LocalMechanism(Comparator):
    """Softmax attention to the keys with ``|i - j| <= window``.

    ``O(L * window)``: blocks of at least ``window`` tokens attend to themselves and to the blocks
    next to them, and a mask cuts out the window. Distances are those of places in the row.

    Args:
        window: Tokens seen to each side.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: SequenceRows,
        context: AttentionContext,
        layer: int,
    ) -> Tensor:
        """See `Comparator.attend`."""
        size, after = max(self.window, _LEAST_BLOCK), 0 if context.is_causal else 1
        queries = split_blocks(query, size)
        keys, values = (with_neighbours(split_blocks(x, size), after) for x in (key, value))
        distance = distances(rows.places, size, after)
        allowed = distance.abs() <= self.window
        if context.is_causal:
            allowed &= distance >= 0
        # One row of blocks after the other, so that heads share a block's mask.
        queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (queries, keys, values))
        out = attend_allowed(queries, keys, values, allowed.flatten(0, 1).unsqueeze(1))
        out = out.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)
        return out[:, :, : query.shape[2]]
