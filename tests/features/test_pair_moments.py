"""Which pairs calibration looks at, and with what weight: against sums over all pairs."""

import math

import pytest
import torch

from performers.features.moments import PairMoments, add_attention_pairs
from tests.features.calibrated import sample
from tests.features.cases import generator

OPTIONS = [
    {},
    {"is_causal": True},
    {"window": 0},
    {"window": 3},
    {"sinks": 2},
    {"is_causal": True, "window": 2, "sinks": 3},
    {"window": 40},
]


def weights_of_pairs(
    query,
    key,
    key_mask=None,
    is_causal=False,
    window=None,
    sinks=0,
    attention_weighted=False,
    positions=None,
):
    """One pair at a time, ``(batch, heads, groups, L, S)``."""
    batch, heads, groups, length, _ = query.shape
    size = key.shape[2]
    weights = torch.zeros(batch, heads, groups, length, size, dtype=torch.float64)
    for b in range(batch):
        there = [j for j in range(size) if key_mask is None or key_mask[b, j]]
        for i in range(length) if positions is None else positions:
            seen = [j for j in there if not is_causal or j <= i]
            far = [
                j
                for j in seen
                if j not in there[:sinks] and (window is None or abs(i - j) > window)
            ]
            for h in range(heads):
                for g in range(groups):
                    scores = {j: math.exp(query[b, h, g, i] @ key[b, h, j]) for j in seen}
                    for j in far:
                        share = scores[j] / sum(scores.values())
                        weights[b, h, g, i, j] = share if attention_weighted else 1.0
    return weights


def dense(query, key, weights):
    """Total weight, means and second moments for each head."""
    key = key.nan_to_num(0.0)
    total = weights.sum((0, 2, 3, 4))
    outer = {
        "query": torch.einsum("bhgis,bhgid->hd", weights, query),
        "key": torch.einsum("bhgis,bhsd->hd", weights, key),
        "query_query": torch.einsum("bhgis,bhgid,bhgie->hde", weights, query, query),
        "key_key": torch.einsum("bhgis,bhsd,bhse->hde", weights, key, key),
        "query_key": torch.einsum("bhgis,bhgid,bhse->hde", weights, query, key),
    }
    return {"weight": total, **outer}


def measured(query, key, **options):
    moments = PairMoments.empty(key.shape[1], key.shape[-1])
    settings = {
        "key_mask": None,
        "is_causal": False,
        "window": None,
        "sinks": 0,
        "attention_weighted": False,
    }
    add_attention_pairs(moments, query, key, **{**settings, **options})
    return moments


def assert_moments(moments, expected, heads=slice(None), **tolerance):
    tolerance = {"rtol": 1e-10, "atol": 1e-12, **tolerance}
    for name, values in expected.items():
        torch.testing.assert_close(getattr(moments, name), values[heads], **tolerance)


def inputs(length=9, size=None, groups=2, head_dim=3, heads=2):
    query, key = sample(head_dim, heads * groups, batch=2, length=max(length, size or 0))
    return query[:, :, :length].unflatten(1, (heads, groups)), key[:, :heads, : size or length]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attention_weighted", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_moments_are_sums_over_pairs(options, attention_weighted, masked):
    query, key = inputs()
    options = {**options, "attention_weighted": attention_weighted}
    if masked:
        options["key_mask"] = torch.tensor([[False, *8 * [True]], [*6 * [True], *3 * [False]]])
        key = key.masked_fill(~options["key_mask"][:, None, :, None], math.nan)
    expected = dense(query, key, weights_of_pairs(query, key, **options))
    moments = measured(query, key, **options)
    assert_moments(moments, expected)
    # All pairs of a window over everything are exact.
    assert bool((moments.weight == 0).all()) == (options.get("window") == 40)
    means = [expected[name] / expected["weight"].unsqueeze(-1) for name in ("query", "key")]
    torch.testing.assert_close(list(moments.means()), means, equal_nan=True)
    seconds = [
        expected[name] / expected["weight"][:, None, None]
        for name in ("query_query", "key_key", "query_key")
    ]
    torch.testing.assert_close(list(moments.second_moments()), seconds, equal_nan=True)


def test_queries_and_keys_of_different_number():
    query, key = inputs(length=5, size=12)
    for options in ({}, {"sinks": 2}, {"attention_weighted": True}):
        expected = dense(query, key, weights_of_pairs(query, key, **options))
        assert_moments(measured(query, key, **options), expected)


def test_heads_are_added_where_moments_have_one():
    query, key = inputs()
    moments = PairMoments.empty(1, 3)
    add_attention_pairs(
        moments,
        query,
        key,
        key_mask=None,
        is_causal=True,
        window=None,
        sinks=0,
        attention_weighted=True,
    )
    weights = weights_of_pairs(query, key, is_causal=True, attention_weighted=True)
    each = dense(query, key, weights)
    assert_moments(moments, {name: x.sum(0, keepdim=True) for name, x in each.items()})
    assert moments.samples == 2 * 2 * 2 * 9


@pytest.mark.parametrize("options", [{}, {"is_causal": True, "window": 300}], ids=str)
def test_long_sequences_are_thinned_evenly(options):
    """At 1,500 queries: 1,024 of them, first and last among them, each with all of its keys."""
    random = generator(3)
    query, key = (
        torch.randn(1, 1, 1, 1500, 2, generator=random, dtype=torch.float64),
        torch.randn(1, 1, 1500, 2, generator=random, dtype=torch.float64),
    )
    chosen = torch.linspace(0, 1499, 1024).long()
    assert len(set(chosen.tolist())) == 1024
    assert {0, 1499} <= set(chosen.tolist())
    i, j = torch.arange(1500)[:, None], torch.arange(1500)
    taken = torch.ones(1500, 1500, dtype=torch.float64)
    if options:
        taken = ((j <= i) & (i - j > 300)).double()
    keep = torch.zeros(1500, 1, dtype=torch.float64)
    keep[chosen] = 1
    moments = measured(query, key, **options)
    assert_moments(moments, dense(query, key, (taken * keep)[None, None, None]))
    assert moments.samples == ((taken * keep).sum(-1) > 0).sum()


def test_rows_that_see_nothing_far_add_nothing():
    """The first queries of a causal sequence see sinks alone."""
    query, key = inputs(groups=1)
    moments = measured(query, key, is_causal=True, sinks=8, attention_weighted=True)
    weights = weights_of_pairs(query, key, is_causal=True, sinks=8, attention_weighted=True)
    assert (weights.sum((0, 1, 2, 4)) > 0).tolist() == 8 * [False] + [True]
    assert_moments(moments, dense(query, key, weights))
    assert moments.samples == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float64(dtype):
    query, key = (x.to(dtype) for x in inputs())
    moments = measured(query, key, attention_weighted=True)
    expected = dense(
        query.double(),
        key.double(),
        weights_of_pairs(query.double(), key.double(), attention_weighted=True),
    )
    assert_moments(moments, expected, rtol=1e-5, atol=1e-6)
    assert moments.query_key.dtype == torch.float64
