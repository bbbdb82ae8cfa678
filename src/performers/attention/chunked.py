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

Exact terms. What a query meets exactly (``near.py``) and what it meets through features are two
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

from performers.attention.blocks import (
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
from performers.attention.causal import causal_rows
from performers.attention.listed import split_listed
from performers.attention.near import near_rows
from performers.attention.nonfinite import without_nonfinite
from performers.attention.problem import AttentionProblem
from performers.attention.state import FavorState
from performers.features.precision import without_autocast


def attend(problem: AttentionProblem) -> tuple[Tensor, FavorState | None]:
    """Attention and, when asked for, the state after the last key.

    Args:
        problem: The checked call.

    Returns:
        Output of shape ``(batch, key_heads, groups, L, value_dim)`` in ``problem.dtype``, and the
        state or None.
    """
    features = Features(problem.form.to(problem.dtype), math.sqrt(problem.scale), problem.dtype)
    problem, touched = without_nonfinite(problem)
    with without_autocast(problem.query.device):
        if problem.query.shape[-2] == 0:
            return _empty_output(problem), FavorState(*_initial_sums(problem, features))
        if problem.has_exact_terms():
            out, sums = _with_exact_terms(problem, features)
        elif problem.is_causal:
            out, sums = _causal(problem, features)
        elif problem.segments is not None:
            out, sums = _packed_bidirectional(problem, features), None
        else:
            out, sums = _bidirectional(problem, features), None
    state = FavorState(*sums) if sums is not None and problem.return_state else None
    return (out, state) if touched is None else touched.marked(out, state)


def _causal(problem: AttentionProblem, features: Features) -> tuple[Tensor, Sums]:
    sums = _initial_sums(problem, features)
    if problem.query.shape[-2] > 1:
        (out,), sums = causal_rows(problem, features, sums, strict=False, divided=True)
        return out, sums
    key, value, mask = problem.key, problem.value, problem.key_mask
    sums = _absorb(features, key, value, mask, *sums)
    read = _read(features, problem.query, *sums)
    return divide(read.numerator, read.denominator), sums


def _initial_sums(problem: AttentionProblem, features: Features) -> Sums:
    if problem.state is not None:
        state = problem.state
        return Sums(state.key_value, state.key_sum, state.log_scale)
    shape = (*problem.key.shape[:2], features.form.num_features)
    empty = problem.value.new_zeros(shape, dtype=problem.dtype)
    return Sums(
        problem.value.new_zeros((*shape, problem.value.shape[-1]), dtype=problem.dtype),
        empty,
        torch.full_like(empty, -math.inf) if features.has_exponent() else empty,
    )


def _empty_output(problem: AttentionProblem) -> Tensor:
    """No rows, but in the graph of the inputs, so that backward works."""
    width = problem.value.shape[-1]
    rows = problem.query.to(problem.dtype)[..., :1].expand(*problem.query.shape[:-1], width)
    return rows + 0 * (problem.key.sum() + problem.value.sum()).to(problem.dtype)


def _bidirectional(problem: AttentionProblem, features: Features) -> Tensor:
    rows = _bidirectional_rows(problem, features, divided=True)
    return rows[0]


def _bidirectional_rows(
    problem: AttentionProblem, features: Features, *, divided: bool
) -> tuple[Tensor, ...]:
    """Every query against all keys: the output when ``divided``, else the fields of ``Rows``."""
    query, key, value, mask = problem.query, problem.key, problem.value, problem.key_mask
    sums = _initial_sums(problem, features)
    rows = block_rows(problem.key.shape[:2], features)
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


def _packed_bidirectional(problem: AttentionProblem, features: Features) -> Tensor:
    """Packed sequences, each attending to itself: the past and itself, then the future.

    Running sums that restart at sequence boundaries need no list of lengths on the host and no
    padding; the future is the strict past of the reversed row.
    """
    sums = _initial_sums(problem, features)
    past, _ = causal_rows(problem, features, sums, strict=False, divided=False)
    rows = merge(Rows(*past), _future(problem, features), scaled=features.has_exponent())
    return divide(rows.numerator, rows.denominator)


def _future(problem: AttentionProblem, features: Features) -> Rows:
    """Every query against the keys after its position, or beyond the window's reach of it."""
    backwards = _with_keys(
        problem,
        query=problem.query.flip(-2),
        key=problem.key.flip(-2),
        value=problem.value.flip(-2),
        key_mask=None if problem.key_mask is None else problem.key_mask.flip(-1),
        segments=None if problem.segments is None else problem.segments.flip(0),
    )
    backwards = _delayed(backwards)
    sums = _initial_sums(problem, features)
    rows, _ = causal_rows(backwards, features, sums, strict=True, divided=False)
    return Rows(*(x.flip(-2) for x in rows))


def _with_exact_terms(problem: AttentionProblem, features: Features) -> tuple[Tensor, Sums]:
    """Rows through features and exact ones, merged."""
    sums = _initial_sums(problem, features)
    if problem.window is not None:
        past, sums = causal_rows(_delayed(problem), features, sums, strict=True, divided=False)
        far = Rows(*past)
        if not problem.is_causal:
            far = merge(far, _future(problem, features), scaled=True)
    elif problem.is_causal:
        past, sums = causal_rows(problem, features, sums, strict=False, divided=False)
        far = Rows(*past)
    elif problem.segments is not None:
        past, _ = causal_rows(problem, features, sums, strict=False, divided=False)
        far = merge(Rows(*past), _future(problem, features), scaled=True)
    else:
        far = Rows(*_bidirectional_rows(problem, features, divided=False))
    listed = None
    if problem.lists is not None:
        far, listed = split_listed(problem, features, far)
    # What cancels without exact terms counts here: a query's own factor, and the mean over draws.
    half_norm = problem.query.to(problem.dtype).square().sum(-1, keepdim=True) * problem.scale / 2
    sign = 1 if problem.form.kind == "trigonometric" else -1
    log_factor = sign * half_norm + math.log(problem.form.normalizer)
    rows = Rows(far.numerator, far.denominator, far.log_scale + log_factor)
    if problem.window is not None or problem.sinks is not None:
        rows = merge(rows, near_rows(problem), scaled=True)
    if listed is not None:
        rows = merge(rows, listed, scaled=True)
    return divide(rows.numerator, rows.denominator), sums


def _delayed(problem: AttentionProblem) -> AttentionProblem:
    """The problem with its keys later by the window: its strict past is what lies beyond.

    Keys that a state held come first, as many as the window: then nothing has to move.
    """
    length = problem.query.shape[-2]
    shift = (problem.window or 0) - problem.offset
    missing, kept = min(shift, length), max(length - shift, 0)
    mask, segments = problem.key_mask, problem.segments
    if missing:
        if mask is None:
            mask = torch.ones(
                problem.key.shape[0], kept, dtype=torch.bool, device=problem.key.device
            )
        mask = F.pad(mask[:, :kept], (missing, 0))
        if segments is not None:
            # The last keys of one sequence must not turn up in the next.
            same = segments[missing:] == segments[:kept]
            mask = mask & F.pad(same, (missing, 0))
    elif mask is not None:
        mask = mask[:, :length]
    return _with_keys(
        problem,
        query=problem.query,
        key=F.pad(problem.key[:, :, :kept], (0, 0, missing, 0)),
        value=F.pad(problem.value[:, :, :kept], (0, 0, missing, 0)),
        key_mask=mask,
        segments=segments,
    )


def _with_keys(
    problem: AttentionProblem,
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    segments: Tensor | None,
) -> AttentionProblem:
    """The problem with other tensors."""
    return AttentionProblem(
        query=query,
        key=key,
        value=value,
        form=problem.form,
        scale=problem.scale,
        is_causal=problem.is_causal,
        key_mask=key_mask,
        segments=segments,
        state=problem.state,
        return_state=problem.return_state,
        window=problem.window,
        offset=problem.offset,
        sinks=problem.sinks,
        dtype=problem.dtype,
        lists=problem.lists,
    )
