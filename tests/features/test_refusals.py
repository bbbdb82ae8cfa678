"""Refused arguments: the call, and the words that its message must have."""

import math

import pytest
import torch

from performers import GeneralizedFeatures, SoftmaxFeatures
from performers.features import CALIBRATED, FeatureRedrawer, LearnedFeatures, draw_projection
from performers.features.theory import log_relative_variance
from tests.features.cases import generator, sample


def softmax(*args, **options):
    return lambda: SoftmaxFeatures(*(args or (8,)), **options)


def generalized(*args, **options):
    return lambda: GeneralizedFeatures(*(args or (8,)), **options)


def learned(features, **options):
    return lambda: LearnedFeatures(features, **options)


def estimate(query, key=(5, 8), *, num_heads=None, **options):
    features = SoftmaxFeatures(8, num_heads=num_heads)
    return lambda: features.estimate_kernel(torch.zeros(query), torch.zeros(key), **options)


def variance(query, key=None, *, features=None, num_heads=None):
    features = features or SoftmaxFeatures(6, num_heads=num_heads)
    return lambda: log_relative_variance(features, torch.zeros(query), torch.zeros(key or query))


SIDED = "projection must not be 'antithetic' for the {} take 'orthogonal'"
TRAINED = "features must be SoftmaxFeatures of an exponential estimator"
CLOSED = "feature_map must be SoftmaxFeatures with regularized=False"
REFUSED = [
    (softmax(0), "head_dim must be got 0"),
    (softmax(8, 0), "num_features must be got 0"),
    *(
        (softmax(8, 33, estimator=name), f"num_features must be even {name} got 33")
        for name in ("hyperbolic", "trigonometric")
    ),
    (softmax(estimator="cosine"), "estimator must be one of 'cosine'"),
    (softmax(projection="qr"), "projection must be one of 'qr'"),
    (softmax(projection=None), "projection must be one of None"),
    (softmax(num_heads=0), "num_heads must be got 0"),
    (softmax(estimator="hyperbolic", projection="antithetic"), SIDED.format("hyperbolic")),
    (softmax(estimator="trigonometric", projection="antithetic"), SIDED.format("trigonometric")),
    *(
        (softmax(estimator=name, regularized=True), f"regularized must be False for the {name}")
        for name in CALIBRATED
    ),
    (softmax(num_feature=16), "num_feature"),
    (generalized(0), "head_dim must be got 0"),
    (generalized(8, 0), "num_features must be got 0"),
    (generalized(fn="rleu"), "fn must be 'rleu'"),
    (generalized(projection="qr"), "projection must be 'qr'"),
    (generalized(epsilon=-1e-3), "epsilon must be got -0.001"),
    (generalized(epsilon=math.nan), "epsilon must be got nan"),
    (generalized(num_heads=-1), "num_heads must be got -1"),
    (generalized(8, 16, projection=None), "num_features must be got 16"),
    (generalized(projection=None, num_heads=2), "num_heads must be None"),
    (learned(SoftmaxFeatures(4, 6, estimator="trigonometric")), TRAINED),
    (learned(GeneralizedFeatures(4, 6)), TRAINED),
    (learned(GeneralizedFeatures(4, 6, fn="exp")), TRAINED),
    (learned(GeneralizedFeatures(4, projection=None)), TRAINED),
    (learned(SoftmaxFeatures(4, num_heads=2), num_heads=1), "num_heads must be 2 got 1"),
    (learned(SoftmaxFeatures(4, num_heads=2), num_heads=3), "num_heads must be 2 got 3"),
    (learned(SoftmaxFeatures(4), num_heads=0), "num_heads must be got 0"),
    (estimate((5, 7)), "query must have shape 8 got (5, 7)"),
    (estimate((5, 8), (5, 9)), "key must have shape 8 got (5, 9)"),
    (estimate((8,)), "query must have shape got (8,)"),
    (estimate((5, 8), scale=-1.0), "scale must be got -1.0"),
    (estimate((5, 8), num_heads=3), "query must have shape 3 num_heads=3"),
    (estimate((2, 5, 8), num_heads=3), "query must have shape 3 num_heads=3"),
    (lambda: SoftmaxFeatures(8, num_heads=3)(torch.zeros(5, 8)), "x must have shape num_heads=3"),
    (variance((2, 6), (2, 5)), "key must have shape (2, 5)"),
    (variance((2, 6), (3, 6)), "key must have as many vectors as query (2) (3, 6)"),
    (variance((3, 2, 6), (2, 2, 6), num_heads=3), "key must have shape 3, (2, 2, 6)"),
    (variance((2, 6), features=GeneralizedFeatures(6)), CLOSED),
    (variance((2, 6), features=LearnedFeatures(SoftmaxFeatures(6))), CLOSED),
    (variance((2, 6), features=SoftmaxFeatures(6, regularized=True)), CLOSED),
    (
        lambda: SoftmaxFeatures(6, estimator="sderf", num_heads=3).calibrate_(*sample(6, 2)),
        "feature_map has num_heads=3 2 query heads and 2 key heads None",
    ),
    (lambda: draw_projection(8, 4, projection="sobol"), "projection must be one of 'sobol'"),
    (lambda: FeatureRedrawer(SoftmaxFeatures(8), -1), "interval must be >= 0 got -1"),
]


def assert_refused(call, words):
    with pytest.raises((ValueError, TypeError)) as refusal:
        call()
    position = 0
    for word in words.split():
        position = str(refusal.value).find(word, position)
        assert position >= 0, (word, str(refusal.value))


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused_arguments(call, words):
    assert_refused(call, words)


def with_value(x, value):
    x = x.clone()
    x[-1, -1, 3, 2] = value
    return x


def mask(*rows):
    return torch.tensor(rows, dtype=torch.bool)


QUERY, KEY = sample(6, 2, length=8)
SAMPLES = [
    ((QUERY, KEY), {"key_mask": mask(8 * [1], 8 * [0])}, "key_mask row 1"),
    ((with_value(QUERY, math.nan), KEY), {}, "query must be finite"),
    ((QUERY, with_value(KEY, math.nan)), {}, "key must be finite"),
    (
        (QUERY, with_value(KEY, math.inf)),
        {"key_mask": mask(8 * [1], 4 * [1] + 4 * [0])},
        "key must be finite",
    ),
    ((QUERY, KEY), {"window": 8}, "leave no pair window"),
    ((QUERY, KEY), {"sinks": 8}, "leave no pair sinks"),
    ((QUERY, KEY), {"window": 5, "sinks": 7, "is_causal": True}, "no pair"),
    ((QUERY[:0], KEY[:0]), {}, "leave no pair"),
    ((QUERY[:, :, :0], KEY), {}, "leave no pair"),
    ((QUERY, KEY[:, :, :0]), {}, "leave no pair"),
    ((QUERY[0], KEY[0]), {}, "query must be (batch, heads, length, 6)"),
    ((QUERY[..., :5], KEY), {}, "query must be 6), got 5)"),
    ((QUERY, KEY[..., :5]), {}, "key must be 6), got 5)"),
    ((QUERY.long(), KEY), {}, "query must be a floating-point tensor int64"),
    ((QUERY, KEY[:1]), {}, "key must have batch size 2"),
    ((QUERY, KEY[:, [0, 0, 1]]), {}, "key must heads that divides 2"),
    ((QUERY, KEY), {"key_mask": mask(7 * [1])}, "key_mask (2, 8) (1, 7)"),
    ((QUERY, KEY), {"key_mask": torch.ones(2, 8)}, "key_mask must be a bool float32"),
    ((QUERY, KEY), {"scale": -1.0}, "scale must be got -1.0"),
    ((QUERY, KEY), {"window": -1}, "at least 0"),
    ((QUERY, KEY), {"sinks": -3}, "at least 0"),
    ((QUERY, KEY[:, :, :5]), {"window": 2}, "as many keys as queries"),
    ((QUERY, KEY[:, :, :5]), {"is_causal": True}, "as many keys as queries"),
    ((QUERY, KEY), {"windows": 3}, "windows"),
]


@pytest.mark.parametrize(("pair", "options", "words"), SAMPLES)
def test_refused_samples(pair, options, words):
    """Nothing stays of them, not of a sound first row either."""
    feature_map, fresh = (
        SoftmaxFeatures(6, 24, estimator="data_aware", generator=generator(0)) for _ in range(2)
    )
    assert_refused(lambda: feature_map.calibrate_(*pair, **options), words)
    for _ in range(2):
        for name, x in fresh.state_dict().items():
            assert torch.equal(feature_map.get_buffer(name), x), name
        for x in (feature_map, fresh):
            x.calibrate_(QUERY, KEY)
