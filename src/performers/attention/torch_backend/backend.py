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

Exact pairs. What a query meets exactly (``exact.py``) and what it meets through features are two
parts of its row, merged at the larger of their scales. Keys beyond a window of ``w`` are the strict
past of the keys delayed by ``w``, and for the other direction of the reversed row: the causal
algorithm computes both, and nothing has to be subtracted.
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall
from performers.attention.nonfinite import without_nonfinite
from performers.attention.state import FavorState
from performers.attention.torch_backend.blocks import (
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
from performers.attention.torch_backend.causal import causal_rows
from performers.attention.torch_backend.exact import exact_rows
from performers.attention.torch_backend.listed import split_listed
from performers.features.precision import without_autocast


def attend(call: AttentionCall) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    Args:
        call: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``call.dtype``, and the
        state or None.
    """
    features = Features(call.form.to(call.dtype), math.sqrt(call.factor), call.dtype)
    call, touched = without_nonfinite(call)
    with without_autocast(call.query.device):
        if call.query.shape[-2] == 0:
            return _empty_output(call), FavorState(*_initial_sums(call, features))
        if call.has_exact_pairs():
            out, sums = _with_exact_pairs(call, features)
        elif call.is_causal:
            out, sums = _causal(call, features)
        elif call.segments is not None:
            out, sums = _packed_bidirectional(call, features), None
        else:
            out, sums = _bidirectional(call, features), None
    state = FavorState(*sums) if sums is not None and call.return_state else None
    return (out, state) if touched is None else touched.marked(out, state)


def _causal(call: AttentionCall, features: Features) -> tuple[Tensor, Sums]:
    sums = _initial_sums(call, features)
    if call.query.shape[-2] > 1:
        (out,), sums = causal_rows(call, features, sums, strict=False, divided=True)
        return out, sums
    key, value, mask = call.key, call.value, call.key_mask
    sums = _absorb(features, key, value, mask, *sums)
    read = _read(features, call.query, *sums)
    return divide(read.numerator, read.denominator), sums


def _initial_sums(call: AttentionCall, features: Features) -> Sums:
    if call.state is not None:
        state = call.state
        return Sums(state.key_value, state.key_sum, state.log_scale)
    shape = (*call.key.shape[:2], features.form.num_features)
    empty = call.value.new_zeros(shape, dtype=call.dtype)
    return Sums(
        call.value.new_zeros((*shape, call.value.shape[-1]), dtype=call.dtype),
        empty,
        torch.full_like(empty, -math.inf) if features.has_exponent() else empty,
    )


def _empty_output(call: AttentionCall) -> Tensor:
    """No rows, but in the graph of the inputs, so that backward works."""
    width = call.value.shape[-1]
    rows = call.query.to(call.dtype)[..., :1].expand(*call.query.shape[:-1], width)
    return rows + 0 * (call.key.sum() + call.value.sum()).to(call.dtype)


def _bidirectional(call: AttentionCall, features: Features) -> Tensor:
    rows = _bidirectional_rows(call, features, divided=True)
    return rows[0]


def _bidirectional_rows(
    call: AttentionCall, features: Features, *, divided: bool
) -> tuple[Tensor, ...]:
    """Every query against all keys: the output when ``divided``, else the fields of ``Rows``."""
    query, key, value, mask = call.query, call.key, call.value, call.key_mask
    sums = _initial_sums(call, features)
    rows = block_rows(call.key.shape[:2], features)
    key_sizes = block_sizes(key.shape[-2], rows)
    query_sizes = block_sizes(query.shape[-2], max(1, rows // query.shape[2]))
    run = direct if len(key_sizes) == len(query_sizes) == 1 else checkpointed

    def absorb(key: Tensor, value: Tensor, mask: Tensor | None, *sums: Tensor) -> Sums:
        return _absorb(features, key, value, mask, *sums)

    def read(query: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
        read = _read(features, query, *sums)
        return (divide(read.numerator, read.denominator),) if divided else read

    for block in zip(
        cut(key, key_sizes, 2), cut(value, key_sizes, 2), cut(mask, key_sizes, 1), strict=True
    ):
        sums = Sums(*run(absorb, *block, *sums))
    outputs = [run(read, block, *sums) for block in cut(query, query_sizes, 3)]
    if len(outputs) == 1:
        return outputs[0]
    return tuple(torch.cat(tensors, dim=-2) for tensors in zip(*outputs, strict=True))


def _absorb(
    features: Features,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_value: Tensor,
    key_sum: Tensor,
    log_scale: Tensor,
) -> Sums:
    """Add a block of keys ``(B, H, T, D)`` and values to the sums."""
    key, value = masked(key, mask), masked(value.to(features.dtype), mask)
    base, exponent = features.of(key, is_query=False)
    if exponent is None:
        assert base is not None
        phi = masked(base, mask)
    else:
        if mask is not None:
            exponent = exponent.masked_fill(~mask[:, None, :, None], -math.inf)
        previous = log_scale
        log_scale = torch.maximum(log_scale, exponent.detach().amax(-2))
        scale = finite(log_scale)
        phi = times(base, (exponent - scale.unsqueeze(-2)).exp())
        decay = (previous - scale).exp()
        key_value, key_sum = key_value * decay.unsqueeze(-1), key_sum * decay
    return Sums(
        key_value + phi.transpose(-1, -2) @ value,
        key_sum + phi.sum(-2),
        log_scale,
    )


def _read(
    features: Features, query: Tensor, key_value: Tensor, key_sum: Tensor, log_scale: Tensor
) -> Rows:
    """A block of queries ``(B, H, G, T, D)`` against all that the sums hold."""
    base, exponent = features.of(query.flatten(2, 3), is_query=True)
    phi, scale = query_features(base, exponent, finite(log_scale).unsqueeze(-2))
    rows = phi @ key_value, phi @ key_sum.unsqueeze(-1), scale.expand(*phi.shape[:-1], 1)
    return Rows(*(x.unflatten(2, query.shape[2:4]) for x in rows))


def _packed_bidirectional(call: AttentionCall, features: Features) -> Tensor:
    """Packed sequences, each attending to itself: the past and itself, then the future.

    Running sums that restart at sequence boundaries need no list of lengths on the host and no
    padding; the future is the strict past of the reversed row.
    """
    sums = _initial_sums(call, features)
    past, _ = causal_rows(call, features, sums, strict=False, divided=False)
    rows = merge(Rows(*past), _future(call, features), scaled=features.has_exponent())
    return divide(rows.numerator, rows.denominator)


def _future(call: AttentionCall, features: Features) -> Rows:
    """Every query against the keys after its position, or beyond the window's reach of it."""
    backwards = call.replaced(
        query=call.query.flip(-2),
        key=call.key.flip(-2),
        value=call.value.flip(-2),
        key_mask=None if call.key_mask is None else call.key_mask.flip(-1),
        segments=None if call.segments is None else call.segments.flip(0),
    )
    backwards = _delayed(backwards)
    sums = _initial_sums(call, features)
    rows, _ = causal_rows(backwards, features, sums, strict=True, divided=False)
    return Rows(*(x.flip(-2) for x in rows))


def _with_exact_pairs(call: AttentionCall, features: Features) -> tuple[Tensor, Sums]:
    """Rows through features and exact ones, merged."""
    sums = _initial_sums(call, features)
    window = call.window is not None
    if window or call.is_causal or call.segments is not None:
        delayed = _delayed(call) if window else call
        past, sums = causal_rows(delayed, features, sums, strict=window, divided=False)
        rows = Rows(*past)
        if not call.is_causal:
            rows = merge(rows, _future(call, features), scaled=True)
    else:
        rows = Rows(*_bidirectional_rows(call, features, divided=False))
    listed = None
    if call.lists is not None:
        rows, listed = split_listed(call, features, rows)
    # What cancels without exact pairs counts here: a query's own factor, and the mean over draws.
    half_norm = call.query.to(call.dtype).square().sum(-1, keepdim=True) * call.factor / 2
    sign = 1 if call.form.kind == "trigonometric" else -1
    log_factor = sign * half_norm + math.log(call.form.normalizer)
    rows = Rows(rows.numerator, rows.denominator, rows.log_scale + log_factor)
    if call.window is not None or call.sink_keys is not None:
        rows = merge(rows, exact_rows(call), scaled=True)
    if listed is not None:
        rows = merge(rows, listed, scaled=True)
    return divide(rows.numerator, rows.denominator), sums


def _delayed(call: AttentionCall) -> AttentionCall:
    """The call with its keys later by the window: its strict past is what lies beyond.

    Keys that a state held come first, as many as the window: then nothing has to move.
    """
    length = call.query.shape[-2]
    shift = (call.window or 0) - call.offset
    missing, kept = min(shift, length), max(length - shift, 0)
    mask, segments = call.key_mask, call.segments
    if missing:
        if mask is None:
            mask = torch.ones(call.key.shape[0], kept, dtype=torch.bool, device=call.key.device)
        mask = F.pad(mask[:, :kept], (missing, 0))
        if segments is not None:
            # The last keys of one sequence must not turn up in the next.
            same = segments[missing:] == segments[:kept]
            mask = mask & F.pad(same, (missing, 0))
    elif mask is not None:
        mask = mask[:, :length]
    return call.replaced(
        key=F.pad(call.key[:, :, :kept], (0, 0, missing, 0)),
        value=F.pad(call.value[:, :, :kept], (0, 0, missing, 0)),
        key_mask=mask,
        segments=segments,
    )
