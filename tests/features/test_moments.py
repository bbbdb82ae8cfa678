"""Moments of the pairs that calibration sums over: against one pair at a time."""

import math

import pytest
import torch

from performers.features.moments import PairMoments, add_attention_pairs
from tests.features.cases import normal, sample

OPTIONS = [
    {},
    {"is_causal": True},
    {"window": 0},
    {"window": 3},
    {"sinks": 2},
    {"is_causal": True, "window": 2, "sinks": 3},
    {"window": 40},
]
DEFAULTS = {
    "key_mask": None,
    "is_causal": False,
    "window": None,
    "sinks": 0,
    "attention_weighted": False,
}


def pair_weights(query, key, *, key_mask, is_causal, window, sinks, attention_weighted):
    """``(batch, heads, groups, L, S)``."""
    batch, heads, groups, length, _ = query.shape
    weights = torch.zeros(batch, heads, groups, length, key.shape[2], dtype=torch.float64)
    for b, h, g, i in torch.cartesian_prod(*map(torch.arange, weights.shape[:4])).tolist():
        valid = [j for j in range(key.shape[2]) if key_mask is None or key_mask[b, j]]
        seen = [j for j in valid if not is_causal or j <= i]
        scores = {j: math.exp(query[b, h, g, i] @ key[b, h, j]) for j in seen}
        for j in seen:
            if j not in valid[:sinks] and (window is None or abs(i - j) > window):
                share = scores[j] / sum(scores.values())
                weights[b, h, g, i, j] = share if attention_weighted else 1.0
    return weights


def sums(query, key, weights):
    """Total weight, first and second moments for each head."""
    key = key.nan_to_num(0.0)
    return {
        "weight": weights.sum((0, 2, 3, 4)),
        "query": torch.einsum("bhgis,bhgid->hd", weights, query),
        "key": torch.einsum("bhgis,bhsd->hd", weights, key),
        "query_query": torch.einsum("bhgis,bhgid,bhgie->hde", weights, query, query),
        "key_key": torch.einsum("bhgis,bhsd,bhse->hde", weights, key, key),
        "query_key": torch.einsum("bhgis,bhgid,bhse->hde", weights, query, key),
    }


def expected_sums(query, key, **options):
    query, key = query.double(), key.double()
    return sums(query, key, pair_weights(query, key, **{**DEFAULTS, **options}))


def measured(query, key, *, heads=None, **options):
    moments = PairMoments.empty(heads or key.shape[1], key.shape[-1])
    add_attention_pairs(moments, query, key, **{**DEFAULTS, **options})
    return moments


def assert_moments(moments, expected, *, rtol=1e-10, atol=1e-12):
    for name, values in expected.items():
        torch.testing.assert_close(getattr(moments, name), values, rtol=rtol, atol=atol)
        assert values.dtype == torch.float64


def inputs(length=9, size=9, groups=2, head_dim=3, heads=2):
    query, key = sample(head_dim, heads * groups, batch=2, length=max(length, size))
    return query[:, :, :length].unflatten(1, (heads, groups)), key[:, :heads, :size]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention_weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_moments_are_sums_over_pairs(options, attention_weighted, masked):
    query, key = inputs()
    options = {**options, "attention_weighted": attention_weighted}
    if masked:
        options["key_mask"] = torch.tensor([[False, *8 * [True]], [*6 * [True], *3 * [False]]])
        key = key.masked_fill(~options["key_mask"][:, None, :, None], math.nan)
    expected, moments = expected_sums(query, key, **options), measured(query, key, **options)
    assert_moments(moments, expected)
    # All pairs of a window over everything are exact.
    assert bool((moments.weight == 0).all()) == (options.get("window") == 40)
    total = expected.pop("weight").clamp_min(1e-300)
    for name, mean in zip(expected, moments.means(), strict=True):
        shape = (-1, *[1] * (mean.ndim - 1))
        torch.testing.assert_close(mean, expected[name] / total.view(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"sinks": 2}, {"attention_weighted": True}], ids=str)
def test_queries_and_keys_of_different_number_in_any_dtype(options, dtype):
    query, key = (x.to(dtype) for x in inputs(length=5, size=12))
    expected, moments = expected_sums(query, key, **options), measured(query, key, **options)
    assert_moments(moments, expected, rtol=1e-5, atol=1e-6)


def test_moments_of_one_head_pool_all():
    query, key = inputs()
    options = {"is_causal": True, "attention_weighted": True}
    moments = measured(query, key, heads=1, **options)
    each = expected_sums(query, key, **options)
    assert_moments(moments, {name: x.sum(0, keepdim=True) for name, x in each.items()})
    assert moments.samples == 2 * 2 * 2 * 9


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": 300}], ids=str)
def test_long_sequences_are_subsampled_evenly(options):
    """At 1,500 queries: 1,024 of them, first and last among them, each with all of its keys."""
    query, key = normal(1, 1, 1, 1500, 2, seed=3), normal(1, 1, 1500, 2, seed=4)
    chosen = torch.linspace(0, 1499, 1024).long()
    assert len(set(chosen.tolist()) | {0, 1499}) == 1024
    i, j = torch.arange(1500)[:, None], torch.arange(1500)
    weights = ((j <= i) & (i - j > 300)).double() if options else torch.ones(1500, 1500).double()
    weights[~torch.isin(i[:, 0], chosen)] = 0
    moments = measured(query, key, **options)
    assert_moments(moments, sums(query, key, weights[None, None, None]))
    assert moments.samples == (weights.sum(-1) > 0).sum()


def test_queries_without_estimated_pairs_are_no_samples():
    """The first queries of a causal sequence see sinks alone."""
    query, key = inputs(groups=1)
    options = {"is_causal": True, "sinks": 8, "attention_weighted": True}
    moments = measured(query, key, **options)
    assert_moments(moments, expected_sums(query, key, **options))
    assert moments.samples == 2
