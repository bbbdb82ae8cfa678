"""Every refused argument is named, with what was expected and what came."""

import pytest
import torch

from performers import GeneralizedFeatures, SoftmaxFeatures


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0,), {}, r"head_dim must be .*got 0"),
        ((-4,), {}, r"head_dim must be .*got -4"),
        ((8, 0), {}, r"num_features must be .*got 0"),
        ((8, -32), {}, r"num_features must be .*got -32"),
        ((8, 33), {"estimator": "hyperbolic"}, r"num_features must be .*even.*got 33"),
        ((8, 33), {"estimator": "trigonometric"}, r"num_features must be .*even.*got 33"),
        ((8,), {"estimator": "cosine"}, r"estimator must be one of .*'cosine'"),
        ((8,), {"projection": "qr"}, r"projection must be one of .*'qr'"),
        ((8,), {"projection": None}, r"projection must be one of .*None"),
        ((8,), {"num_heads": 0}, r"num_heads must be .*got 0"),
        (
            (8,),
            {"estimator": "hyperbolic", "projection": "antithetic"},
            r"projection must not be 'antithetic' for the hyperbolic .*take 'orthogonal'",
        ),
        (
            (8,),
            {"estimator": "trigonometric", "projection": "antithetic"},
            r"projection must not be 'antithetic' for the trigonometric .*take 'orthogonal'",
        ),
    ],
)
def test_softmax_features(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        SoftmaxFeatures(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0,), {}, r"head_dim must be .*got 0"),
        ((8, 0), {}, r"num_features must be .*got 0"),
        ((8,), {"fn": "rleu"}, r"fn must be .*'rleu'"),
        ((8,), {"projection": "qr"}, r"projection must be .*'qr'"),
        ((8,), {"epsilon": -1e-3}, r"epsilon must be .*got -0.001"),
        ((8,), {"epsilon": float("nan")}, r"epsilon must be .*got nan"),
        ((8,), {"num_heads": -1}, r"num_heads must be .*got -1"),
        ((8, 16), {"projection": None}, r"num_features must be .*got 16"),
        ((8,), {"projection": None, "num_heads": 2}, r"num_heads must be None"),
    ],
)
def test_generalized_features(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        GeneralizedFeatures(*arguments, **options)


@pytest.mark.parametrize("build", [SoftmaxFeatures, GeneralizedFeatures])
def test_unknown_options_are_refused(build):
    with pytest.raises(TypeError, match="num_feature"):
        build(8, num_feature=16)


@pytest.mark.parametrize(
    ("query", "key", "options", "match"),
    [
        ((5, 7), (5, 8), {}, r"query must have shape .*8.*got \(5, 7\)"),
        ((5, 8), (5, 9), {}, r"key must have shape .*8.*got \(5, 9\)"),
        ((8,), (5, 8), {}, r"query must have shape .*got \(8,\)"),
        ((5, 8), (5, 8), {"scale": -1.0}, r"scale must be .*got -1.0"),
        ((5, 8), (5, 8), {"scale": float("inf")}, r"scale must be .*got inf"),
        ((5, 8), (5, 8), {"scale": float("nan")}, r"scale must be .*got nan"),
    ],
)
def test_estimate_kernel(query, key, options, match):
    with pytest.raises(ValueError, match=match):
        SoftmaxFeatures(8).estimate_kernel(torch.zeros(query), torch.zeros(key), **options)


def test_heads_of_a_map_with_a_projection_per_head():
    feature_map = SoftmaxFeatures(8, num_heads=3)
    for shape in ((5, 8), (2, 5, 8)):
        with pytest.raises(ValueError, match=r"query must have shape .*3.*num_heads=3"):
            feature_map.estimate_kernel(torch.zeros(shape), torch.zeros(3, 5, 8))
    with pytest.raises(ValueError, match=r"x must have shape .*num_heads=3"):
        feature_map(torch.zeros(5, 8))
