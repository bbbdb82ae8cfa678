"""Features whose projection is trained: where they start, what reaches them, what leaves them."""

import copy
import io

import pytest
import torch
from torch import nn

from performers import (
    GeneralizedFeatures,
    SoftmaxFeatures,
    favor_attention,
    redraw_features_,
)
from performers.features import ESTIMATORS, LearnedFeatures
from tests.features.calibrated import calibrate, sample
from tests.features.cases import generator

HEAD_DIM = 4
EXPONENTIAL = [name for name in ESTIMATORS if name != "trigonometric"]


def source(estimator="data_aware", num_features=6, **options):
    options = {"generator": generator(0), **options}
    built = SoftmaxFeatures(HEAD_DIM, num_features, estimator=estimator, **options).double()
    return calibrate(built)


def inputs(heads=2, length=5):
    query, key = sample(HEAD_DIM, heads, length=length, seed=3)
    value = torch.randn(2, heads, length, 3, generator=generator(4), dtype=torch.float64)
    return query, key, value


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("estimator", EXPONENTIAL)
def test_they_start_as_their_source(estimator, num_heads):
    features = source(estimator, num_heads=num_heads)
    learned = LearnedFeatures(features)
    query, key, value = inputs()
    assert learned.num_features == features.num_features
    assert learned.num_heads == features.num_heads
    for x, is_query in ((query, True), (key, False)):
        assert torch.equal(learned(x, is_query=is_query), features(x, is_query=is_query))
    assert torch.equal(learned.estimate_kernel(query, key), features.estimate_kernel(query, key))
    for is_causal in (False, True):
        outs = [
            favor_attention(query, key, value, m, is_causal=is_causal, backend="torch")
            for m in (learned, features)
        ]
        assert torch.equal(*outs)


@pytest.mark.parametrize("estimator", EXPONENTIAL)
def test_heads_of_their_own_start_alike(estimator):
    features = source(estimator)
    learned = LearnedFeatures(features, num_heads=2)
    assert learned.num_heads == 2
    assert learned.weight.shape == (2, 6, HEAD_DIM)
    assert learned.bias.shape == (2, 6)
    query, key, _ = inputs()
    torch.testing.assert_close(
        learned.estimate_kernel(query, key), features.estimate_kernel(query, key)
    )
    with torch.no_grad():
        learned.weight[0] += 1
    ours, theirs = learned.estimate_kernel(query, key), features.estimate_kernel(query, key)
    assert not torch.allclose(ours[:, 0], theirs[:, 0])
    torch.testing.assert_close(ours[:, 1], theirs[:, 1])


def test_weight_and_bias_are_the_parameters():
    learned = LearnedFeatures(source())
    assert {name: x.shape for name, x in learned.named_parameters()} == {
        "weight": (1, 6, HEAD_DIM),
        "bias": (1, 6),
    }
    assert set(dict(learned.named_buffers())) == {"query_transform", "key_transform"}
    assert set(learned.state_dict()) == {"weight", "bias", "query_transform", "key_transform"}
    plain = LearnedFeatures(source("positive"))
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert (plain.bias == 0).all()


def test_the_source_is_left_alone():
    features = source()
    before = copy.deepcopy(features.state_dict())
    learned = LearnedFeatures(features)
    with torch.no_grad():
        for x in (*learned.parameters(), *learned.buffers()):
            x.add_(1)
    assert all(torch.equal(before[name], x) for name, x in features.state_dict().items())


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"window": 1}, {"window": 1, "sinks": 1, "is_causal": True}],
    ids=str,
)
@pytest.mark.parametrize("num_heads", [None, 2])
def test_gradients_reach_weight_and_bias(num_heads, options):
    learned = LearnedFeatures(source(num_heads=num_heads))
    query, key, value = inputs()

    def output(query, key, weight, bias):
        parameters = {"weight": weight, "bias": bias}
        return torch.func.functional_call(
            _Attention(learned, value, options),
            {f"features.{name}": x for name, x in parameters.items()},
            (query, key),
        )

    leaves = [
        x.detach().clone().requires_grad_() for x in (query, key, learned.weight, learned.bias)
    ]
    assert torch.autograd.gradcheck(output, leaves, atol=1e-7)
    output(*leaves).square().sum().backward()
    assert all(x.grad.abs().max() > 1e-4 for x in leaves)


class _Attention(nn.Module):
    def __init__(self, features, value, options):
        super().__init__()
        self.features, self.value, self.options = features, value, options

    def forward(self, query, key):
        return favor_attention(
            query, key, self.value, self.features, backend="torch", **self.options
        )


def test_training_brings_the_kernel_closer():
    """A few steps on the weights of attention, from 16 features."""
    learned = LearnedFeatures(source("positive", 16))
    query, key, value = inputs(heads=1, length=24)
    exact = nn.functional.scaled_dot_product_attention(query, key, value)
    optimizer = torch.optim.Adam(learned.parameters(), 0.02)
    losses = []
    for _ in range(30):
        out = favor_attention(query, key, value, learned, backend="torch")
        losses.append((out - exact).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_redrawing_leaves_them_alone():
    model = nn.ModuleList([LearnedFeatures(source()), source("positive")])
    before = copy.deepcopy(model.state_dict())
    redraw_features_(model, generator(1))
    model[0].redraw_()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"1.weight"}


def test_calibration_leaves_them_alone():
    learned = LearnedFeatures(source())
    before = copy.deepcopy(learned.state_dict())
    assert learned.calibrate_(*inputs()[:2]) is learned
    assert all(torch.equal(before[name], x) for name, x in learned.state_dict().items())


@pytest.mark.parametrize("num_heads", [None, 2])
def test_saving_and_loading(num_heads):
    learned = LearnedFeatures(source(), num_heads=num_heads)
    with torch.no_grad():
        learned.weight.mul_(1.1)
        learned.bias.add_(0.3)
    stream = io.BytesIO()
    torch.save(learned.state_dict(), stream)
    stream.seek(0)
    fresh = SoftmaxFeatures(HEAD_DIM, 6, estimator="data_aware", generator=generator(8)).double()
    loaded = LearnedFeatures(fresh, num_heads=num_heads)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    query, key, _ = inputs()
    assert torch.equal(loaded.estimate_kernel(query, key), learned.estimate_kernel(query, key))
    assert torch.equal(
        copy.deepcopy(learned).estimate_kernel(query, key), learned.estimate_kernel(query, key)
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: SoftmaxFeatures(HEAD_DIM, 6, estimator="trigonometric"),
        lambda: GeneralizedFeatures(HEAD_DIM, 6),
        lambda: GeneralizedFeatures(HEAD_DIM, 6, fn="exp"),
        lambda: GeneralizedFeatures(HEAD_DIM, projection=None),
    ],
)
def test_other_features_are_refused(build):
    with pytest.raises(ValueError, match=r"features must be SoftmaxFeatures of an exponential"):
        LearnedFeatures(build())


@pytest.mark.parametrize("num_heads", [1, 3])
def test_another_number_of_heads_is_refused(num_heads):
    with pytest.raises(ValueError, match=rf"num_heads must be 2.*got {num_heads}"):
        LearnedFeatures(source(num_heads=2), num_heads=num_heads)


def test_no_heads_are_refused():
    with pytest.raises(ValueError, match=r"num_heads must be .*got 0"):
        LearnedFeatures(source(), num_heads=0)


def test_parameters_stay_float32_in_a_half_precision_model():
    learned = LearnedFeatures(SoftmaxFeatures(8, 16))
    before = learned.weight.detach().clone()
    learned.bfloat16()
    assert learned.weight.dtype == learned.bias.dtype == torch.float32
    assert torch.equal(learned.weight, before)
    assert isinstance(learned.weight, torch.nn.Parameter)
