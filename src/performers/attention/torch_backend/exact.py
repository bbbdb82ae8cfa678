"""Exact pairs of the ``torch`` backend: a band of keys around each query, and the sinks.

Queries are taken in chunks, and a chunk meets the keys of its band in one small dense matrix.
Blocks are checkpointed like those of the features, so that time and memory are linear in the length
for a given window.
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall, masked
from performers.attention.torch_backend.blocks import (
    CHUNK,
    Rows,
    block_sizes,
    in_blocks,
    softmax_rows,
)

# Pairs held at a time (elements over batch, heads and rows).
BLOCK_PAIRS = 1 << 21


def window_rows(call: AttentionCall) -> Rows:
    """Every query against the keys of its window: sums of ``exp(scale q . k)``."""
    length = call.query.shape[-2]
    chunk = min(CHUNK, length)
    # Chunks of one size; queries that fill up the last one are cut off again.
    count = -(-length // chunk)
    query = F.pad(call.query, (0, 0, 0, count * chunk - length)).unflatten(3, (count, chunk))
    key, value, seen = _band(call, count, chunk)

    def step(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (x.to(call.dtype) for x in (query, key, value))
        key, value = key.unsqueeze(2), value.unsqueeze(2)
        rows = softmax_rows(query * call.factor, key, value, seen[:, None, None])
        return tuple(x.flatten(3, 4) for x in rows)

    pairs = math.prod(call.query.shape[:3]) * chunk * key.shape[3]
    sizes = block_sizes(count, max(1, BLOCK_PAIRS // max(1, pairs)))
    rows, _ = in_blocks(step, sizes, [(query, 3), (key, 2), (value, 2), (seen, 1)])
    return Rows(*(x[..., :length, :] for x in rows))


def _band(call: AttentionCall, count: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys between the first that a chunk's first query meets and its last query's last.

    Returns:
        Keys ``(B, H, count, width, D)``, values, and which query of a chunk meets which key,
        ``(B or 1, count, chunk, width)``.
    """
    assert call.window is not None
    size, device = call.key.shape[2], call.key.device
    position = torch.arange(count * chunk, device=device).view(count, chunk)
    window = min(call.window, size)
    ahead = 0 if call.is_causal else window
    width, front = chunk + window + ahead, window - call.offset
    key, value = (masked(x, call.key_mask) for x in (call.key, call.value))
    # One row for the whole batch: what meets is as large as the pairs.
    mask = call.valid_keys() if call.key_mask is not None else call.valid_keys()[:1]
    if width >= size:
        # One band for all chunks: every key.
        key, value = (x.unsqueeze(2).expand(-1, -1, count, -1, -1) for x in (key, value))
        place, mask = torch.arange(size, device=device).expand(count, size), mask[:, None]
    else:
        back = max(count * chunk + window + ahead - front - size, 0)
        key, value = (
            F.pad(x, (0, 0, front, back)).unfold(2, width, chunk).mT for x in (key, value)
        )
        place = position[:, :1] - front + torch.arange(width, device=device)
        mask = F.pad(mask, (front, back)).unfold(1, width, chunk)
    distance = place.unsqueeze(1) - (position + call.offset).unsqueeze(-1)
    seen = (distance <= ahead) & (distance >= -window)
    if call.segments is not None:
        own = call.segments[position.clamp_max(size - 1)].unsqueeze(-1)
        seen = seen & (call.segments[place.clamp(0, size - 1)].unsqueeze(1) == own)
    return key, value, seen & mask.unsqueeze(2)


def sink_rows(call: AttentionCall) -> Rows:
    """Every query against the sinks of its sequence: sums of ``exp(scale q . k)``."""
    assert call.sink_keys is not None
    length, packed = call.query.shape[-2], call.segments is not None
    key, value, first, _ = call.sink_keys

    def step(query: Tensor, position: Tensor, own: Tensor | None) -> tuple[Tensor, ...]:
        query, position = query.to(call.dtype) * call.factor, position.unsqueeze(-1)
        keys, values = (x.to(call.dtype).unsqueeze(2) for x in (key, value))
        if own is None:
            seen = (position >= first[:, None])[:, None, None]
            return softmax_rows(query, keys, values, seen)
        # Each query has the sinks of its sequence: (T, H, G, 1, D) against (T, H, 1, sinks, D).
        query, seen = query.squeeze(0).movedim(2, 0).unsqueeze(3), position >= first[own]
        rows = softmax_rows(query, keys[own], values[own], seen[:, None, None, None])
        return tuple(x.squeeze(3).movedim(0, 2).unsqueeze(0) for x in rows)

    pairs = math.prod(call.query.shape[:3]) * key.shape[2] * (key.shape[-1] if packed else 1)
    sizes = block_sizes(length, max(1, BLOCK_PAIRS // max(1, pairs)))
    position = torch.arange(length, device=key.device)
    rows, _ = in_blocks(step, sizes, [(call.query, 3), (position, 0), (call.segments, 0)])
    return Rows(*rows)
