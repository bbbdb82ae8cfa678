"""Exact attention, and the error of an approximation relative to it."""

from torch import Tensor
from torch.nn import functional as F


def exact_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q k^T) v`` by ``scaled_dot_product_attention``; zeros where no key is left.

    Arguments are those of ``favor_attention``; masked keys and values must be finite.
    """
    grouped = query.shape[1] != key.shape[1]
    if key_mask is None:
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    mask = key_mask[:, None, None]
    if is_causal:
        mask = mask.expand(-1, 1, query.shape[2], -1).tril()
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped
    )
    return out.masked_fill(~mask.any(-1, keepdim=True), 0.0)


def relative_error(actual: Tensor, expected: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """``|actual - expected| / |expected|``, Frobenius norms over ``dim`` in float64.

    Where ``expected`` is zero: 0 if ``actual`` is, else 1.
    """
    actual, expected = actual.double(), expected.double()
    wrong, size = (x.square().sum(dim) for x in (actual - expected, expected))
    return (wrong / size).sqrt().where(size > 0, (wrong > 0).double())
