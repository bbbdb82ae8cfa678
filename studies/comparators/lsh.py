"""Reformer's attention by locality-sensitive hashing (Kitaev et al. 2020, arXiv 2001.04451)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.app.options import OptionError, option
from performers.features import FeatureMap
from performers.features.precision import without_autocast
from performers.models import PerformerConfig
from studies.comparators.blocks import AttentionOptions, SequenceRows
from studies.comparators.groups import GroupedComparator, Sorted

# More columns than this and the hash is split into two, of which a bucket is a pair.
_MOST_COLUMNS = 64

# The shortest query whose key is its direction. Shorter ones have shorter keys: the direction of
# zero has no gradient, and close to it a huge one.
_LEAST_NORM = 1e-2

# The score of a token with itself: it counts only where there is no other.
_OWN_SCORE = -1e30


@dataclass(frozen=True, kw_only=True)
class LshOptions(AttentionOptions):
    """Options of ``lsh``."""

    buckets: int | None = option(
        "Buckets, even or 1; None is the least power of two with chunk_size tokens a bucket or "
        "fewer at max_position_embeddings. The number does not depend on the input, so that a "
        "token sees the same however long the row becomes.",
        None,
        at_least=1,
    )
    chunk_size: int = option(
        "Tokens seen to each side, among those of a token's bucket.", 64, at_least=1
    )
    rounds: int = option("Hashes, the union of whose buckets is attended to.", 4, at_least=1)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.buckets is not None and self.buckets > 1 and self.buckets % 2:
            raise OptionError(f"buckets must be even, or 1, got {self.buckets}")

    def completed(self, longest: int) -> AttentionOptions:
        """See `AttentionOptions.completed`."""
        chunks = -(-longest // self.chunk_size)
        return replace(self, buckets=self.buckets or 2 ** max(1, (chunks - 1).bit_length()))


class HashFeatures(FeatureMap):
    """Buckets of vectors, by random projections.

    Round ``r`` puts ``x`` into the bucket ``argmax([R_r x; -R_r x])``. The ``buckets / 2`` rows of
    ``R_r`` have independent directions and one length: longer ones would win more often. Many
    buckets are pairs of fewer: the bucket's number is then ``h_1(x) n_2 + h_2(x)`` with ``n_1 n_2``
    buckets, and hashing costs ``O(sqrt(buckets))`` a vector. A feature map without features, which
    is drawn, saved and redrawn as all are; other arguments are those of `FeatureMap`.
    """

    def __init__(self, head_dim: int, buckets: int, rounds: int, **more: Any) -> None:
        self.rounds, self.factors = rounds, _factors(buckets)
        super().__init__(
            head_dim,
            rounds * buckets,
            num_rows=rounds * sum(factor // 2 for factor in self.factors),
            projection=None if buckets == 1 else "gaussian",
            regularized=True,
            **more,
        )

    @torch.no_grad()
    def hash(self, x: Tensor) -> Tensor:
        """The bucket of each vector ``(..., num_heads, L, head_dim)`` in each round.

        Returns:
            Integers from 0, shape ``(..., num_heads, rounds, L)``.
        """
        shape = (*x.shape[:-2], self.rounds, x.shape[-2])
        if self.weight is None:
            return torch.zeros(shape, dtype=torch.int64, device=x.device)
        with without_autocast(x.device):
            dtype = torch.promote_types(x.dtype, torch.float32)
            projected = x.to(dtype) @ self.weight.to(dtype).transpose(-1, -2)
        projected = projected.unflatten(-1, (self.rounds, -1))
        bucket = projected.new_zeros(projected.shape[:-1], dtype=torch.int64)
        for part, factor in zip(
            projected.split([factor // 2 for factor in self.factors], dim=-1),
            self.factors,
            strict=True,
        ):
            bucket = bucket * factor + torch.cat((part, -part), dim=-1).argmax(-1)
        return bucket.transpose(-1, -2)


def _factors(buckets: int) -> tuple[int, ...]:
    """The hashes that a bucket's number is made of: one, or two as even as can be."""
    if buckets == 1:
        return ()
    if buckets > 2 * _MOST_COLUMNS:
        for first in range(math.isqrt(buckets), 1, -1):
            if first % 2 == 0 and buckets % first == 0 and (buckets // first) % 2 == 0:
                return first, buckets // first
    return (buckets,)


class LshMechanism(GroupedComparator):
    """Softmax attention to the tokens that hash into the same bucket.

    Queries are keys too: the key of a token is its query at length ``sqrt(head_dim)``, so that the
    score is ``q_i . q_j / |q_j|`` (``|q_j|`` at least 0.01, which bounds the gradient of a query
    near zero), and a token attends to itself only if it sees no other. Each
    round sorts the tokens by bucket and place; a token then sees those at most ``chunk_size``
    before or after it in this order that share its bucket. It attends, with one softmax, to the
    union of what it sees in all rounds: rounds are combined by their normalisers, and a pair that
    meets in ``n`` of them counts ``1 / n`` in each (the paper's appendix A).

    The paper cuts the order into chunks, each of which sees itself and the one before. Where its
    chunks end depends on later tokens, and so does what a token sees; distances within a bucket do
    not, which makes the causal form strictly causal. Apart from that the two are alike: ``2
    chunk_size`` sorted neighbours, or those before in the causal form.

    The cost is ``O(rounds * L * chunk_size)``; pairs met again are counted in ``O(rounds^2 * L *
    chunk_size)`` comparisons. Hashes are redrawn by ``redraw_features_`` and stay the same in
    between, evaluation included.
    """

    def __init__(self, options: Any, config: PerformerConfig, generator: Any) -> None:
        super().__init__(options, config, generator)
        self.num_groups, self.reach = options.buckets, options.chunk_size
        self.feature_map = HashFeatures(
            config.head_dim,
            options.buckets,
            options.rounds,
            num_heads=config.projected_heads,
            generator=generator,
        )

    def group(self, query: Tensor, rows: SequenceRows) -> Tensor:
        """The bucket of each token in each round."""
        return self.feature_map.hash(query)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: SequenceRows) -> Tensor:
        """See `Comparator.attend`; ``key`` is not used."""
        with without_autocast(query.device):
            dtype = torch.promote_types(query.dtype, torch.float32)
            queries, values = query.to(dtype), value.to(dtype)
            keys = F.normalize(queries, dim=-1, eps=_LEAST_NORM)
            order = self.sort(query, rows)
            rounds = [_round(queries, keys, values, order, n) for n in range(order.rounds)]
            outputs, normalisers = (torch.stack(x) for x in zip(*rounds, strict=True))
            return (normalisers.softmax(0) * outputs).sum(0).to(value.dtype)


def _round(
    queries: Tensor, keys: Tensor, values: Tensor, order: Sorted, number: int
) -> tuple[Tensor, Tensor]:
    """Outputs ``(N, H, L, width)`` of one round, and logarithms of normalisers ``(N, H, L, 1)``."""
    difference = order.gaps(order.places[:, :, number], number)
    hidden, itself = order.hidden(difference), difference == 0
    del difference
    # In how many rounds each pair meets.
    met = torch.zeros((), dtype=torch.uint8, device=queries.device)
    for places in order.places.unbind(2):
        met = met + (order.gaps(places, number).abs() <= order.reach)
    scores = order.blocks(queries, number) @ order.seen(keys, number).mT
    scores = scores - met.clamp_min(1).to(scores.dtype).log()
    scores = scores.masked_fill(hidden, -torch.inf).masked_fill(itself, _OWN_SCORE)
    normaliser = scores.logsumexp(-1, keepdim=True)
    out = (scores - normaliser).exp() @ order.seen(values, number)
    return order.join(out, number), order.join(normaliser, number)
