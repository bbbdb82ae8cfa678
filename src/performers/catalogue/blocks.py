"""Blocks of similar items, all of one size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_POWER_STEPS = 6
_MEANS_STEPS = 4


def balanced_blocks(
    items: Tensor, num_blocks: int, generator: torch.Generator | None = None
) -> Tensor:
    """Partition of items into blocks of neighbours whose sizes differ by one at most.

    Blocks are halved until there are enough of them: at the median along the direction between two
    means, which begin at the principal direction (power iteration) and take a few steps of
    2-means. Every level is a product ``O(n d²)`` and a few of ``O(n d)``.

    Args:
        items: Shape ``(n, d)``, ``n`` at least ``num_blocks``.
        num_blocks: A power of two.
        generator: Source of the first directions.

    Returns:
        Row numbers of the items of each block, int64, shape ``(num_blocks, size)``; -1 pads.
    """
    count, dim = items.shape
    size = math.ceil(count / num_blocks) * num_blocks
    blocks = torch.full((1, size), -1, device=items.device)
    blocks[0, :count] = torch.arange(count, device=items.device)
    while len(blocks) < num_blocks:
        kept = blocks >= 0
        points = items[blocks.clamp_min(0)] * kept.unsqueeze(-1)
        points -= (points.sum(1) / kept.sum(1, keepdim=True)).unsqueeze(1)
        points *= kept.unsqueeze(-1)
        # Squares of huge items would overflow.
        points /= points.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(items.dtype).tiny)
        direction = torch.randn(len(blocks), dim, 1, generator=generator).to(points)
        squares = points.mT @ points
        for _ in range(_POWER_STEPS):
            direction = squares @ direction
            direction /= direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
        for _ in range(_MEANS_STEPS):
            right = _halves(points @ direction, kept).chunk(2, 1)[1]
            # Points sum to zero: the difference of the halves' means is along the right one's.
            side = points.new_zeros(kept.shape).scatter_(1, right, 1)
            direction = (side.unsqueeze(1) @ points).mT
        blocks = blocks.gather(1, _halves(points @ direction, kept)).view(2 * len(blocks), -1)
    return blocks


def _halves(along: Tensor, kept: Tensor) -> Tensor:
    """Order of a block's places whose two halves share items and padding evenly."""
    order = along.squeeze(-1).masked_fill(~kept, math.inf).argsort(dim=1)
    half = order.shape[1] // 2
    count = kept.sum(1, keepdim=True)
    left = (count + 1) // 2
    place = torch.arange(half, device=order.device)
    # The places of padding come last in `order`.
    first = torch.where(place < left, place, count + place - left)
    second = torch.where(place < count - left, left + place, half + place)
    return order.gather(1, torch.cat((first, second), dim=1))
