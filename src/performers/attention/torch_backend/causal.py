"""The causal half of the ``torch`` backend: running sums between chunks, pairs within them."""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math

import torch
from torch import Tensor

from performers.attention.call import AttentionCall
from performers.attention.torch_backend.blocks import (
    CHUNK,
    Features,
    Rows,
    Sums,
    block_rows,
    block_sizes,
    checkpointed,
    cut,
    direct,
    divide,
    finite,
    masked,
    merge,
    query_features,
    times,
)


def causal_rows(
    call: AttentionCall,
    features: Features,
    sums: Sums,
    *,
    strict: bool,
    divided: bool,
) -> tuple[tuple[Tensor, ...], Sums]:
    """Every query against the keys up to its own position, or before it when ``strict``.

    Returns:
        The output when ``divided``, else the fields of ``Rows``; and the sums after the last key.
    """
    query, key, value = call.query, call.key, call.value
    mask, segments = call.key_mask, call.segments
    length = query.shape[-2]

    def block_step(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        segments: Tensor | None,
        before: Tensor | None,
        *sums: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, sums = _causal_block(
            features, query, key, value, mask, segments, before, Sums(*sums), strict
        )
        if divided:
            return divide(rows.numerator, rows.denominator), *sums
        return *rows, *sums

    rows = block_rows((key.shape[0], key.shape[1] * query.shape[2]), features)
    # Blocks of whole chunks, then what is left over.
    whole = length // CHUNK * CHUNK
    sizes = block_sizes(whole, rows) + block_sizes(length - whole, CHUNK)
    run = direct if length <= rows else checkpointed
    parts: list[tuple[Tensor, ...]] = []
    before = None
    for *block, block_segments in zip(
        cut(query, sizes, 3),
        cut(key, sizes, 2),
        cut(value, sizes, 2),
        cut(mask, sizes, 1),
        cut(segments, sizes, 0),
        strict=True,
    ):
        if block_segments is not None and before is None:
            # No sequence has the index -1: nothing comes before the first block.
            before = block_segments.new_tensor(-1)
        *part, key_value, key_sum, log_scale = run(
            block_step, *block, block_segments, before, *sums
        )
        before = None if block_segments is None else block_segments[-1]
        sums = Sums(key_value, key_sum, log_scale)
        parts.append(tuple(part))
    if len(parts) == 1:
        return parts[0], sums
    return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True)), sums


def _causal_block(
    features: Features,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    before: Tensor | None,
    sums: Sums,
    strict: bool,
) -> tuple[Rows, Sums]:
    """One block: all chunks at once, but for the running sums between them.

    Args:
        features: The feature map.
        query: Shape ``(B, H, G, T, D)``, T a multiple of the chunk or shorter than one.
        key: Shape ``(B, H, T, D)``.
        value: Shape ``(B, H, T, Dv)``.
        mask: Shape ``(B, T)`` or None.
        segments: Shape ``(T,)`` or None: positions of different segments do not see each other.
        before: The segment of the position before the block.
        sums: Sums over the keys before the block.
        strict: Leave out the key at a query's own position.
    """
    groups, length = query.shape[2:4]
    chunk = min(CHUNK, length)
    chunks = (length // chunk, chunk)
    # Query rows of one chunk, all groups together: (B, H, N, G C, D).
    query = query.unflatten(3, chunks).movedim(2, 3).flatten(2, 4)
    query_base, query_exponent = features.of(query, is_query=True)
    query_base = _unflatten(query_base, (chunks[0], groups * chunk))
    query_exponent = _unflatten(query_exponent, (chunks[0], groups * chunk))
    key_base, key_exponent = features.of(masked(key, mask), is_query=False)
    value = masked(value.to(features.dtype), mask).unflatten(2, chunks)
    keep = None if mask is None else mask.unflatten(1, chunks)[:, None, :, :, None]
    if key_exponent is None:
        assert key_base is not None
        key_base = key_base.unflatten(2, chunks)
        key_base = key_base if keep is None else key_base.where(keep, 0.0)
    else:
        key_base = _unflatten(key_base, chunks)
        key_exponent = key_exponent.unflatten(2, chunks)
        key_exponent = key_exponent if keep is None else key_exponent.masked_fill(~keep, -math.inf)
    has_past = continues = last = None
    if segments is not None and before is not None:
        segments = segments.unflatten(0, chunks)
        previous = torch.cat((before[None], segments[:-1, -1]))
        has_past = segments == previous[:, None]
        continues = segments[:, -1] == previous
        last = segments == segments[:, -1:]
    inside = _pairs_within_chunks(
        query_base, query_exponent, key_base, key_exponent, value, groups, segments, strict
    )
    past, sums = _prefix_sums(key_base, key_exponent, value, sums, last, continues)
    phi, log_scale = query_features(
        query_base, query_exponent, finite(past.log_scale).unsqueeze(-2)
    )
    outside = Rows(phi @ past.key_value, phi @ past.key_sum.unsqueeze(-1), log_scale)
    if has_past is not None:
        seen = has_past.repeat(1, groups).unsqueeze(-1)
        outside = Rows(
            outside.numerator.where(seen, 0.0),
            outside.denominator.where(seen, 0.0),
            outside.log_scale,
        )
    rows = merge(outside, inside, scaled=features.has_exponent())
    shape = (chunks[0], groups, chunk)

    def in_order(x: Tensor) -> Tensor:
        return x.unflatten(3, shape[1:]).movedim(3, 2).flatten(3, 4)

    return Rows(*(in_order(x) for x in rows)), sums


def _pairs_within_chunks(
    query_base: Tensor | None,
    query_exponent: Tensor | None,
    key_base: Tensor | None,
    key_exponent: Tensor | None,
    value: Tensor,
    groups: int,
    segments: Tensor | None,
    strict: bool,
) -> Rows:
    """Each chunk's queries ``(B, H, N, G C, m)`` against its own keys ``(B, H, N, C, m)``."""
    size = value.shape[-2]
    seen = torch.ones(size, size, dtype=torch.bool, device=value.device).tril(-1 if strict else 0)
    if segments is not None:
        seen = seen & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
    no_scale = value.new_zeros(())
    if key_exponent is None:
        assert query_base is not None
        assert key_base is not None
        pairs = (query_base @ key_base.transpose(-1, -2)).unflatten(3, (groups, size))
        pairs = pairs.where(seen.unsqueeze(-3), 0.0).flatten(3, 4)
        return Rows(pairs @ value, pairs.sum(-1, keepdim=True), no_scale)
    # A query and a key can have their largest features far apart; their product is then far below
    # the product of the largest, and float32 would lose it.
    wide = torch.float64 if value.device.type != "mps" else value.dtype
    left, left_scale = query_features(query_base, query_exponent, no_scale, wide)
    key_scale = key_exponent.detach().amax(-1, keepdim=True)
    right = times(key_base, (key_exponent - finite(key_scale)).to(wide).exp())
    logs = key_scale.transpose(-1, -2).masked_fill(~seen, -math.inf)
    peak = finite(logs.amax(-1, keepdim=True))
    pairs = (left @ right.transpose(-1, -2)).unflatten(3, (groups, size))
    pairs = (pairs * (logs - peak).unsqueeze(3).to(wide).exp()).flatten(3, 4)
    total = pairs.detach().abs().sum(-1, keepdim=True)
    log_scale = left_scale + peak.repeat(1, 1, 1, groups, 1)
    log_total = total.log()
    # What is smaller than this was lost after all, or has no finite gradient. Its logarithm is
    # compared, because ONNX export rounds constants to float32 and would make the bound zero.
    lost = log_total < math.log(torch.finfo(wide).tiny) / 2
    pairs = (pairs / total.masked_fill(lost, math.inf)).to(value.dtype)
    log_scale = log_scale + log_total.masked_fill(lost, 0.0).to(value.dtype)
    if key_base is None and not strict:
        pairs, log_scale = _with_own_key(
            pairs, log_scale, lost, query_exponent, key_exponent, groups
        )
    return Rows(pairs @ value, pairs.sum(-1, keepdim=True), log_scale)


def _with_own_key(
    pairs: Tensor,
    log_scale: Tensor,
    lost: Tensor,
    query_exponent: Tensor | None,
    key_exponent: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Give rows that lost all of their chunk's keys their own one back, at its largest feature.

    Such a row is not accurate, but it is still an average of values.
    """
    assert query_exponent is not None
    grouped = query_exponent.detach().unflatten(3, (groups, -1))
    own = (grouped + key_exponent.detach().unsqueeze(3)).amax(-1).flatten(3, 4).unsqueeze(-1)
    lost = lost & (own > -math.inf)
    diagonal = torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device).repeat(groups, 1)
    return pairs.masked_fill(lost & diagonal, 1.0), log_scale.where(~lost, own)


def _prefix_sums(
    key_base: Tensor | None,
    key_exponent: Tensor | None,
    value: Tensor,
    sums: Sums,
    last: Tensor | None,
    continues: Tensor | None,
) -> tuple[Sums, Sums]:
    """Sums over the keys before each chunk (stacked on a chunk axis), and after the last one.

    ``last`` (N, C) marks the keys that belong to their chunk's last sequence, the only one that
    can go on; ``continues`` (N,) says whether that is the sequence which entered the chunk.
    """
    key_value, key_sum, log_scale = sums
    before: list[Sums] = []
    if key_exponent is None:
        assert key_base is not None
        phi = key_base if last is None else key_base.where(last.unsqueeze(-1), 0.0)
        peak = None
    else:
        if last is not None:
            key_exponent = key_exponent.masked_fill(~last.unsqueeze(-1), -math.inf)
        peak = key_exponent.detach().amax(-2)
        phi = times(key_base, (key_exponent - finite(peak).unsqueeze(-2)).exp())
    added_value, added_sum = phi.transpose(-1, -2) @ value, phi.sum(-2)
    for n in range(value.shape[2]):
        before.append(Sums(key_value, key_sum, log_scale))
        more_value, more_sum = added_value[:, :, n], added_sum[:, :, n]
        if peak is None:
            if continues is not None:
                key_value = key_value.where(continues[n], 0.0)
                key_sum = key_sum.where(continues[n], 0.0)
        else:
            previous = log_scale
            if continues is not None:
                previous = previous.masked_fill(~continues[n], -math.inf)
            log_scale = torch.maximum(previous, peak[:, :, n])
            scale = finite(log_scale)
            decay, growth = (previous - scale).exp(), (peak[:, :, n] - scale).exp()
            key_value, key_sum = key_value * decay.unsqueeze(-1), key_sum * decay
            more_value, more_sum = more_value * growth.unsqueeze(-1), more_sum * growth
        key_value, key_sum = key_value + more_value, key_sum + more_sum
    stacked = Sums(*(torch.stack(tensors, dim=2) for tensors in zip(*before, strict=True)))
    return stacked, Sums(key_value, key_sum, log_scale)


def _unflatten(x: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    return None if x is None else x.unflatten(2, shape)
