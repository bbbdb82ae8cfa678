"""The causal half of the ``torch`` backend: running sums between chunks, pairs within them."""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall
from performers.attention.torch_backend.blocks import (
    CHUNK,
    Features,
    Rows,
    Sums,
    block_rows,
    block_sizes,
    finite,
    in_blocks,
    query_features,
    read,
)
from performers.features.form import times


def causal_rows(
    call: AttentionCall, features: Features, sums: Sums, *, strict: bool, divided: bool
) -> tuple[tuple[Tensor, ...], Sums]:
    """Every query against the keys up to its own position, or before it when ``strict``.

    Returns:
        The output when ``divided``, else the fields of ``Rows``; and the sums after the last key.
    """
    query, key, value = call.query, call.key, call.value
    mask, segments, length = call.key_mask, call.segments, query.shape[-2]
    if length == 1 and not strict:
        sums = sums.with_keys(*features.of_keys(key, value, mask))
        rows = read(features, query, sums)
        return (rows.out(),) if divided else rows, sums

    # The sequence of the position before each; none has the index -1.
    before = None if segments is None else F.pad(segments[:-1], (1, 0), value=-1)
    size = block_rows((key.shape[0], key.shape[1] * query.shape[2]), features, query.device)
    # Blocks of whole chunks, then what is left over.
    whole = length // CHUNK * CHUNK
    results, carry = in_blocks(
        lambda *block: _causal_block(features, strict, divided, *block),
        block_sizes(whole, size) + block_sizes(length - whole, CHUNK),
        [(query, 3), (key, 2), (value, 2), (mask, 1), (segments, 0), (before, 0)],
        sums,
        keep=length <= size,
    )
    return results, Sums(*carry)


def _causal_block(
    features: Features,
    strict: bool,
    divided: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    before: Tensor | None,
    *sums: Tensor,
) -> tuple[Tensor, ...]:
    """One block, all chunks at once, but for the running sums between them; and the sums after it.

    Queries are ``(B, H, G, T, D)``, T a multiple of the chunk or shorter than one; ``before`` is
    the segment of the position before each, ``sums`` are those over the keys before the block.
    """
    groups, length = query.shape[2:4]
    chunk = min(CHUNK, length)
    chunks = (length // chunk, chunk)
    # Query rows of one chunk, all groups together: (B, H, N, G C, D).
    query = query.unflatten(3, chunks).movedim(2, 3).flatten(2, 4)
    query_base, query_exponent = (
        None if x is None else x.unflatten(2, (chunks[0], groups * chunk))
        for x in features.of(query, is_query=True)
    )
    key_base, key_exponent, value = features.of_keys(key, value, mask)
    value = value.unflatten(2, chunks)
    key_base, key_exponent = (
        None if x is None else x.unflatten(2, chunks) for x in (key_base, key_exponent)
    )
    own = continues = last = None
    if segments is not None and before is not None:
        segments, entering = segments.unflatten(0, chunks), before.unflatten(0, chunks)[:, :1]
        # Rows of the sequence that enters their chunk; whether it is also the last one of the
        # chunk, the only one that can go on; and the keys of that.
        own = (segments == entering).repeat(1, groups).unsqueeze(-1)
        continues = segments[:, -1:] == entering
        last = segments == segments[:, -1:]
    inside = _pairs_within_chunks(
        query_base, query_exponent, key_base, key_exponent, value, groups, segments, strict
    )
    past, after = _prefix_sums(key_base, key_exponent, value, Sums(*sums), last, continues)
    phi, log_scale = query_features(query_base, query_exponent, past.log_scale.unsqueeze(-2))
    numerator, denominator = phi @ past.key_value, phi @ past.key_sum.unsqueeze(-1)
    if own is not None:
        numerator, denominator = numerator.where(own, 0.0), denominator.where(own, 0.0)
    outside = Rows(numerator, denominator, log_scale)
    rows = outside.plus(inside, scaled=features.has_exponent())
    rows = Rows(*(x.unflatten(3, (groups, chunk)).movedim(3, 2).flatten(3, 4) for x in rows))
    return (rows.out(), *after) if divided else (*rows, *after)


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
        pairs = (query_base @ key_base.mT).unflatten(3, (groups, size))
        pairs = pairs.where(seen.unsqueeze(-3), 0.0).flatten(3, 4)
        return Rows(pairs @ value, pairs.sum(-1, keepdim=True), no_scale)
    # A query and a key can have their largest features far apart; their product is then far below
    # the product of the largest, and float32 would lose it.
    wide = torch.float64 if value.device.type != "mps" else value.dtype
    left, left_scale = query_features(query_base, query_exponent, no_scale, wide)
    key_scale = key_exponent.detach().amax(-1, keepdim=True)
    right = times(key_base, (key_exponent - finite(key_scale)).to(wide).exp())
    logs = key_scale.mT.masked_fill(~seen, -math.inf)
    peak = finite(logs.amax(-1, keepdim=True))
    pairs = (left @ right.mT).unflatten(3, (groups, size))
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
        # Such a row gets its own key back, at its largest feature: not accurate, but still an
        # average of values.
        assert query_exponent is not None
        grouped = query_exponent.detach().unflatten(3, (groups, size))
        own = (grouped + key_exponent.detach().unsqueeze(3)).amax(-1).flatten(3, 4).unsqueeze(-1)
        lost = lost & (own > -math.inf)
        diagonal = torch.eye(size, dtype=torch.bool, device=pairs.device).repeat(groups, 1)
        pairs, log_scale = pairs.masked_fill(lost & diagonal, 1.0), log_scale.where(~lost, own)
    return Rows(pairs @ value, pairs.sum(-1, keepdim=True), log_scale)


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
    can go on; ``continues`` (N, 1) says whether that is the sequence which entered the chunk.
    """
    if key_exponent is None:
        assert key_base is not None
        phi = key_base if last is None else key_base.where(last.unsqueeze(-1), 0.0)
        log_scale = torch.zeros_like(phi[..., 0, :])
    else:
        if last is not None:
            key_exponent = key_exponent.masked_fill(~last.unsqueeze(-1), -math.inf)
        log_scale = key_exponent.detach().amax(-2)
        phi = times(key_base, (key_exponent - finite(log_scale).unsqueeze(-2)).exp())
        log_scale = log_scale.expand(*phi.shape[:3], phi.shape[-1])
    # The sums before a chunk are those of all chunks before it, and of the block, that nothing
    # separates from it; the last ones are those after the block.
    parts = Sums(
        *(
            torch.cat((first.unsqueeze(2), x), dim=2)
            for first, x in zip(sums, (phi.mT @ value, phi.sum(-2), log_scale), strict=True)
        )
    )
    count = value.shape[2] + 1
    reaches = torch.ones(count, count, dtype=torch.bool, device=value.device).triu()
    if continues is not None:
        breaks = F.pad((~continues[:, 0]).cumsum(0), (1, 0))
        reaches = reaches & (breaks.unsqueeze(1) == breaks)
    reaches = reaches.unsqueeze(-1)
    if key_exponent is None:
        log_scale = torch.zeros_like(parts.log_scale)
        weights = reaches.to(phi.dtype).expand(*phi.shape[:2], -1, -1, phi.shape[-1])
    else:
        levels = parts.log_scale.unsqueeze(3).masked_fill(~reaches, -math.inf)
        log_scale = levels.amax(2)
        weights = (levels - finite(log_scale).unsqueeze(2)).exp()
    # (B, H, m, chunks, chunks) against (B, H, m, chunks, Dv).
    weights = weights.permute(0, 1, 4, 3, 2)
    key_value = (weights @ parts.key_value.movedim(2, 3)).movedim(3, 2)
    key_sum = (weights @ parts.key_sum.movedim(2, 3).unsqueeze(-1)).squeeze(-1).movedim(3, 2)
    whole = Sums(key_value, key_sum, log_scale)
    # What goes on is a copy: a view would keep the sums before all chunks.
    return Sums(*(x[:, :, :-1] for x in whole)), Sums(*(x[:, :, -1].clone() for x in whole))
