"""Softmax attention itself, some queries at a time: what the settings are measured against."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.planning.samples import Samples

_QUERIES_AT_ONCE = 256


def attention_rows(
    samples: Samples, row: int, positions: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """The attention matrix of one sequence, in blocks of queries.

    Args:
        samples: The sequences.
        row: Which of them.
        positions: Queries to look at; all when None.

    Yields:
        Positions ``(n,)`` and weights ``(Hkv, G, n, S)`` in float32 at least, whose rows sum to
        one; zeros for a query that sees no key.
    """
    query, key = samples.query[row], samples.key[row]
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.unflatten(0, (key.shape[0], -1))
    hidden = None if samples.key_mask is None else ~samples.key_mask[row]
    if hidden is not None:
        key = key.masked_fill(hidden[:, None], 0.0)
    places = torch.arange(key.shape[1], device=key.device)
    if positions is None:
        positions = torch.arange(query.shape[2], device=key.device)
    for part in positions.split(_QUERIES_AT_ONCE):
        logits = query[:, :, part].to(dtype) @ key.to(dtype).unsqueeze(1).mT * samples.scale
        if hidden is not None:
            logits = logits.masked_fill(hidden, -math.inf)
        if samples.is_causal:
            logits = logits.masked_fill(places > part[:, None], -math.inf)
        yield part, logits.softmax(-1).nan_to_num(0.0)


def exact_attention(samples: Samples) -> Tensor:
    """``softmax(scale q k^T) v``, shape ``(B, H, L, Dv)``, zeros for queries that see no key."""
    outputs = []
    for row, value in enumerate(samples.value):
        if samples.key_mask is not None:
            value = value.masked_fill(~samples.key_mask[row][:, None], 0.0)
        blocks = [
            weights @ value.to(weights.dtype).unsqueeze(1)
            for _, weights in attention_rows(samples, row)
        ]
        outputs.append(torch.cat(blocks, dim=2).flatten(0, 1))
    return torch.stack(outputs)


def fused_attention(samples: Samples) -> Callable[[], Tensor]:
    """A call of ``scaled_dot_product_attention`` with everything prepared, to be timed."""
    groups = samples.query.shape[1] // samples.key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (samples.key, samples.value))
    mask, is_causal = None, samples.is_causal
    if samples.key_mask is not None:
        mask = samples.key_mask[:, None, None]
        if is_causal:
            length = samples.query.shape[2]
            ones = torch.ones(length, length, dtype=torch.bool, device=key.device)
            mask, is_causal = mask & ones.tril(), False

    def call() -> Tensor:
        return F.scaled_dot_product_attention(
            samples.query, key, value, attn_mask=mask, is_causal=is_causal, scale=samples.scale
        )

    return call
