"""Functions shared by mechanisms that work on blocks of tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.models.context import AttentionContext


def split_blocks(x: Tensor, size: int, fill: float = 0) -> Tensor:
    """Cut a sequence into blocks, the last one filled up.

    Args:
        x: Shape ``(..., L, width)``.
        size: Tokens in a block.
        fill: Value that fills up the last block.

    Returns:
        Shape ``(..., ceil(L / size), size, width)``.
    """
    missing = -x.shape[-2] % size
    if missing:
        x = F.pad(x, (0, 0, 0, missing), value=fill)
    return x.unflatten(-2, (-1, size))


def with_neighbours(blocks: Tensor, before: int, after: int, fill: float = 0) -> Tensor:
    """Each block with those next to it, in order.

    Args:
        blocks: Shape ``(..., N, size, width)``.
        before: Blocks in front of each one.
        after: Blocks behind it.
        fill: Value beyond the ends.

    Returns:
        Shape ``(..., N, (before + 1 + after) * size, width)``.
    """
    if before == after == 0:
        return blocks
    count = blocks.shape[-3]
    padded = F.pad(blocks, (0, 0, 0, 0, before, after), value=fill)
    return torch.cat([padded.narrow(-3, i, count) for i in range(before + 1 + after)], dim=-2)


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """Softmax attention to the allowed keys; zeros for a query that has none.

    Args:
        query: Shape ``(N, H, L, head_dim)``.
        key: Shape ``(N, H, S, head_dim)``.
        value: Shape ``(N, H, S, head_dim)``.
        allowed: Boolean, broadcastable to ``(N, H, L, S)``.

    Returns:
        Shape ``(N, H, L, head_dim)``.
    """
    blind = ~allowed.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed | blind)
    return out.masked_fill(blind, 0.0)


def dense_weights(query: Tensor, key: Tensor, allowed: Tensor) -> Tensor:
    """The matrix of softmax attention to the allowed keys, quadratic on purpose.

    Args:
        query: Shape ``(B, H, L, head_dim)``.
        key: Shape ``(B, H, L, head_dim)``.
        allowed: Boolean, broadcastable to ``(B, H, L, L)``.

    Returns:
        Shape ``(B, H, L, L)``; rows sum to one, or are zero where nothing is allowed.
    """
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~allowed, 0.0)


def visible_pairs(context: AttentionContext, length: int, device: torch.device) -> Tensor:
    """Mask of the keys that full attention lets each query see, ``(B or 1, 1, L, L)``."""
    pairs = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    if context.is_causal:
        pairs = pairs.tril()
    if context.key_mask is not None:
        real = context.key_mask
        pairs = pairs & real[:, None, None, :] & real[:, None, :, None]
    if context.sequence_ids is not None:
        ids = context.sequence_ids
        pairs = pairs & (ids[:, None, :, None] == ids[:, None, None, :])
    return pairs
