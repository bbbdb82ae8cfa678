"""Windows measured in positions.

Rows are laid end to end, and a token's coordinate is its position, shifted so that tokens of
different sequences are further apart than the window. Exact pairs: queries are taken in chunks of
the order of their coordinates, and meet the blocks of keys that hold their windows. Features: keys
and queries are merged into one row, in which a key comes ``window + 1`` positions after its own and
so is in the strict past of the queries beyond its window; the reversed order has the other
direction. Nothing is subtracted. The cost is that of two causal passes over rows twice as long, and
of as many exact pairs as tokens share a window.
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
    Features,
    Rows,
    Sums,
    block_sizes,
    in_blocks,
    softmax_rows,
)
from performers.attention.torch_backend.causal import causal_rows
from performers.attention.torch_backend.exact import BLOCK_PAIRS

# Twice a coordinate has to fit into 64 bits.
_LARGEST = 2**61


def position_feature_rows(call: AttentionCall, features: Features) -> Rows:
    """Every query against the keys whose positions are beyond the window."""
    row, (coordinate, sequence) = end_to_end(call), coordinates(call)
    past = _past(row, coordinate, sequence, features)
    future = _past(row, -coordinate, sequence, features)
    return _in_rows(past.plus(future, scaled=features.has_exponent()), len(call.query))


def position_window_rows(call: AttentionCall) -> Rows:
    """Every query against the keys of its window of positions: sums of ``exp(scale q . k)``."""
    row, window = end_to_end(call), call.window
    assert window is not None
    coordinate, _ = coordinates(call)
    key, value = (masked(x, row.key_mask)[0] for x in (row.key, row.value))
    # Keys that take no part, and those that fill up the last block, are in no window.
    nowhere = coordinate.max() + window + 1
    of_keys = coordinate if row.key_mask is None else coordinate.where(row.key_mask[0], nowhere)
    length = len(coordinate)
    count = -(-length // CHUNK)
    missing = count * CHUNK - length

    key_order, query_order = (x.argsort(stable=True) for x in (of_keys, coordinate))
    of_keys = torch.cat((of_keys[key_order], nowhere.expand(missing)))
    of_queries = coordinate[query_order]
    of_queries = torch.cat((of_queries, of_queries[-1:].expand(missing))).view(count, CHUNK)
    key, value = (
        F.pad(x[:, key_order], (0, 0, 0, missing)).unflatten(1, (count, CHUNK))
        for x in (key, value)
    )
    query = F.pad(row.query[..., query_order, :], (0, 0, 0, missing))

    first = torch.searchsorted(of_keys, of_queries[:, 0] - window) // CHUNK
    end = torch.searchsorted(of_keys, of_queries[:, -1] + window, right=True)
    width = max(1, int(((end + CHUNK - 1) // CHUNK - first).max()))
    blocks = first.unsqueeze(1) + torch.arange(width, device=first.device)
    of_blocks = of_keys.view(count, CHUNK)

    def step(query: Tensor, of_queries: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
        inside = blocks.clamp_max(count - 1)
        keys, values = (
            x.index_select(1, inside.flatten())
            .unflatten(1, inside.shape)
            .flatten(2, 3)
            .unsqueeze(1)
            for x in (key.to(call.dtype), value.to(call.dtype))
        )
        distance = of_queries.unsqueeze(2) - of_blocks[inside].flatten(1).unsqueeze(1)
        present = (blocks < count).repeat_interleave(CHUNK, dim=1).unsqueeze(1)
        seen = (distance.abs() <= window) & present
        rows = softmax_rows(query[0].to(call.dtype) * call.factor, keys, values, seen)
        return tuple(x.flatten(2, 3).unsqueeze(0) for x in rows)

    pairs = math.prod(query.shape[:3]) * CHUNK * CHUNK * width
    sizes = block_sizes(count, max(1, BLOCK_PAIRS // max(1, pairs)))
    query = query.unflatten(3, (count, CHUNK))
    rows, _ = in_blocks(step, sizes, [(query, 3), (of_queries, 0), (blocks, 0)])
    back = query_order.argsort()
    return _in_rows(Rows(*(selected(x, 3, back) for x in rows)), len(call.query))


def _past(
    row: AttentionCall, coordinate: Tensor, sequence: Tensor | None, features: Features
) -> Rows:
    """Queries of one row against the keys whose coordinate is less by more than the window."""
    merged, places = keys_after_window(row, coordinate, sequence)
    sums = Sums(*merged.past().sums())
    rows, _ = causal_rows(merged, features, sums, strict=True, divided=False)
    return Rows(*(selected(x, 3, places) for x in rows))


def keys_after_window(
    row: AttentionCall, coordinate: Tensor, sequence: Tensor | None
) -> tuple[AttentionCall, Tensor]:
    """Queries and keys of one row in the order of their coordinates, a key ``window + 1`` later.

    The strict past of a query are the keys whose coordinate is less by more than the window.

    Returns:
        The row, twice as long, and the places ``(S,)`` of the queries in it; its other rows mean
        nothing.
    """
    assert row.window is not None
    size = len(coordinate)
    # Twice the coordinates: at the same place a key comes before a query.
    place = torch.cat((2 * coordinate + 1, 2 * (coordinate + row.window + 1)))
    order = place.argsort(stable=True)
    token, is_key = order % size, order >= size
    merged = row.replaced(
        query=selected(row.query, 3, token),
        key=selected(row.key, 2, token),
        value=selected(row.value, 2, token),
        key_mask=row.valid_keys()[:, token] & is_key,
        segments=None if sequence is None else sequence[token],
    )
    return merged, order.argsort()[:size]


def end_to_end(call: AttentionCall) -> AttentionCall:
    """The call as one row of all its rows, in which the heads of a token are side by side."""
    query, key, value = (
        x.movedim(-2, 1).flatten(0, 1).contiguous().movedim(0, -2).unsqueeze(0)
        for x in (call.query, call.key, call.value)
    )
    return call.replaced(
        query=query,
        key=key,
        value=value,
        key_mask=None if call.key_mask is None else call.key_mask.reshape(1, -1),
    )


def selected(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """`torch.index_select`, which copies whole tokens where their heads are side by side."""
    return x.movedim(dim, 0).index_select(0, places).movedim(0, dim)


def _in_rows(rows: Rows, batch: int) -> Rows:
    """Rows of `end_to_end` as those of its call."""
    return Rows(*(in_batch(x, batch) for x in rows))


def in_batch(x: Tensor, batch: int) -> Tensor:
    """Rows ``(1, heads, groups, batch L, ...)`` of `end_to_end` as those of its call."""
    return x.squeeze(0).unflatten(2, (batch, -1)).movedim(2, 0)


def coordinates(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Coordinates ``(batch S,)`` of all tokens, and the number of each one's sequence.

    Coordinates rise from sequence to sequence; None for one sequence.

    Raises:
        ValueError: Positions are so far apart that coordinates exceed 64 bits; not found under
            ``torch.compile``.
    """
    assert call.positions is not None
    assert call.window is not None
    positions = call.positions.to(call.query.device, torch.int64)
    batch, length = positions.shape
    sequence = call.segments
    if batch > 1:
        sequence = torch.arange(batch, device=positions.device).repeat_interleave(length)
    least, most = positions.min(), positions.max()
    if not torch.compiler.is_compiling():
        # In Python's numbers, which have no end.
        span, count = int(most) - int(least), 1 if sequence is None else int(sequence.max()) + 1
        if (span + call.window + 2) * count > _LARGEST:
            raise ValueError(
                f"positions must span less, got {span} with window={call.window}; let those of "
                "each sequence begin at 0"
            )
    coordinate = (positions - least).flatten()
    if sequence is None:
        return coordinate, None
    return coordinate + sequence * (most - least + call.window + 2), sequence
