"""Listed keys: exact in place of their estimate.

Keys in the list of a query are in the sums of the features like all others, so each such pair is
corrected: its estimate is taken out and its exact weight put in. Queries that share the list of a
bucket stand together in blocks, so that both are small dense products: here by torch, in ``native``
by kernels. Lists along the edges of a graph are each query's own (``neighbours.py``).
"""

# torch.compile (2.6) cannot evaluate the annotations of local functions.
from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention.call import AttentionCall, masked
from performers.attention.exact_keys.listed_keys import KeyLists
from performers.attention.exact_keys.neighbours import NeighbourLists
from performers.attention.torch_backend.blocks import (
    Features,
    Rows,
    block_sizes,
    finite,
    in_blocks,
    query_features,
    softmax_rows,
)
from performers.attention.torch_backend.neighbours import neighbour_rows

_BLOCK_ELEMENTS = 1 << 21
_ROWS = (8, 64)
# What is left of a sum after taking away all but this much of it is rounding.
LEAST_REST = 1e-5


class ListedPairs(NamedTuple):
    """Queries in blocks of one list each, and the lists; the blocks of a list follow each other.

    A query meets the keys of its list that are farther from it than the window.

    Attributes:
        query: Shape ``(B, H, queries, D)``; query ``i`` is at position ``i % length``.
        key: Shape ``(B, H, lists, n, D)``.
        value: Shape ``(B, H, lists, n, Dv)``.
        row: The query in each place, shape ``(B, H, blocks, rows)``; -1 for none.
        place: Where each query is, ``block * rows + row``, shape ``(B, H, queries)``.
        position: Of each key, shape ``(B, H, lists, n)``; -1 where a list has none.
        list: The list of each block, shape ``(B, H, blocks)``; the last blocks may be of none.
        begin: The first block of each list, shape ``(B, H, lists + 1)``.
        hidden: Pairs that do not meet all the same, shape ``(B, H, blocks, n, rows)``, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    row: Tensor
    place: Tensor
    position: Tensor
    list: Tensor
    begin: Tensor
    hidden: Tensor | None

    def met(self, length: int, window: int | None) -> Tensor:
        """Pairs that exist, shape ``(B, H, blocks, rows, n)``, bool."""
        position = _gather(self.position, self.list).unsqueeze(-2)
        pairs = (position >= 0) & (self.row >= 0).unsqueeze(-1)
        if window is not None:
            # Positions fit in 32 bits, and there are many pairs.
            distance = (self.row % length).int().unsqueeze(-1) - position.int()
            pairs = pairs & (distance.abs() > min(window, torch.iinfo(torch.int32).max))
        return pairs if self.hidden is None else pairs & ~self.hidden.mT


def split_listed(call: AttentionCall, features: Features, rows: Rows) -> tuple[Rows, Rows]:
    """Take the pairs in the lists out of the rows through features, and add them up exactly.

    Args:
        call: The call; its ``lists`` say which pairs.
        features: Its feature map.
        rows: Sums of ``phi(q) . phi(k)`` over all keys that are neither in the window nor sinks.

    Returns:
        The same sums without the listed keys, and sums of ``exp(scale q . k)`` over these.
    """
    numerator, denominator, log_scale = (x.flatten(2, 3) for x in rows)
    whole, exact = denominator.detach(), None
    # Beyond, rounding has made an estimate larger than the sum that holds it: the row is left
    # without features below, and a factor of infinity would make its gradient NaN.
    largest = int(math.log(torch.finfo(log_scale.dtype).max))
    parts: Iterable[tuple[Rows, Rows]]
    if isinstance(call.lists, NeighbourLists):
        parts = [neighbour_rows(call, features, call.lists)]
    else:
        parts = (_dense_rows(call, features, pairs) for pairs in listed_pairs(call))
    for estimated, more in parts:
        share = (estimated.log_scale - log_scale).clamp_max(largest)
        share = share.masked_fill(estimated.denominator == 0, -math.inf).exp()
        numerator = numerator - estimated.numerator * share
        denominator = denominator - estimated.denominator * share
        exact = more if exact is None else exact.plus(more)
    assert exact is not None
    # Written so that NaN stays.
    known = ~(denominator.detach() <= LEAST_REST * whole)
    rest = (numerator.where(known, 0.0), denominator.where(known, 0.0), log_scale)
    shape = call.query.shape[2:4]
    return Rows(*(x.unflatten(2, shape) for x in rest)), Rows(
        *(x.unflatten(2, shape) for x in exact)
    )


def listed_pairs(call: AttentionCall) -> list[ListedPairs]:
    """The pairs of each round of lists; none is in two rounds."""
    lists = call.lists
    assert isinstance(lists, KeyLists)
    rounds = []
    for index in range(len(lists.key)):
        key, value = (
            _gather(masked(x, call.key_mask), lists.key[index].flatten(2)).unflatten(
                2, lists.key.shape[-2:]
            )
            for x in (call.key, call.value)
        )
        of_query = lists.of_query[index].flatten(2)
        row, place, of_block, begin = _blocks(of_query, lists.key.shape[-2])
        hidden = None
        for earlier in range(index):
            # A key that an earlier round gave to the query does not count again.
            known = _gather(lists.key[earlier], lists.of_query[earlier].flatten(2))
            counts = _gather(lists.taken[earlier], lists.of_query[earlier].flatten(2))
            known = _gather(known.masked_fill(~counts, -1), row.clamp_min(0).flatten(2))
            known = known.unflatten(2, row.shape[2:]).unsqueeze(-3)
            again = (_gather(lists.key[index], of_block)[..., None, None] == known).any(-1)
            hidden = again if hidden is None else hidden | again
        pairs = ListedPairs(
            call.query.flatten(2, 3),
            key,
            value,
            row,
            place,
            lists.key[index].masked_fill(~lists.taken[index], -1),
            of_block,
            begin,
            hidden,
        )
        rounds.append(pairs)
    return rounds


def _dense_rows(call: AttentionCall, features: Features, pairs: ListedPairs) -> tuple[Rows, Rows]:
    """Sums of the estimates of pairs, and of their exact weights: ``(B, H, queries, ...)``.

    Blocks against their lists with ordinary torch operations, some at a time.
    """
    places = pairs.row.shape[2:]
    query = _gather(pairs.query, pairs.row.clamp_min(0).flatten(2)).unflatten(2, places)
    key, value = (
        _gather(x.flatten(3), pairs.list).unflatten(3, x.shape[3:])
        for x in (pairs.key, pairs.value)
    )

    def step(query: Tensor, key: Tensor, value: Tensor, met: Tensor) -> tuple[Tensor, ...]:
        query, key, value = (x.to(features.dtype) for x in (query, key, value))
        _, query_exponent = features.of(query.flatten(2, 3), is_query=True)
        _, key_exponent = features.of(key.flatten(2, 3), is_query=False)
        assert query_exponent is not None
        assert key_exponent is not None
        query_exponent = query_exponent.unflatten(2, query.shape[2:4])
        key_exponent = key_exponent.unflatten(2, key.shape[2:4])
        # One scale per feature, that of the list, as in the sums over all keys.
        listed = met.any(-2).unsqueeze(-1)
        key_exponent = key_exponent.masked_fill(~listed, -math.inf)
        scale = finite(key_exponent.detach().amax(-2, keepdim=True))
        left, log_scale = query_features(None, query_exponent, scale)
        estimates = (left @ (key_exponent - scale).exp().mT).masked_fill(~met, 0.0)
        estimated = (estimates @ value, estimates.sum(-1, keepdim=True), log_scale)
        exact = softmax_rows(query * call.factor, key, value, met)
        return tuple(x.flatten(2, 3) for x in (*estimated, *exact))

    per_block = query.shape[0] * query.shape[1] * (query.shape[3] + key.shape[3])
    per_block *= features.form.num_features
    sizes = block_sizes(query.shape[2], max(1, _BLOCK_ELEMENTS // max(1, per_block)))
    met = pairs.met(call.query.shape[-2], call.window)
    rows, _ = in_blocks(step, sizes, [(x, 2) for x in (query, key, value, met)])
    results = [_gather(x, pairs.place) for x in rows]
    return Rows(*results[:3]), Rows(*results[3:])


def _blocks(of_query: Tensor, lists: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort queries by their lists ``(B, H, queries)``, each list from a new block on.

    Returns:
        ``row``, ``place``, ``list`` and ``begin`` of `ListedPairs`.
    """
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
    return row.unflatten(2, (most_blocks, rows)), back, of_block, begin


def _gather(x: Tensor, rows: Tensor) -> Tensor:
    """Rows ``(B, H, N)`` of ``(B, H, T, n)``: ``(B, H, N, n)``."""
    return x.gather(2, rows.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
