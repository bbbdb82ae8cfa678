"""Sliding-window attention (Longformer, Beltagy et al. 2020, without global tokens)."""

import torch
from torch import Tensor, nn

from performers.models.context import AttentionContext
from studies.comparators.blocks import (
    attend,
    dense_weights,
    split_blocks,
    visible_pairs,
    with_neighbours,
)

# Narrower blocks would spend more on calls than on products.
_LEAST_BLOCK = 16


class LocalMechanism(nn.Module):
    """Softmax attention to the keys with ``|i - j| <= window``.

    ``O(L * window)``: blocks of at least ``window`` tokens attend to themselves and to the blocks
    next to them, and a mask cuts out the window. Distances are those of places in the row.

    Args:
        window: Tokens seen to each side.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, context: AttentionContext, layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; all of shape ``(B, H, L, head_dim)``; the matrix is ``(B, H, L, L)`` or None."""
        batch, heads, length, _ = query.shape
        if not batch * length:
            empty = value.new_zeros(batch, heads, length, length) if context.need_weights else None
            return value, empty
        weights = None
        if context.need_weights:
            index = torch.arange(length, device=query.device)
            near = (index[:, None] - index).abs() <= self.window
            allowed = visible_pairs(context, length, query.device) & near
            weights = dense_weights(query, key, allowed)
        size = min(max(self.window, _LEAST_BLOCK), length)
        alone = size == length
        before, after = (0 if alone else 1), (0 if alone or context.is_causal else 1)
        queries = split_blocks(query, size)
        keys, values = (with_neighbours(split_blocks(x, size), before, after) for x in (key, value))
        # One row of blocks after the other, so that heads share a block's mask.
        queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (queries, keys, values))
        allowed = self._allowed(context, batch, length, size, before, after, query.device)
        out = attend(queries, keys, values, allowed).unflatten(0, (batch, -1)).transpose(1, 2)
        return out.flatten(2, 3)[:, :, :length], weights

    def _allowed(
        self,
        context: AttentionContext,
        batch: int,
        length: int,
        size: int,
        before: int,
        after: int,
        device: torch.device,
    ) -> Tensor:
        """Mask of the neighbouring keys that each token sees, ``(B * N, 1, size, S)``."""
        own = torch.arange(size, device=device)
        there = torch.arange(-before * size, (1 + after) * size, device=device)
        distance = there - own[:, None]
        near = distance.abs() <= self.window
        if context.is_causal:
            near = near & (distance <= 0)
        # 0 is no sequence: padding, and what lies beyond the ends.
        ids = context.sequence_ids
        if ids is None:
            ids = torch.ones(batch, length, dtype=torch.int64, device=device)
        if context.key_mask is not None:
            ids = ids.masked_fill(~context.key_mask, 0)
        blocks = split_blocks(ids.unsqueeze(-1), size)
        others = with_neighbours(blocks, before, after).transpose(-1, -2)
        return (near & (blocks == others) & (others != 0)).flatten(0, 1).unsqueeze(1)
