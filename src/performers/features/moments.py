"""Running statistics of pairs of queries and keys, from which estimators are fitted."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Longer sequences are subsampled to this many evenly spaced queries.
_MAX_QUERIES = 1024
_QUERY_BLOCK = 256


@dataclass
class PairMoments:
    """Weighted sums over pairs ``(q, k)``, per head, float64 on the CPU.

    Attributes:
        weight: Sum of weights, shape ``(heads,)``.
        query: Weighted sum of ``q``, shape ``(heads, d)``.
        key: Weighted sum of ``k``, shape ``(heads, d)``.
        query_query: Weighted sum of ``q q^T``, shape ``(heads, d, d)``.
        key_key: Weighted sum of ``k k^T``.
        query_key: Weighted sum of ``q k^T``.
        samples: Number of queries with a pair of positive weight, per head of the moments.
    """

    weight: Tensor
    query: Tensor
    key: Tensor
    query_query: Tensor
    key_key: Tensor
    query_key: Tensor
    samples: int = field(default=0, kw_only=True)

    @classmethod
    def empty(cls, heads: int, head_dim: int) -> "PairMoments":
        """No pairs."""
        d = head_dim
        shapes = ((heads,), *2 * [(heads, d)], *3 * [(heads, d, d)])
        return cls(*(torch.zeros(x, dtype=torch.float64, device="cpu") for x in shapes))

    @torch.no_grad()
    def add(self, query: Tensor, key: Tensor, weights: Tensor) -> None:
        """Add the pairs of one sequence; moments with one head pool those of all heads.

        Scaled queries are ``(heads, groups, L, d)``, keys ``(heads, S, d)`` and weights
        ``(heads, groups, L, S)``.
        """
        query, weights = query.double().flatten(1, 2), weights.double().flatten(1, 2)
        key = key.double()
        of_query, of_key = weights.sum(-1), weights.sum(-2)
        weighted_query = query * of_query.unsqueeze(-1)
        weighted_key = key * of_key.unsqueeze(-1)
        for total, added in (
            (self.weight, of_query.sum(-1)),
            (self.query, weighted_query.sum(-2)),
            (self.key, weighted_key.sum(-2)),
            (self.query_query, weighted_query.mT @ query),
            (self.key_key, weighted_key.mT @ key),
            (self.query_key, query.mT @ (weights @ key)),
        ):
            total += (added if len(total) == len(added) else added.sum(0, keepdim=True)).cpu()
        self.samples += int((of_query > 0).sum()) // len(self.weight)

    def means(self) -> list[Tensor]:
        """``E[q]``, ``E[k]``, ``E[q q^T]``, ``E[k k^T]``, ``E[q k^T]``; zeros without a pair."""
        sums = (self.query, self.key, self.query_query, self.key_key, self.query_key)
        return [(x / self.weight.view(-1, *[1] * (x.ndim - 1))).nan_to_num(0.0) for x in sums]


@torch.no_grad()
def add_attention_pairs(
    moments: PairMoments,
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None,
    is_causal: bool,
    window: int | None,
    sinks: int,
    attention_weighted: bool,
) -> None:
    """Add the pairs that features have to estimate, of a batch of sequences.

    Args:
        moments: The sums to add to.
        query: Scaled queries, shape ``(batch, heads, groups, L, d)``.
        key: Scaled keys, shape ``(batch, heads, S, d)``.
        key_mask: Shape ``(batch, S)``, True where a key takes part, or None.
        is_causal: Leave out keys after the query.
        window: Leave out pairs with ``|i - j| <= window``.
        sinks: Leave out the first ``sinks`` keys that take part.
        attention_weighted: Weight a pair by its share of the query's attention, in which an error
            of the estimate moves the output; else all pairs equally.

    Raises:
        ValueError: ``key_mask`` hides all keys of a row, or an input is not finite.
    """
    length, size = query.shape[-2], key.shape[-2]
    positions = torch.arange(length, device=query.device)
    if length > _MAX_QUERIES:
        positions = torch.linspace(0, length - 1, _MAX_QUERIES, device=query.device).long()
    indices = torch.arange(size, device=query.device)
    dtype = torch.promote_types(query.dtype, torch.float32)
    for row in range(query.shape[0]):
        allowed = torch.ones(size, dtype=torch.bool, device=query.device)
        if key_mask is not None:
            allowed = key_mask[row].to(query.device)
            if not bool(allowed.any()):
                raise ValueError(
                    f"key_mask must leave at least one key in every row, but row {row} hides all "
                    "of them; leave that row out"
                )
        for name, x in (("query", query[row]), ("key", key[row, :, allowed])):
            if not bool(x.isfinite().all()):
                raise ValueError(
                    f"{name} must be finite for calibration, but holds NaN or infinity"
                )
        keys = key[row].where(allowed[:, None], 0.0).to(dtype)
        beyond_sinks = allowed & (allowed.cumsum(0) > sinks)
        for part in positions.split(_QUERY_BLOCK):
            queries = query[row][:, :, part].to(dtype)
            seen = allowed.expand(len(part), size)
            if is_causal:
                seen = seen & (indices <= part[:, None])
            estimated = seen & beyond_sinks
            if window is not None:
                estimated = estimated & ((indices - part[:, None]).abs() > window)
            if attention_weighted:
                logits = (queries @ keys.unsqueeze(1).mT).masked_fill(~seen, -math.inf)
                # The softmax of a query without keys is NaN.
                weights = logits.softmax(-1).nan_to_num(0.0) * estimated
            else:
                weights = estimated.expand(*queries.shape[:2], -1, -1)
            moments.add(queries, keys, weights)
