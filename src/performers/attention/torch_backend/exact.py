"""Exact pairs of the ``torch`` backend: a band of keys around each query, and the sinks.

Queries are taken in chunks; a chunk meets the keys of its band, and the sinks of its sequence, in
one small dense matrix. Blocks of chunks are checkpointed like those of the features, so that time
and memory are linear in the length for a given window.
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall
from performers.attention.exact_keys.window_and_sinks import SinkKeys
from performers.attention.torch_backend.blocks import (
    CHUNK,
    Rows,
    block_sizes,
    checkpointed,
    cut,
    direct,
    finite,
    masked,
)

# Pairs held at a time (elements over batch, heads and rows).
_BLOCK_PAIRS = 1 << 21


class _Band(NamedTuple):
    """Keys around each chunk of queries.

    Attributes:
        key: Shape ``(B, H, N, W, D)``.
        value: Shape ``(B, H, N, W, Dv)``.
        seen: Which query of a chunk meets which key, shape ``(B or 1, N, C, W)``.
    """

    key: Tensor
    value: Tensor
    seen: Tensor


def exact_rows(call: AttentionCall) -> Rows:
    """Every query against the keys that it meets exactly.

    Returns:
        ``e^log_scale (numerator, denominator)`` of sums of ``exp(scale q . k)``.
    """
    chunk = max(1, min(CHUNK, call.query.shape[-2]))
    length = call.query.shape[-2]
    # Chunks of one size; queries that fill up the last one are cut off again.
    count = -(-length // chunk)
    query = F.pad(call.query, (0, 0, 0, count * chunk - length)).unflatten(3, (count, chunk))
    positions = torch.arange(count * chunk, device=query.device).view(count, chunk)
    band = None if call.window is None else _band(call, positions)
    met = 0 if band is None else band.key.shape[3]
    if call.sink_keys is not None:
        # In packed rows every query has a copy of its sequence's sinks.
        copies = call.key.shape[-1] if call.segments is not None else 1
        met += call.sink_keys.key.shape[2] * copies
    pairs = math.prod(call.query.shape[:3]) * chunk * met
    sizes = block_sizes(count, max(1, _BLOCK_PAIRS // max(1, pairs)))
    run = direct if len(sizes) == 1 else checkpointed
    own = None
    if call.segments is not None:
        own = F.pad(call.segments, (0, count * chunk - length)).view(count, chunk)

    def step(
        query: Tensor,
        positions: Tensor,
        own: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        seen: Tensor | None,
    ) -> Rows:
        return _block(call, query, positions, own, key, value, seen)

    parts = [
        run(step, *block)
        for block in zip(
            cut(query, sizes, 3),
            cut(positions, sizes, 0),
            cut(own, sizes, 0),
            cut(None if band is None else band.key, sizes, 2),
            cut(None if band is None else band.value, sizes, 2),
            cut(None if band is None else band.seen, sizes, 1),
            strict=True,
        )
    ]
    joined = (torch.cat(tensors, dim=3) for tensors in zip(*parts, strict=True))
    return Rows(*(x.flatten(3, 4)[..., :length, :] for x in joined))


def _band(call: AttentionCall, positions: Tensor) -> _Band:
    """The keys between the first that a chunk's first query meets and its last query's last."""
    assert call.window is not None
    size, chunk = call.key.shape[2], positions.shape[1]
    window = min(call.window, size)
    ahead = 0 if call.is_causal else window
    count, width = positions.shape[0], chunk + window + ahead
    front = window - call.offset
    taking = call.key_mask
    if taking is None:
        taking = torch.ones(1, size, dtype=torch.bool, device=positions.device)
    key = masked(call.key, call.key_mask)
    value = masked(call.value, call.key_mask)
    if width >= size:
        # One band for all chunks: every key.
        places = torch.arange(size, device=positions.device).expand(count, size)
        key, value = (x.unsqueeze(2).expand(-1, -1, count, -1, -1) for x in (key, value))
        taking = taking.unsqueeze(1)
    else:
        back = count * chunk + window + ahead - front - size
        key, value = (_windows(x, front, back, width, chunk) for x in (key, value))
        taking = F.pad(taking, (front, back)).unfold(1, width, chunk)
        places = positions[:, :1] - front + torch.arange(width, device=positions.device)
    here = positions.unsqueeze(-1) + call.offset
    distance = places.unsqueeze(1) - here
    near = (distance <= ahead) & (distance >= -window)
    if call.segments is not None:
        known = places.clamp(0, size - 1)
        own = call.segments[positions.clamp_max(size - 1)]
        near = near & (call.segments[known].unsqueeze(1) == own.unsqueeze(-1))
    return _Band(key, value, near & taking.unsqueeze(2))


def _windows(x: Tensor, front: int, back: int, width: int, chunk: int) -> Tensor:
    """Overlapping windows of rows, ``(B, H, N, width, D)``, zeros where there are no rows."""
    padded = F.pad(x, (0, 0, front, max(back, 0)))
    return padded.unfold(2, width, chunk).transpose(-1, -2)


def _block(
    call: AttentionCall,
    query: Tensor,
    positions: Tensor,
    own: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    seen: Tensor | None,
) -> Rows:
    """Some chunks: ``(B, H, G, N, C, D)`` against bands ``(B, H, N, W, D)`` and sinks."""
    query = query.to(call.dtype) * call.factor
    logits, values = [], []
    if key is not None and value is not None and seen is not None:
        pairs = torch.einsum("bhgncd,bhnwd->bhgncw", query, key.to(call.dtype))
        logits.append(pairs.masked_fill(~seen[:, None, None], -math.inf))
        values.append(("bhgncw,bhnwv->bhgncv", value.to(call.dtype)))
    if call.sink_keys is not None:
        pairs, subscripts, value = _sink_pairs(call.sink_keys, query, positions, own)
        logits.append(pairs)
        values.append((subscripts, value.to(call.dtype)))
    joined = logits[0] if len(logits) == 1 else torch.cat(logits, dim=-1)
    peak = finite(joined.detach().amax(-1, keepdim=True))
    weights = (joined - peak).exp()
    numerator = None
    for part, (subscripts, value) in zip(
        weights.split([x.shape[-1] for x in logits], -1), values, strict=True
    ):
        more = torch.einsum(subscripts, part, value)
        numerator = more if numerator is None else numerator + more
    assert numerator is not None
    return Rows(numerator, weights.sum(-1, keepdim=True), peak)


def _sink_pairs(
    sinks: SinkKeys, query: Tensor, positions: Tensor, own: Tensor | None
) -> tuple[Tensor, str, Tensor]:
    """Logits ``(B, H, G, N, C, sinks)``, and how to multiply them with the sinks' values."""
    key, value, first = sinks.key.to(query.dtype), sinks.value, sinks.first
    if own is None:
        pairs = torch.einsum("bhgncd,bhsd->bhgncs", query, key)
        seen = positions.unsqueeze(-1) >= first[:, None, None, :]
        subscripts = "bhgncs,bhsv->bhgncv"
        seen = seen[:, None, None]
    else:
        # Every query has the sinks of its own sequence.
        pairs = torch.einsum("bhgncd,nchsd->bhgncs", query, key[own])
        seen = positions.unsqueeze(-1) >= first[own]
        subscripts, value = "bhgncs,nchsv->bhgncv", value[own]
    return pairs.masked_fill(~seen, -math.inf), subscripts, value
