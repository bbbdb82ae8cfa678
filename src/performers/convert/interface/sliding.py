"""Exact attention within a sliding window, in linear time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["sliding_attention"]


def sliding_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int,
    *,
    is_causal: bool,
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax over the keys with ``|i - j| <= window`` alone; queries that see no key get zeros.

    Queries are taken in blocks, each against the keys that its members reach, through
    ``scaled_dot_product_attention``: time and memory are linear in the length. Keys and values may
    have fewer heads; ``key_mask`` is ``(B, L)`` bool, True where a key takes part.
    """
    batch, heads, length = query.shape[:3]
    block = max(1, min(length, max(window, 64)))
    count = -(-length // block)
    front, back = window, 0 if is_causal else window
    width = front + block + back
    fill = count * block - length

    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # (B, N, H, block, D) against (B, N, H, width, D).
    blocks = F.pad(query, (0, 0, 0, fill)).unflatten(2, (count, block)).transpose(1, 2)
    keys, values = (
        F.pad(x, (0, 0, front, fill + back)).unfold(2, width, block).permute(0, 2, 1, 4, 3)
        for x in (key, value)
    )
    taking = key_mask
    if taking is None:
        taking = torch.ones(1, length, dtype=torch.bool, device=query.device)
    taking = F.pad(taking, (front, fill + back)).unfold(1, width, block)
    here = torch.arange(block, device=query.device).unsqueeze(-1) + front
    distance = torch.arange(width, device=query.device) - here
    seen = (distance >= -window) & (distance <= back)
    mask = (seen & taking.unsqueeze(-2)).unsqueeze(2)
    blind = ~mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(
        blocks, keys, values, attn_mask=(mask | blind).expand(batch, -1, -1, -1, -1), scale=scale
    )
    out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).flatten(2, 3)[:, :, :length]
