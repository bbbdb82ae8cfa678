"""``Approximation`` and the ``FavorAttention`` that it builds."""

import json

import numpy as np
import pytest
import torch

from performers import (
    PerformerAttention,
    SoftmaxFeatures,
    favor_attention,
    favor_attention_weights,
    scaled_dot_product_attention,
)
from performers.nn import Approximation, FavorAttention
from tests.features.cases import generator

EVERY = Approximation(16, "data_aware", "simplex", window=2, sinks=1, listed_keys=4)


def inputs(heads=4, key_heads=2, length=20):
    random = generator(3)
    return [
        torch.randn(2, count, length, 8, generator=random)
        for count in (heads, key_heads, key_heads)
    ]


@pytest.mark.parametrize(
    ("approximation", "label"),
    [
        (Approximation(), "positive"),
        (EVERY, "data_aware m=16, simplex, window 2, 1 sinks, 4 listed keys"),
        (Approximation(0, window=8, sinks=2), "window 8, 2 sinks alone"),
    ],
)
def test_labels(approximation, label):
    assert approximation.label() == label
    assert approximation.has_exact_pairs is ("window" in label)


def test_a_record_is_plain_and_gives_the_approximation_back():
    record = json.loads(json.dumps(EVERY.record()))
    assert Approximation.from_record(record) == EVERY
    with pytest.raises(ValueError, match=r"unknown settings of its conversion, \['reach'\]"):
        Approximation.from_record({**record, "reach": 3})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": -1}, "window must be None or an integer of at least 0, got -1"),
        ({"sinks": None}, "sinks must be an integer of at least 0, got None"),
        ({"num_features": True}, "num_features must be None or an integer"),
        ({"listed_keys": 1.5}, "listed_keys must be an integer"),
        ({"estimator": "trigonometric", "listed_keys": 2}, "listed_keys needs positive features"),
    ],
)
def test_refused_numbers(options, match):
    with pytest.raises(ValueError, match=match):
        Approximation(**options)
    assert type(Approximation(window=np.int64(3)).window) is int


@pytest.mark.parametrize("num_heads", [2, 4])
def test_it_computes_favor_attention_and_calibrates_itself(num_heads):
    query, key, value = inputs()
    favor = EVERY.build(8, num_heads, generator=generator(1)).calibrate_(query, key)
    kind = {"estimator": "data_aware", "projection": "simplex", "num_heads": num_heads}
    features = SoftmaxFeatures(8, 16, **kind, generator=generator(1))
    features.calibrate_(query, key, window=2, sinks=1)
    options = {"window": 2, "sinks": 1, "listed_keys": favor.buckets}
    out, state = favor(query, key, value)
    assert state is None
    torch.testing.assert_close(out, favor_attention(query, key, value, features, **options))
    torch.testing.assert_close(
        favor.weights(query, key), favor_attention_weights(query, key, features, **options)
    )
    assert favor.buckets.offsets.abs().sum() > 0


def test_trained_features_start_from_the_present_ones_and_stay():
    query, key, value = inputs()
    favor = Approximation(16).build(8, 2, generator=generator(1))
    before = favor(query, key, value)[0]
    learned = favor.learn_().feature_map
    assert len(list(favor.parameters())) == 2
    torch.testing.assert_close(favor(query, key, value)[0], before)
    assert favor.learn_().feature_map is learned


def test_estimators_that_are_not_calibrated_raise_on_every_surface(monkeypatch):
    features, x = SoftmaxFeatures(8, 16, estimator="data_aware"), torch.randn(1, 2, 9, 8)
    tokens = torch.randn(1, 9, 16)
    attention = PerformerAttention(16, 2, batch_first=True, feature_map=features)
    calls = [
        lambda: favor_attention(x, x, x, features),
        lambda: favor_attention(x, x, x, features, window=9),
        lambda: favor_attention_weights(x, x, features),
        lambda: FavorAttention(features)(x, x, x),
        lambda: FavorAttention(features).weights(x, x),
        lambda: attention(tokens, tokens, tokens),
        lambda: scaled_dot_product_attention(x, x, x, feature_map=features),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="estimator='data_aware' is fitted to data"):
            call()
    compiled = torch.compile(calls[0], fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match="estimator='data_aware' is fitted to data"):
        compiled()
    with monkeypatch.context() as patched:
        # The code that the compiler traces.
        patched.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="estimator='data_aware' is fitted to data"):
            features.check_calibrated()
    features.calibrate_(x, x)
    for call in (*calls, compiled):
        call()
