"""Dense attention in float64, written from the formulas and owing nothing to the package.

    out_i = sum_j K_ij v_j / sum_j K_ij,   K_ij = sum_f phi_f(q_i) phi_f(k_j)

``phi`` is kept as ``base * exp(log)`` (``Case.log_phi``); each pair is scaled by the largest
feature of its query and of its key, and each row by its largest pair, so that nothing overflows.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from performers.features import FeatureMap
from tests.features.cases import Case


def visible(
    length: int,
    size: int,
    *,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Which query sees which key, bool, ``(batch or 1, 1, L, S)``."""
    seen = torch.ones(1, 1, length, size, dtype=torch.bool)
    if is_causal:
        seen = seen.tril()
    if cu_seqlens is not None:
        same = torch.zeros(length, size, dtype=torch.bool)
        offsets = cu_seqlens.tolist()
        for start, stop in pairwise(offsets):
            same[start:stop, start:stop] = True
        seen = seen & same
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    return seen


def log_kernel(
    case: Case, feature_map: FeatureMap, query: Tensor, key: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``K = pairs * exp(row + column)`` and the pairs of absolute features.

    Returns:
        ``pairs`` and ``absolute`` of shape ``(B, H, L, S)``, ``row`` ``(B, H, L, 1)`` and
        ``column`` ``(B, H, 1, S)``.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    root = math.sqrt(1 / math.sqrt(head_dim) if scale is None else scale)
    log_q, base_q = case.log_phi(feature_map, query.double() * root)
    log_k, base_k = case.log_phi(feature_map, key.double() * root)
    row = largest(log_q)
    column = largest(log_k)
    left, right = base_q * (log_q - row).exp(), base_k * (log_k - column).exp()
    return left @ right.mT, left.abs() @ right.abs().mT, row, column.mT


def largest(logs: Tensor, dim: int = -1) -> Tensor:
    """The finite maximum along ``dim``, zero where there is none; a constant to autograd."""
    if logs.shape[dim] == 0:
        return logs.sum(dim, keepdim=True)
    peak = logs.detach().amax(dim, keepdim=True)
    return peak.where(peak.isfinite(), 0.0)


def weights(
    case: Case,
    feature_map: FeatureMap,
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    **who: object,
) -> tuple[Tensor, Tensor]:
    """The normalised matrix ``(B, H, L, S)`` and the conditioning of each row ``(B, H, L, 1)``.

    The conditioning is ``sum_jf |phi_f(q) phi_f(k_j)| / |sum_jf phi_f(q) phi_f(k_j)|``: the
    factor by which rounding errors of features grow in the normaliser; one for positive features.
    """
    seen = visible(query.shape[-2], key.shape[-2], **who)
    pairs, absolute, _, column = log_kernel(case, feature_map, query, key, scale)
    column = column.masked_fill(~seen, -math.inf)
    share = (column - largest(column)).exp()
    kernel = (pairs * share).masked_fill(~seen, 0.0)
    total = kernel.sum(-1, keepdim=True)
    matrix = kernel / total.where(total != 0, 1.0)
    magnitude = (absolute * share).masked_fill(~seen, 0.0).sum(-1, keepdim=True)
    conditioning = (magnitude / total.where(total != 0, 1.0).abs()).clamp_min(1.0)
    return matrix, conditioning.detach()


def attend(
    case: Case,
    feature_map: FeatureMap,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor]:
    """Attention ``(B, H, L, Dv)`` and the conditioning of each row ``(B, H, L, 1)``, float64."""
    matrix, conditioning = weights(case, feature_map, query, key, **options)
    value = value.double().repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return matrix @ value, conditioning
