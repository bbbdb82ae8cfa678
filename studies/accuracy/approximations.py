"""Approximations of a pretrained head's attention, to be compared with the exact one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from performers.attention import ListedKeys
from performers.benchmark.case import Row
from performers.features.projections import Projection
from performers.features.softmax import Estimator
from performers.nn import Approximation
from performers.planning.fits import Fits
from performers.planning.samples import Samples
from studies.accuracy.capture import Attention

SDPA = "SDPA"
"""Exact attention as torch computes it; its error is zero."""

_ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
_PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
_MAIN: tuple[Estimator, ...] = ("positive", "data_aware")


def head_approximations(base: Approximation, counts: tuple[int, ...]) -> tuple[Approximation, ...]:
    """Approximations that ``heads`` compares, no two the same.

    Without exact terms and with a window: every estimator with as many features as ``base``, and
    positive and data-aware ones with each of ``counts``. With half the window and listed keys: the
    latter two with each of ``counts``; with the whole window and listed keys, and for every
    projection: as many as ``base``. And exact terms without features.
    """
    assert base.num_features is not None
    every = tuple(sorted({base.num_features, *counts}))
    bare, window, half = _exact_terms(base)
    found: list[Approximation] = []
    for terms in (bare, window):
        for name in _ESTIMATORS:
            chosen = every if name in _MAIN else (base.num_features,)
            found += [replace(terms, estimator=name, num_features=m) for m in chosen]
    for name in _MAIN:
        found += [replace(half, estimator=name, num_features=m) for m in every]
        found.append(replace(base, estimator=name))
    found += [replace(window, estimator="data_aware", projection=name) for name in _PROJECTIONS]
    return tuple(dict.fromkeys([*found, *_without_features(base)]))


def model_approximations(base: Approximation) -> tuple[Approximation, ...]:
    """Approximations that ``models`` compares: the main ones, with equally many features."""
    terms = (*_exact_terms(base), base)
    found = [replace(one, estimator=name) for one in terms for name in _MAIN]
    return tuple(dict.fromkeys([*found, *_without_features(base)]))


def _exact_terms(base: Approximation) -> tuple[Approximation, Approximation, Approximation]:
    """None; the window and sinks; half the window, sinks and listed keys."""
    assert base.window is not None
    window = replace(base, listed_keys=0)
    return replace(window, window=None, sinks=0), window, replace(base, window=base.window // 2)


def _without_features(base: Approximation) -> list[Approximation]:
    return [replace(terms, num_features=0) for terms in _exact_terms(base)[1:]]


def setting_columns(approximation: Approximation) -> Row:
    """Its columns in results; the setting's name leaves out the number of features."""
    named = replace(approximation, num_features=approximation.num_features and None)
    return {
        "setting": named.label(),
        "estimator": approximation.estimator if approximation.num_features else None,
        "num_features": approximation.num_features,
        "projection": approximation.projection,
        "window": approximation.window,
        "sinks": approximation.sinks,
        "keys": approximation.listed_keys,
    }


def fitted_attention(fits: Fits, approximation: Approximation, backend: str | None) -> Attention:
    """The attention of an approximation that was fitted to samples."""
    num_heads = fits.samples.query.shape[1]
    if not approximation.num_features:
        # Any number of features does for the lists of keys.
        listed = fits.attention(replace(approximation, num_features=2), num_heads).buckets
        return partial(_only_exact, approximation, listed)
    favor = fits.attention(approximation, num_heads)

    @torch.no_grad()
    def attend(x: Samples) -> Tensor:
        out: Tensor = favor(x.query, x.key, x.value, backend=backend, **x.options)[0]
        return out

    return attend


@torch.no_grad()
def _only_exact(approximation: Approximation, listed_keys: ListedKeys | None, x: Samples) -> Tensor:
    """Softmax over the exact terms alone; quadratic, for its error and not its time."""
    assert approximation.window is not None
    place = torch.arange(x.query.shape[2], device=x.query.device)
    gap = place[:, None] - place
    mask = (place < approximation.sinks) | (gap.abs() <= approximation.window)
    if listed_keys is not None:
        key = x.key.repeat_interleave(x.query.shape[1] // x.key.shape[1], dim=1)
        lists = listed_keys(x.query.unsqueeze(2), key, x.key_mask, is_causal=x.is_causal)
        mask = mask | lists.pairs(*gap.shape)[:, :, 0]
    if x.is_causal:
        mask = mask & (gap >= 0)
    mask = mask.expand(*mask.shape[:-2], *gap.shape)
    if x.key_mask is not None:
        mask = mask & x.key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(
        x.query, x.key, x.value, attn_mask=mask, scale=x.scale, enable_gqa=True
    )
