"""Features whose projection is trained: their start, their gradients, their state."""

import copy

import pytest
import torch
from torch import nn

from performers import SoftmaxFeatures, favor_attention, redraw_features_
from performers.features import ESTIMATORS, LearnedFeatures
from tests.features.cases import calibrate, generator, normal, sample

HEAD_DIM = 4
EXPONENTIAL = [name for name in ESTIMATORS if name != "trigonometric"]


def source(estimator="data_aware", num_features=6, *, seed=0, **options):
    options |= {"estimator": estimator, "generator": generator(seed)}
    return calibrate(SoftmaxFeatures(HEAD_DIM, num_features, **options).double())


def inputs(heads=2, length=5):
    query, key = sample(HEAD_DIM, heads, length=length, seed=3)
    return query, key, normal(2, heads, length, 3, seed=4)


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("estimator", EXPONENTIAL)
def test_they_start_as_their_source(estimator, num_heads):
    features = source(estimator, num_heads=num_heads)
    before = copy.deepcopy(features.state_dict())
    learned = LearnedFeatures(features)
    query, key, value = inputs()
    assert learned.num_features == features.num_features
    assert learned.num_heads == features.num_heads
    for x, is_query in ((query, True), (key, False)):
        assert torch.equal(learned(x, is_query=is_query), features(x, is_query=is_query))
    for is_causal in (False, True):
        first, second = (
            favor_attention(query, key, value, m, is_causal=is_causal, backend="torch")
            for m in (learned, features)
        )
        assert torch.equal(first, second)
    with torch.no_grad():
        for x in (*learned.parameters(), *learned.buffers()):
            x.add_(1)
    assert all(torch.equal(before[name], x) for name, x in features.state_dict().items())


@pytest.mark.parametrize("estimator", EXPONENTIAL)
def test_separate_heads_start_alike(estimator):
    features = source(estimator)
    learned = LearnedFeatures(features, num_heads=2)
    query, key, _ = inputs()
    expected = features.estimate_kernel(query, key)
    torch.testing.assert_close(learned.estimate_kernel(query, key), expected)
    with torch.no_grad():
        learned.weight[0] += 1
    estimate = learned.estimate_kernel(query, key)
    assert not torch.allclose(estimate[:, 0], expected[:, 0])
    torch.testing.assert_close(estimate[:, 1], expected[:, 1])


def test_weight_and_bias_are_the_parameters():
    learned, plain = LearnedFeatures(source()), LearnedFeatures(source("positive"))
    shapes = {"weight": (1, 6, HEAD_DIM), "bias": (1, 6)}
    assert {name: x.shape for name, x in learned.named_parameters()} == shapes
    assert set(dict(learned.named_buffers())) == {"query_transform", "key_transform"}
    assert set(plain.state_dict()) == set(shapes)
    assert (plain.bias == 0).all()
    # The features to start again from take no memory.
    assert all(x.is_meta for x in learned._source[0].buffers())


@pytest.mark.parametrize("options", [{}, {"window": 1, "sinks": 1, "is_causal": True}], ids=str)
@pytest.mark.parametrize("num_heads", [None, 2])
def test_gradients_reach_weight_and_bias(num_heads, options):
    learned = LearnedFeatures(source(num_heads=num_heads))
    query, key, value = inputs()
    leaves = query.requires_grad_(), key.requires_grad_(), learned.weight, learned.bias

    def output(query, key, *parameters):
        return favor_attention(query, key, value, learned, backend="torch", **options)

    assert torch.autograd.gradcheck(output, leaves, atol=1e-7, fast_mode=True)
    output(*leaves).square().sum().backward()
    assert all(x.grad.abs().max() > 1e-4 for x in leaves)


def test_redrawing_and_calibration_change_nothing():
    model = nn.ModuleList([LearnedFeatures(source()), source("positive")])
    before = copy.deepcopy(model.state_dict())
    redraw_features_(model, generator(1))
    assert model[0].calibrate_(*inputs()[:2]) is model[0]
    after = model.state_dict()
    assert {x for x in before if not torch.equal(before[x], after[x])} == {"1.weight"}
