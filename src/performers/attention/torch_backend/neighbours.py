"""Neighbours of the ``torch`` backend: pairs along the edges of a graph.

A pair needs numbers, its estimate and its logit, of which nothing is kept: products of two gathered
rows, and sums of gathered rows over the pairs of a query, are each other's derivatives and go
through the pairs some at a time.
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from performers.attention.call import AttentionCall, masked
from performers.attention.exact_keys.neighbours import NeighbourLists
from performers.attention.torch_backend.blocks import (
    Features,
    Rows,
    block_sizes,
    finite,
    in_blocks,
    query_features,
)

# Elements held at a time, of gathered rows and of features: what allocators of a CPU use again, and
# elsewhere enough for launches to cost less than the work.
_GATHERED_ELEMENTS = {"cpu": 1 << 18}
_FEATURE_ELEMENTS = {"cpu": 1 << 21}
_ACCELERATOR_ELEMENTS = 1 << 26


def neighbour_rows(
    call: AttentionCall, features: Features, lists: NeighbourLists
) -> tuple[Rows, Rows]:
    """Sums of the estimates of pairs, and of their exact weights: ``(B, H, queries, ...)``.

    Some heads at a time. Features, estimates and weights are computed again in the backward pass.
    """
    batch, heads, groups, length, _ = call.query.shape
    key, value = (masked(x, call.key_mask) for x in (call.key, call.value))

    def step(
        query: Tensor, key: Tensor, value: Tensor, head: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        own = _of_heads(features, head)
        query, key, value = (x.to(features.dtype) for x in (query, key, value))
        left, right, log_scale = _scaled_features(call, own, query, key)
        left = left.unflatten(2, (groups, length))
        estimates, logits = (
            _Products.apply(_nodes(q), _nodes(k, groups), lists.query, lists.key)
            for q, k in ((left, right), (query * call.factor, key))
        )
        if bias is not None:
            # Pairs by batch, head and group, as rows of nodes are.
            logits = logits + bias.to(logits.dtype).expand(batch, -1, -1, -1).flatten(0, 2).mT
        if lists.taken is not None:
            taken = lists.taken.mT[:, :, None].expand(-1, -1, len(head) * groups).flatten(1)
            estimates = estimates.where(taken, 0.0)
            logits = logits.masked_fill(~taken, -math.inf)
        index = lists.query.unsqueeze(-1).expand_as(logits)
        peak = logits.new_full((length, logits.shape[1]), -math.inf)
        peak = finite(peak.scatter_reduce(0, index, logits.detach(), "amax"))
        weights = (logits - peak.gather(0, index)).exp()
        value = _nodes(value, groups)

        def in_heads(x: Tensor) -> Tensor:
            # Heads come last but one: blocks of them are joined along that dimension.
            x = x.unflatten(1, (batch, len(head), groups))
            return x.permute(1, 3, 0, 2, 4).flatten(1, 2)

        def sums(weights: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.zeros_like(peak).index_add(0, lists.query, weights).unsqueeze(-1)
            out = _Sums.apply(weights, value, lists.query, lists.key, length)
            return in_heads(out), in_heads(total)

        scale = in_heads(peak.unsqueeze(-1))
        return *sums(estimates), log_scale.transpose(1, 2), *sums(weights), scale

    per_head = batch * groups * max(length, key.shape[2]) * features.form.num_features
    most = _FEATURE_ELEMENTS.get(key.device.type, _ACCELERATOR_ELEMENTS)
    sizes = block_sizes(heads, max(1, most // max(1, per_head)))
    inputs = [(x, 1) for x in (call.query, key, value)]
    index = torch.arange(heads, device=key.device)
    results, _ = in_blocks(step, sizes, [*inputs, (index, 0), (lists.bias, 0)], keep=False)
    results = tuple(x.transpose(1, 2) for x in results)
    return Rows(*results[:3]), Rows(*results[3:])


def _scaled_features(
    call: AttentionCall, features: Features, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Features of queries ``(B, H, G L, m)`` and keys, and the log scale of their products.

    Each feature has the scale of its largest key, in its own sequence: that of the sums over all
    keys. An estimate that vanishes at it has vanished in those, too.
    """
    _, query_exponent = features.of(query.flatten(2, 3), is_query=True)
    _, key_exponent = features.of(key, is_query=False)
    assert query_exponent is not None
    assert key_exponent is not None
    if call.key_mask is not None:
        key_exponent = key_exponent.masked_fill(~call.key_mask[:, None, :, None], -math.inf)
    highest = key_exponent.detach()
    if call.segments is None:
        scale = of_query = highest.amax(2, keepdim=True)
    else:
        index = call.segments[:, None].expand_as(highest)
        scale = torch.full_like(highest, -math.inf).scatter_reduce(2, index, highest, "amax")
        scale = scale.gather(2, index)
        of_query = scale.repeat(1, 1, query.shape[2], 1)
    left, log_scale = query_features(None, query_exponent, of_query)
    return left, (key_exponent - finite(scale)).exp(), log_scale


def _of_heads(features: Features, head: Tensor) -> Features:
    """The features of some heads."""
    form = features.form
    if form.num_heads() == 1:
        return features
    weight = form.weight
    assert weight is not None
    bias = form.bias
    if bias is not None and len(bias) > 1:
        bias = bias[head]
    return Features(form._replace(weight=weight[head], bias=bias), features.root, features.dtype)


def _nodes(x: Tensor, groups: int | None = None) -> Tensor:
    """``(B, H, G, T, D)``, or ``(B, H, T, D)`` for all groups, as ``(T, B H G, D)``."""
    if groups is not None:
        x = x.unsqueeze(2).expand(-1, -1, groups, -1, -1)
    return x.permute(3, 0, 1, 2, 4).flatten(1, 3)


def _blocks(pairs: int, like: Tensor) -> range:
    most = _GATHERED_ELEMENTS.get(like.device.type, _ACCELERATOR_ELEMENTS)
    return range(0, pairs, max(1, most // max(1, math.prod(like.shape[1:]))))


class _Products(torch.autograd.Function):
    """``left_i . right_j`` of pairs: ``(L, R, D)`` and ``(S, R, D)`` to ``(E, R)``."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, row: Tensor, column: Tensor) -> Tensor:
        out = left.new_empty(len(row), left.shape[1])
        blocks = _blocks(len(row), left)
        for start in blocks:
            part = slice(start, start + blocks.step)
            pairs = left.index_select(0, row[part]) * right.index_select(0, column[part])
            out[part] = pairs.sum(-1)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, row, column = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _Sums.apply(grad, right, row, column, len(left)) if wanted[0] else None,
            _Sums.apply(grad, left, column, row, len(right)) if wanted[1] else None,
            None,
            None,
        )


class _Sums(torch.autograd.Function):
    """``sum_j weight_ij value_j``: ``(E, R)`` and ``(S, R, D)`` to ``(L, R, D)``."""

    @staticmethod
    def forward(weight: Tensor, value: Tensor, row: Tensor, column: Tensor, length: int) -> Tensor:
        out = value.new_zeros(length, *value.shape[1:])
        blocks = _blocks(len(row), value)
        for start in blocks:
            part = slice(start, start + blocks.step)
            pairs = weight[part].unsqueeze(-1) * value.index_select(0, column[part])
            out.index_add_(0, row[part], pairs)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, value, row, column = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (
            _Products.apply(grad, value, row, column) if wanted[0] else None,
            _Sums.apply(weight, grad, column, row, len(value)) if wanted[1] else None,
            None,
            None,
            None,
        )
