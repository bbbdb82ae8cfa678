"""The ``torch`` backend: linear time and memory with ordinary torch operations.

Keys are read in blocks and summed into one small state per head, queries are read in blocks
against it; a causal call runs through both together, block by block, each block in chunks. With
gradients enabled blocks are checkpointed: what is kept is the inputs, the output and a state per
block, and features are computed again in the backward pass.

Scaling. Feature ``f`` of all keys is divided by ``e^{s_f}``, where ``s_f`` is the largest exponent
seen so far, and a query's features are multiplied by it and divided by their maximum over ``f``;
so the leading term of every normaliser is one. Among the pairs within a causal chunk, where a
maximum over the chunk would let a later key touch an earlier row, each key is divided by its own
largest feature instead, and its scale enters the small matrix of pairs after masking, as in a
softmax. Scales are constants to autograd: the quotient does not depend on them.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from performers.attention.problem import AttentionProblem
from performers.attention.state import FavorState
from performers.features import FeatureForm

# Rows of a causal chunk, and features held at a time (elements over batch, heads and rows).
_CHUNK = 64
_BLOCK_ELEMENTS = 1 << 21

# Normalisers smaller than this are not scaled up further: their inverse must stay finite.
_TINY = 1e-30


class _Sums(NamedTuple):
    """Sums over keys, as in FavorState: ``(B, H, m, Dv)``, ``(B, H, m)`` and ``(B, H, m)``."""

    key_value: Tensor
    key_sum: Tensor
    log_scale: Tensor


class _Rows(NamedTuple):
    """Attention not yet divided: ``e^log_scale (numerator, denominator)``.

    Shapes ``(..., L, Dv)``, ``(..., L, 1)`` and ``(..., L, 1)``.
    """

    numerator: Tensor
    denominator: Tensor
    log_scale: Tensor


class _Features(NamedTuple):
    """How blocks turn slices of the inputs into features."""

    form: FeatureForm
    root: float
    dtype: torch.dtype

    def of(self, x: Tensor, *, is_query: bool) -> tuple[Tensor | None, Tensor | None]:
        return self.form.decompose(x.to(self.dtype) * self.root, is_query=is_query)

    @property
    def has_exponent(self) -> bool:
        return self.form.kind != "elementwise"


def attend(problem: AttentionProblem) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    Args:
        problem: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``problem.dtype``, and the
        state or None.
    """
    features = _Features(problem.form.to(problem.dtype), math.sqrt(problem.scale), problem.dtype)
    # Autocast would move the sums into half precision.
    with torch.autocast(problem.query.device.type, enabled=False):
        if not problem.is_causal:
            if problem.segments is not None:
                return _packed_bidirectional(problem, features), None
            return _bidirectional(problem, features), None
        sums = _initial_sums(problem, features)
        if problem.query.shape[-2] == 1:
            key, value, mask = problem.key, problem.value, problem.key_mask
            sums = _absorb(features, key, value, mask, *sums)
            out = _read(features, problem.query, *sums)
        else:
            (out,), sums = _causal(problem, features, sums, strict=False, divide=True)
    return out, FavorState(*sums) if problem.return_state else None


def _initial_sums(problem: AttentionProblem, features: _Features) -> _Sums:
    if problem.state is not None:
        state = problem.state
        return _Sums(state.key_value, state.key_sum, state.log_scale)
    shape = (*problem.key.shape[:2], features.form.num_features)
    empty = problem.value.new_zeros(shape, dtype=problem.dtype)
    return _Sums(
        problem.value.new_zeros((*shape, problem.value.shape[-1]), dtype=problem.dtype),
        empty,
        torch.full_like(empty, -math.inf) if features.has_exponent else empty,
    )


def _bidirectional(problem: AttentionProblem, features: _Features) -> Tensor:
    query, key, value, mask = problem.query, problem.key, problem.value, problem.key_mask
    sums = _initial_sums(problem, features)
    rows = _block_rows(problem.key.shape[:2], features)
    key_blocks = list(_slices(key.shape[-2], rows))
    query_blocks = list(_slices(query.shape[-2], max(1, rows // query.shape[2])))
    run = _direct if len(key_blocks) == len(query_blocks) == 1 else _checkpointed

    def absorb(key: Tensor, value: Tensor, mask: Tensor | None, *sums: Tensor) -> _Sums:
        return _absorb(features, key, value, mask, *sums)

    def read(query: Tensor, *sums: Tensor) -> tuple[Tensor]:
        return (_read(features, query, *sums),)

    for block in key_blocks:
        masked = None if mask is None else mask[:, block]
        sums = _Sums(*run(absorb, key[:, :, block], value[:, :, block], masked, *sums))
    outputs = [run(read, query[:, :, :, block], *sums)[0] for block in query_blocks]
    if not outputs:
        return query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=problem.dtype)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)


def _absorb(
    features: _Features,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_value: Tensor,
    key_sum: Tensor,
    log_scale: Tensor,
) -> _Sums:
    """Add a block of keys ``(B, H, T, D)`` and values to the sums."""
    key, value = _masked(key, mask), _masked(value.to(features.dtype), mask)
    base, exponent = features.of(key, is_query=False)
    if exponent is None:
        assert base is not None
        phi = _masked(base, mask)
    else:
        if mask is not None:
            exponent = exponent.masked_fill(~mask[:, None, :, None], -math.inf)
        previous = log_scale
        log_scale = torch.maximum(log_scale, exponent.detach().amax(-2))
        scale = _finite(log_scale)
        phi = _times(base, (exponent - scale.unsqueeze(-2)).exp())
        decay = (previous - scale).exp()
        key_value, key_sum = key_value * decay.unsqueeze(-1), key_sum * decay
    return _Sums(
        key_value + phi.transpose(-1, -2) @ value,
        key_sum + phi.sum(-2),
        log_scale,
    )


def _read(
    features: _Features, query: Tensor, key_value: Tensor, key_sum: Tensor, log_scale: Tensor
) -> Tensor:
    """Attention of a block of queries ``(B, H, G, T, D)`` to all that the sums hold."""
    base, exponent = features.of(query.flatten(2, 3), is_query=True)
    phi, _ = _query_features(base, exponent, _finite(log_scale).unsqueeze(-2))
    numerator, denominator = phi @ key_value, phi @ key_sum.unsqueeze(-1)
    return _divide(numerator, denominator).unflatten(2, query.shape[2:4])


def _causal(
    problem: AttentionProblem,
    features: _Features,
    sums: _Sums,
    *,
    strict: bool,
    divide: bool,
) -> tuple[tuple[Tensor, ...], _Sums]:
    """Every query against the keys up to its own position, or before it when ``strict``.

    Returns:
        The output when ``divide``, else the fields of ``_Rows``; and the sums after the last key.
    """
    query, key, value = problem.query, problem.key, problem.value
    mask, segments = problem.key_mask, problem.segments
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
            features, query, key, value, mask, segments, before, _Sums(*sums), strict
        )
        if divide:
            return _divide(rows.numerator, rows.denominator), *sums
        return *rows, *sums

    rows = _block_rows((key.shape[0], key.shape[1] * query.shape[2]), features)
    blocks = list(_causal_slices(length, rows))
    run = _direct if len(blocks) <= 1 else _checkpointed
    parts: list[tuple[Tensor, ...]] = []
    for block in blocks:
        before = None
        if segments is not None:
            # No sequence has the index -1: nothing comes before the first block.
            before = segments[block.start - 1] if block.start else segments.new_tensor(-1)
        *part, key_value, key_sum, log_scale = run(
            block_step,
            query[:, :, :, block],
            key[:, :, block],
            value[:, :, block],
            None if mask is None else mask[:, block],
            None if segments is None else segments[block],
            before,
            *sums,
        )
        sums = _Sums(key_value, key_sum, log_scale)
        parts.append(tuple(part))
    if not parts:
        empty = query.new_zeros(*query.shape[:-1], value.shape[-1], dtype=problem.dtype)
        return (empty, empty[..., :1], empty[..., :1])[: 1 if divide else 3], sums
    if len(parts) == 1:
        return parts[0], sums
    return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*parts, strict=True)), sums


def _causal_block(
    features: _Features,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    segments: Tensor | None,
    before: Tensor | None,
    sums: _Sums,
    strict: bool,
) -> tuple[_Rows, _Sums]:
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
    chunk = min(_CHUNK, length)
    chunks = (length // chunk, chunk)
    # Query rows of one chunk, all groups together: (B, H, N, G C, D).
    query = query.unflatten(3, chunks).movedim(2, 3).flatten(2, 4)
    query_base, query_exponent = features.of(query, is_query=True)
    query_base = _unflatten(query_base, (chunks[0], groups * chunk))
    query_exponent = _unflatten(query_exponent, (chunks[0], groups * chunk))
    key_base, key_exponent = features.of(_masked(key, mask), is_query=False)
    value = _masked(value.to(features.dtype), mask).unflatten(2, chunks)
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
    phi, log_scale = _query_features(
        query_base, query_exponent, _finite(past.log_scale).unsqueeze(-2)
    )
    outside = _Rows(phi @ past.key_value, phi @ past.key_sum.unsqueeze(-1), log_scale)
    if has_past is not None:
        seen = has_past.repeat(1, groups).unsqueeze(-1)
        outside = outside._replace(
            numerator=outside.numerator.where(seen, 0.0),
            denominator=outside.denominator.where(seen, 0.0),
        )
    rows = _merge(outside, inside, scaled=features.has_exponent)
    shape = (chunks[0], groups, chunk)

    def in_order(x: Tensor) -> Tensor:
        return x.unflatten(3, shape[1:]).movedim(3, 2).flatten(3, 4)

    return _Rows(*(in_order(x) for x in rows)), sums


def _pairs_within_chunks(
    query_base: Tensor | None,
    query_exponent: Tensor | None,
    key_base: Tensor | None,
    key_exponent: Tensor | None,
    value: Tensor,
    groups: int,
    segments: Tensor | None,
    strict: bool,
) -> _Rows:
    """Each chunk's queries ``(B, H, N, G C, m)`` against its own keys ``(B, H, N, C, m)``."""
    size = value.shape[-2]
    seen = torch.ones(size, size, dtype=torch.bool, device=value.device).tril(-1 if strict else 0)
    if segments is not None:
        seen = seen & (segments.unsqueeze(-1) == segments.unsqueeze(-2))
    no_scale = value.new_zeros(())
    left, left_scale = _query_features(query_base, query_exponent, no_scale)
    if key_exponent is None:
        assert key_base is not None
        pairs = (left @ key_base.transpose(-1, -2)).unflatten(3, (groups, size))
        pairs = pairs.where(seen.unsqueeze(-3), 0.0)
        log_scale = no_scale
    else:
        key_scale = key_exponent.detach().amax(-1, keepdim=True)
        right = _times(key_base, (key_exponent - _finite(key_scale)).exp())
        logs = key_scale.transpose(-1, -2).masked_fill(~seen, -math.inf)
        peak = _finite(logs.amax(-1, keepdim=True))
        pairs = (left @ right.transpose(-1, -2)).unflatten(3, (groups, size))
        pairs = pairs * (logs - peak).exp().unsqueeze(3)
        log_scale = left_scale + peak.repeat(1, 1, 1, groups, 1)
    pairs = pairs.flatten(3, 4)
    return _Rows(pairs @ value, pairs.sum(-1, keepdim=True), log_scale)


def _prefix_sums(
    key_base: Tensor | None,
    key_exponent: Tensor | None,
    value: Tensor,
    sums: _Sums,
    last: Tensor | None,
    continues: Tensor | None,
) -> tuple[_Sums, _Sums]:
    """Sums over the keys before each chunk (stacked on a chunk axis), and after the last one.

    ``last`` (N, C) marks the keys that belong to their chunk's last sequence, the only one that
    can go on; ``continues`` (N,) says whether that is the sequence which entered the chunk.
    """
    key_value, key_sum, log_scale = sums
    before: list[_Sums] = []
    if key_exponent is None:
        assert key_base is not None
        phi = key_base if last is None else key_base.where(last.unsqueeze(-1), 0.0)
        peak = None
    else:
        if last is not None:
            key_exponent = key_exponent.masked_fill(~last.unsqueeze(-1), -math.inf)
        peak = key_exponent.detach().amax(-2)
        phi = _times(key_base, (key_exponent - _finite(peak).unsqueeze(-2)).exp())
    added_value, added_sum = phi.transpose(-1, -2) @ value, phi.sum(-2)
    for n in range(value.shape[2]):
        before.append(_Sums(key_value, key_sum, log_scale))
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
            scale = _finite(log_scale)
            decay, growth = (previous - scale).exp(), (peak[:, :, n] - scale).exp()
            key_value, key_sum = key_value * decay.unsqueeze(-1), key_sum * decay
            more_value, more_sum = more_value * growth.unsqueeze(-1), more_sum * growth
        key_value, key_sum = key_value + more_value, key_sum + more_sum
    stacked = _Sums(*(torch.stack(tensors, dim=2) for tensors in zip(*before, strict=True)))
    return stacked, _Sums(key_value, key_sum, log_scale)


def _packed_bidirectional(problem: AttentionProblem, features: _Features) -> Tensor:
    """Packed sequences, each attending to itself: the past and itself, then the future.

    Running sums that restart at sequence boundaries need no list of lengths on the host and no
    padding; the future is the strict past of the reversed row.
    """
    sums = _initial_sums(problem, features)
    past, _ = _causal(problem, features, sums, strict=False, divide=False)
    assert problem.segments is not None
    backwards = problem._replace(
        query=problem.query.flip(-2),
        key=problem.key.flip(-2),
        value=problem.value.flip(-2),
        key_mask=None if problem.key_mask is None else problem.key_mask.flip(-1),
        segments=problem.segments.flip(0),
    )
    future, _ = _causal(backwards, features, sums, strict=True, divide=False)
    reversed_rows = _Rows(*(x.flip(-2) for x in future))
    rows = _merge(_Rows(*past), reversed_rows, scaled=features.has_exponent)
    return _divide(rows.numerator, rows.denominator)


def _query_features(
    base: Tensor | None, exponent: Tensor | None, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Query features times ``e^scale``, divided by their largest, and the log of that divisor.

    Without an exponent on the query side the scale is the same for all features: it stays apart.
    """
    if exponent is None:
        assert base is not None
        return base, scale[..., :1] if scale.ndim else scale
    exponent = exponent + scale
    peak = exponent.detach().amax(-1, keepdim=True)
    return _times(base, (exponent - peak).exp()), peak


def _merge(left: _Rows, right: _Rows, *, scaled: bool) -> _Rows:
    """The sum of two parts of the same rows."""
    if not scaled:
        return _Rows(
            left.numerator + right.numerator,
            left.denominator + right.denominator,
            torch.zeros_like(left.denominator),
        )
    peak = _finite(torch.maximum(_log_size(left), _log_size(right)))
    left_weight, right_weight = (left.log_scale - peak).exp(), (right.log_scale - peak).exp()
    return _Rows(
        left.numerator * left_weight + right.numerator * right_weight,
        left.denominator * left_weight + right.denominator * right_weight,
        peak,
    )


def _log_size(rows: _Rows) -> Tensor:
    size = rows.denominator.detach().abs()
    log = rows.log_scale + size.clamp_min(_TINY).log()
    return log.masked_fill(size == 0, -math.inf)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and zero where there was nothing to attend to."""
    return numerator / denominator.where(denominator != 0, 1.0)


def _times(base: Tensor | None, exponential: Tensor) -> Tensor:
    return exponential if base is None else base * exponential


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros in place of rows that take no part, whatever they hold."""
    return x if mask is None else x.where(mask[:, None, :, None], 0.0)


def _finite(scale: Tensor) -> Tensor:
    return scale.where(scale > -math.inf, 0.0)


def _unflatten(x: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    return None if x is None else x.unflatten(2, shape)


def _block_rows(heads: tuple[int, ...] | torch.Size, features: _Features) -> int:
    """Rows whose features fill a block."""
    per_row = math.prod(heads) * features.form.num_features
    rows = _BLOCK_ELEMENTS // max(per_row, 1)
    return max(_CHUNK, rows // _CHUNK * _CHUNK)


def _slices(length: int, rows: int) -> Iterator[slice]:
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def _causal_slices(length: int, rows: int) -> Iterator[slice]:
    """Blocks of whole chunks, then what is left over."""
    whole = length // _CHUNK * _CHUNK
    yield from _slices(whole, rows)
    if whole < length:
        yield slice(whole, length)


def _direct(
    function: Callable[..., tuple[Tensor, ...]], *args: Tensor | None
) -> tuple[Tensor, ...]:
    return function(*args)


def _checkpointed(
    function: Callable[..., tuple[Tensor, ...]], *args: Tensor | None
) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
