"""Listed keys in the ``torch`` backend: exact in place of their estimate.

Keys in the list of a query's bucket are in the sums of the features like all others, so each such
pair is corrected: its estimate is taken out and its exact weight put in. Queries of one list stand
together in blocks, so that both are small dense products.
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.blocks import (
    Features,
    Rows,
    block_sizes,
    checkpointed,
    cut,
    direct,
    finite,
    masked,
    merge,
)
from performers.attention.problem import AttentionProblem

_BLOCK_ELEMENTS = 1 << 21
_ROWS = (8, 64)
# What is left of a sum after taking away all but this much of it is rounding.
_LEAST_REST = 1e-5


class ListedPairs(NamedTuple):
    """Queries in blocks of one list each, and the lists; the blocks of a list follow each other.

    Attributes:
        query: Shape ``(B, H, blocks, rows, D)``; places without a query hold any other.
        key: Shape ``(B, H, lists, n, D)``.
        value: Shape ``(B, H, lists, n, Dv)``.
        taken: Where a list has a key, shape ``(B, H, lists, n)``, bool.
        met: Which pairs there are, shape ``(B, H, blocks, n, rows)``, bool.
        list: The list of each block, shape ``(B, H, blocks)``; the last blocks may be of none.
        begin: The first block of each list, shape ``(B, H, lists + 1)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    taken: Tensor
    met: Tensor
    list: Tensor
    begin: Tensor


Evaluate = Callable[[AttentionProblem, Features, ListedPairs], tuple[Rows, Rows]]
"""Sums of the estimates of pairs, and of their exact weights: ``(B, H, blocks, rows, ...)``."""


class _Blocks(NamedTuple):
    """Queries in blocks of one list each.

    Attributes:
        row: The query in each place, shape ``(B, H, blocks, rows)``; -1 for none.
        list: The list of each block, shape ``(B, H, blocks)``.
        begin: The first block of each list, shape ``(B, H, lists + 1)``.
        place: Where each query is, shape ``(B, H, queries)``.
    """

    row: Tensor
    list: Tensor
    begin: Tensor
    place: Tensor


def split_listed(
    problem: AttentionProblem, features: Features, far: Rows, evaluate: Evaluate
) -> tuple[Rows, Rows]:
    """Take the pairs in the lists out of the rows through features, and add them up exactly.

    Args:
        problem: The call; its ``lists`` say which pairs.
        features: Its feature map.
        far: Sums of ``phi(q) . phi(k)`` over all keys that are neither in the window nor sinks.
        evaluate: What computes the pairs: `dense_pairs`, or the kernels.

    Returns:
        The same sums without the listed keys, and sums of ``exp(scale q . k)`` over these.
    """
    assert problem.lists is not None
    rest = Rows(*(x.flatten(2, 3) for x in far))
    exact = None
    for index in range(len(problem.lists.key)):
        estimated, more = _listed(problem, features, index, evaluate)
        share = (estimated.log_scale - rest.log_scale).masked_fill(
            estimated.denominator == 0, -math.inf
        )
        weight = share.exp().to(rest.numerator.dtype)
        rest = Rows(
            rest.numerator - estimated.numerator * weight,
            rest.denominator - estimated.denominator * weight,
            rest.log_scale,
        )
        exact = more if exact is None else merge(exact, more, scaled=True)
    assert exact is not None
    whole = far.denominator.flatten(2, 3).detach()
    known = rest.denominator.detach() > _LEAST_REST * whole
    rest = Rows(rest.numerator.where(known, 0.0), rest.denominator.where(known, 0.0), far.log_scale)
    shape = problem.query.shape[2:4]
    rest = Rows(
        rest.numerator.unflatten(2, shape), rest.denominator.unflatten(2, shape), far.log_scale
    )
    return rest, Rows(*(x.unflatten(2, shape) for x in exact))


def _listed(
    problem: AttentionProblem, features: Features, index: int, evaluate: Evaluate
) -> tuple[Rows, Rows]:
    """Estimates and exact weights of one round's pairs, rows ``(B, H, G L, ...)``."""
    assert problem.lists is not None
    lists = problem.lists
    length = problem.query.shape[-2]
    blocks = _blocks(lists.of_query[index].flatten(2), lists.key.shape[-2])
    rows = blocks.row.clamp_min(0)
    query = _gather(problem.query.flatten(2, 3), rows.flatten(2)).unflatten(2, rows.shape[2:])
    key, value = (
        _gather(masked(x, problem.key_mask), lists.key[index].flatten(2)).unflatten(
            2, lists.key.shape[-2:]
        )
        for x in (problem.key, problem.value)
    )
    listed = _of_lists(lists.key[index], blocks.list)
    pairs = _of_lists(lists.taken[index], blocks.list).unsqueeze(-1)
    pairs = pairs & (blocks.row >= 0).unsqueeze(-2)
    if problem.window is not None:
        # Positions fit in 32 bits, and there are many pairs.
        distance = (rows % length).int().unsqueeze(-2) - listed.int().unsqueeze(-1)
        pairs = pairs & (distance.abs_() > problem.window)
    for earlier in range(index):
        # A key that an earlier round gave to the query does not count again.
        known = _of_lists(lists.key[earlier], lists.of_query[earlier].flatten(2))
        counts = _of_lists(lists.taken[earlier], lists.of_query[earlier].flatten(2))
        known = _gather(known.masked_fill(~counts, -1), rows.flatten(2))
        known = known.unflatten(2, rows.shape[2:]).unsqueeze(-3)
        pairs = pairs & (listed[..., None, None] != known).all(-1)
    results = evaluate(
        problem,
        features,
        ListedPairs(query, key, value, lists.taken[index], pairs, blocks.list, blocks.begin),
    )
    estimated, exact = (
        Rows(*(_gather(x.flatten(2, 3), blocks.place) for x in part)) for part in results
    )
    return estimated, exact


def dense_pairs(
    problem: AttentionProblem, features: Features, pairs: ListedPairs
) -> tuple[Rows, Rows]:
    """Blocks against their lists with ordinary torch operations, some at a time."""
    count, rows, listed = pairs.list.shape[2], pairs.query.shape[3], pairs.key.shape[3]
    key, value = (
        _of_lists(x.flatten(3), pairs.list).unflatten(3, x.shape[3:])
        for x in (pairs.key, pairs.value)
    )

    def step(query: Tensor, key: Tensor, value: Tensor, met: Tensor) -> tuple[Tensor, ...]:
        return _block(problem, features, query, key, value, met)

    per_block = pairs.list.shape[0] * pairs.list.shape[1] * (rows + listed)
    per_block *= features.form.num_features
    sizes = block_sizes(count, max(1, _BLOCK_ELEMENTS // max(1, per_block)))
    run = direct if len(sizes) == 1 else checkpointed
    parts = [
        run(step, *block)
        for block in zip(
            *(cut(x, sizes, 2) for x in (pairs.query, key, value, pairs.met.mT)), strict=True
        )
    ]
    results = [torch.cat(tensors, dim=2) for tensors in zip(*parts, strict=True)]
    return Rows(*results[:3]), Rows(*results[3:])


def _block(
    problem: AttentionProblem,
    features: Features,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pairs: Tensor,
) -> tuple[Tensor, ...]:
    """Blocks ``(B, H, N, R, D)`` against their lists ``(B, H, N, n, D)``."""
    query, key, value = (x.to(features.dtype) for x in (query, key, value))
    _, query_exponent = features.of(query.flatten(2, 3), is_query=True)
    _, key_exponent = features.of(key.flatten(2, 3), is_query=False)
    assert query_exponent is not None
    assert key_exponent is not None
    query_exponent = query_exponent.unflatten(2, query.shape[2:4])
    key_exponent = key_exponent.unflatten(2, key.shape[2:4])
    # One scale per feature, that of the list, as in the sums over all keys.
    listed = pairs.any(-2).unsqueeze(-1)
    key_exponent = key_exponent.masked_fill(~listed, -math.inf)
    key_scale = finite(key_exponent.detach().amax(-2, keepdim=True))
    left = query_exponent + key_scale
    log_scale = left.detach().amax(-1, keepdim=True)
    estimates = (left - log_scale).exp() @ (key_exponent - key_scale).exp().mT
    estimates = estimates.masked_fill(~pairs, 0.0)
    logits = (query @ key.mT * problem.scale).masked_fill(~pairs, -math.inf)
    top = finite(logits.detach().amax(-1, keepdim=True))
    exact = (logits - top).exp()
    return (
        estimates @ value,
        estimates.sum(-1, keepdim=True),
        log_scale,
        exact @ value,
        exact.sum(-1, keepdim=True),
        top,
    )


def _blocks(of_query: Tensor, lists: int) -> _Blocks:
    """Sort queries by their lists ``(B, H, queries)``, each list from a new block on."""
    batch, heads, count = of_query.shape
    least, most = _ROWS
    rows = least
    while rows < most and rows * 2 * lists <= count:
        rows *= 2
    sizes = torch.zeros(batch, heads, lists, dtype=torch.int64, device=of_query.device)
    sizes = sizes.scatter_add(2, of_query, torch.ones_like(of_query))
    blocks = -(-sizes // rows)
    first = blocks.cumsum(-1) - blocks
    order = of_query.argsort(dim=-1, stable=True)
    ordered = of_query.gather(2, order)
    rank = torch.arange(count, device=of_query.device) - (sizes.cumsum(-1) - sizes).gather(
        2, ordered
    )
    place = first.gather(2, ordered) * rows + rank
    most_blocks = count // rows + min(lists, count)
    row = torch.full((batch, heads, most_blocks * rows), -1, device=of_query.device)
    row = row.scatter(2, place, order)
    of_block = torch.zeros(batch, heads, most_blocks, dtype=torch.int64, device=of_query.device)
    of_block = of_block.scatter(2, place // rows, ordered)
    back = torch.empty_like(place).scatter(2, order, place)
    begin = F.pad(blocks.cumsum(-1), (1, 0))
    return _Blocks(row.unflatten(2, (most_blocks, rows)), of_block, begin, back)


def _of_lists(x: Tensor, lists: Tensor) -> Tensor:
    """Entries ``(B, H, lists, n)`` of the lists ``(B, H, N)``: ``(B, H, N, n)``."""
    return x.gather(2, lists.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``(B, H, N)`` of ``(B, H, T, D)``: ``(B, H, N, D)``."""
    return x.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
