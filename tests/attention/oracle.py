"""Dense attention in float64, written from the formulas and owing nothing to the package.

    out_i = sum_j K_ij v_j / sum_j K_ij,   K_ij = sum_f phi_f(q_i) phi_f(k_j)

or ``K_ij = exp(scale q_i . k_j)`` where a window, a sink or a list makes the pair exact. ``phi``
is kept as ``base * exp(log)`` (``Case.log_phi``); each pair is scaled by the largest feature of its
query and of its key, and each row by its largest pair, so that nothing overflows.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from performers import ListedKeys
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


def exact(
    length: int,
    size: int,
    *,
    window: int | None = None,
    sinks: int = 0,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Which pairs are exact, bool, ``(batch or 1, 1, L, S)``, seen or not."""
    near = torch.zeros(length, size, dtype=torch.bool)
    if positions is not None:
        near = ((positions[:, None] - positions[..., None]).abs() <= window)[:, None]
    elif window is not None:
        near = (torch.arange(length)[:, None] - torch.arange(size)).abs() <= window
    first = torch.zeros(1 if key_mask is None else key_mask.shape[0], size, dtype=torch.bool)
    offsets = [0, size] if cu_seqlens is None else cu_seqlens.tolist()
    for row in range(first.shape[0]):
        for start, stop in pairwise(offsets):
            there = [j for j in range(start, stop) if key_mask is None or bool(key_mask[row, j])]
            first[row, there[:sinks]] = True
    return near | first[:, None, None, :]


def listed(
    listed_keys: ListedKeys,
    query: Tensor,
    key: Tensor,
    *,
    sinks: int = 0,
    is_causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Pairs that are exact because the query's list has the key, bool, ``(B, H, L, S)``."""
    (batch, heads, length, _), size = query.shape, key.shape[2]
    taking = torch.ones(batch, size, dtype=torch.bool) if key_mask is None else key_mask
    taking = taking & (taking.long().cumsum(1) > sinks)
    query = query.detach().double()
    key = key.detach().double().repeat_interleave(heads // key.shape[1], dim=1)
    per_round = listed_keys.num_keys // listed_keys.num_rounds
    member = torch.zeros(batch, heads, length, size, dtype=torch.bool)
    for centers, offsets in zip(listed_keys.centers, listed_keys.offsets, strict=True):
        centers, offsets = (
            x.double().repeat_interleave(heads // x.shape[0], dim=0) for x in (centers, offsets)
        )
        bucket = (query @ centers.mT + offsets.unsqueeze(1)).argmax(-1, keepdim=True)
        strength = (centers @ key.mT).masked_fill(~taking[:, None, None], -math.inf)
        stretch = listed_keys.refresh if is_causal else max(length, 1)
        for start in range(0, length, stretch):
            end = start if is_causal else size
            best = strength[..., :end].topk(min(per_round, end))
            lists = torch.zeros(strength.shape, dtype=torch.bool)
            lists.scatter_(-1, best.indices, best.values > -math.inf)
            rows = slice(start, start + stretch)
            member[:, :, rows] |= lists.gather(2, bucket[:, :, rows].expand(-1, -1, -1, size))
    return member


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
    log_q, base_q = case.log_phi(feature_map, query.double() * root, is_query=True)
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
    window: int | None = None,
    sinks: int = 0,
    listed_keys: ListedKeys | None = None,
    is_causal: bool = False,
    positions: Tensor | None = None,
    neighbours: tuple[Tensor, Tensor] | None = None,
    neighbour_bias: Tensor | None = None,
    **who: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The normalised matrix ``(B, H, L, S)`` and the conditioning of each row ``(B, H, L, 1)``.

    The conditioning is ``sum_jf |phi_f(q) phi_f(k_j)| / |sum_jf phi_f(q) phi_f(k_j)|``: the
    factor by which rounding errors of features grow in the normaliser; one for positive features.
    Exact pairs are one positive term each.
    """
    length, size = query.shape[-2], key.shape[-2]
    seen = visible(length, size, is_causal=is_causal, **who)
    pairs, absolute, row, column = log_kernel(case, feature_map, query, key, scale)
    if window is None and not sinks and listed_keys is None and neighbours is None:
        level = column.masked_fill(~seen, -math.inf)
    else:
        close = exact(length, size, window=window, sinks=sinks, positions=positions, **who)
        if listed_keys is not None:
            options = {"sinks": sinks, "is_causal": is_causal, **who}
            close = close | listed(listed_keys, query, key, **options)
        logits = true_logits(query, key, scale)
        if neighbours is not None:
            indptr, indices = neighbours
            rows = torch.arange(length).repeat_interleave(indptr.diff())
            close = close.expand(*logits.shape).clone()
            close[:, :, rows, indices] = True
            if neighbour_bias is not None:
                biases = neighbour_bias.double().expand(logits.shape[1], -1)
                places = (torch.arange(len(biases))[:, None], rows, indices)
                logits = logits + torch.zeros_like(logits[0]).index_put(places, biases)
        # Two vectors can share no large feature: a pair's own size says how it compares.
        share = pairs.detach().abs().clamp_min(1e-300).log()
        level = torch.where(close, logits, row + column + share).masked_fill(~seen, -math.inf)
        pairs = torch.where(close, 1.0, pairs * (-share).exp())
        absolute = torch.where(close, 1.0, absolute * (-share).exp())
    weight = (level - largest(level)).exp()
    kernel = (pairs * weight).masked_fill(~seen, 0.0)
    total = kernel.sum(-1, keepdim=True)
    matrix = kernel / total.where(total != 0, 1.0)
    magnitude = (absolute * weight).masked_fill(~seen, 0.0).sum(-1, keepdim=True)
    conditioning = (magnitude / total.where(total != 0, 1.0).abs()).clamp_min(1.0)
    return matrix, conditioning.detach()


def true_logits(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
    """``scale q . k``, shape ``(B, H, L, S)``, float64."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return scale * (query.double() @ key.mT)


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
