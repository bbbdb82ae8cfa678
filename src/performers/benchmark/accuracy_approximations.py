"""Approximations of a pretrained head's attention, to be compared with the exact one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention import ListedKeys
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.nn import Approximation
from performers.planning.fits import Fits

if TYPE_CHECKING:
    from performers.benchmark.results import Row

_ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
_PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
_MAIN: tuple[Estimator, ...] = ("positive", "data_aware")

SDPA = "SDPA"
"""Exact attention as torch computes it; its error is zero."""


def head_approximations(base: Approximation, counts: tuple[int, ...]) -> tuple[Approximation, ...]:
    """Approximations that the heads part compares.

    Without exact terms and with a window: every estimator with as many features as ``base``, and
    positive and data-aware ones with each of ``counts``. With half the window and listed keys: the
    latter two with each of ``counts``; with the whole window and listed keys, and for every
    projection: as many as ``base``. And exact terms without features.

    Args:
        base: All exact terms, and the number of features of the comparisons between estimators.
        counts: Numbers of features of the main ones.

    Returns:
        The approximations, no two the same.
    """
    assert base.num_features is not None
    every = tuple(sorted({base.num_features, *counts}))
    unlisted = replace(base, listed_keys=0)
    found: list[Approximation] = []
    for terms in (replace(unlisted, window=None, sinks=0), unlisted):
        for name in _ESTIMATORS:
            chosen = every if name in _MAIN else (base.num_features,)
            found += [replace(terms, estimator=name, num_features=m) for m in chosen]
    for name in _MAIN:
        found += [replace(_halved(base), estimator=name, num_features=m) for m in every]
        found.append(replace(base, estimator=name))
    found += [
        replace(unlisted, estimator="data_aware", projection=projection)
        for projection in _PROJECTIONS
    ]
    return tuple(dict.fromkeys([*found, *_without_features(base)]))


def model_approximations(base: Approximation) -> tuple[Approximation, ...]:
    """Approximations that the model part compares: the main ones, with equally many features.

    Args:
        base: All exact terms, and the number of features.

    Returns:
        The approximations, no two the same.
    """
    unlisted = replace(base, listed_keys=0)
    found = [
        replace(terms, estimator=name)
        for terms in (replace(unlisted, window=None, sinks=0), unlisted, _halved(base), base)
        for name in _MAIN
    ]
    return tuple(dict.fromkeys([*found, *_without_features(base)]))


def _halved(base: Approximation) -> Approximation:
    assert base.window is not None
    return replace(base, window=base.window // 2)


def _without_features(base: Approximation) -> list[Approximation]:
    """Exact terms alone."""
    alone = replace(base, num_features=0)
    return [replace(alone, listed_keys=0), _halved(alone)]


def setting_name(approximation: Approximation) -> str:
    """Its name in tables, which have a column for the number of features."""
    return replace(approximation, num_features=approximation.num_features and None).label()


def setting_columns(approximation: Approximation) -> Row:
    """Its columns in results."""
    return {
        "setting": setting_name(approximation),
        "estimator": approximation.estimator if approximation.num_features else None,
        "num_features": approximation.num_features,
        "projection": approximation.projection,
        "window": approximation.window,
        "sinks": approximation.sinks,
        "keys": approximation.listed_keys,
    }


def fitted_attention(
    fits: Fits, approximation: Approximation, num_heads: int, backend: str | None
) -> Callable[..., Tensor]:
    """An approximation as a function with the call of ``replacement.exact_attention``.

    Args:
        fits: Of the layer.
        approximation: The approximation; without features, its exact terms alone.
        num_heads: Query heads, each of which has features and lists of keys of its own.
        backend: Of ``favor_attention``.

    Returns:
        The function; the layer's index, its first argument, is not used.
    """
    if not approximation.num_features:
        # Any number of features does for the lists of keys.
        listed = fits.attention(replace(approximation, num_features=2), num_heads).buckets
        return _only_exact(approximation.window, approximation.sinks, listed)
    favor = fits.attention(approximation, num_heads)

    def attend(layer: int, *tensors: Tensor, **options: Any) -> Tensor:
        out: Tensor = favor(*tensors, backend=backend, **options)[0]
        return out

    return attend


def _only_exact(
    window: int | None, sinks: int, listed_keys: ListedKeys | None
) -> Callable[..., Tensor]:
    """Softmax over the exact terms alone; quadratic, for its error and not its time."""

    def attend(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        is_causal: bool,
        key_mask: Tensor | None,
    ) -> Tensor:
        place = torch.arange(query.shape[2], device=query.device)
        gap = place[:, None] - place
        mask = (place < sinks) | (True if window is None else gap.abs() <= window)
        if listed_keys is not None:
            mask = mask | _listed(listed_keys, query, key, key_mask, is_causal)
        if is_causal:
            mask = mask & (gap >= 0)
        mask = mask.expand(*mask.shape[:-2], *gap.shape)
        if key_mask is not None:
            mask = mask & key_mask[:, None, None, :]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    return attend


def _listed(
    listed_keys: ListedKeys, query: Tensor, key: Tensor, key_mask: Tensor | None, is_causal: bool
) -> Tensor:
    """Mask of the keys that are listed for each query, shape ``(B, H, L, S)``."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    lists = listed_keys(query.unsqueeze(2), key, key_mask, is_causal=is_causal)
    counts = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.uint8, device=query.device)
    for keys, taken, of_query in zip(*lists, strict=True):
        own = of_query[:, :, 0, :, None].expand(-1, -1, -1, keys.shape[-1])
        counts.scatter_add_(-1, keys.gather(2, own), taken.gather(2, own).to(torch.uint8))
    return counts > 0
