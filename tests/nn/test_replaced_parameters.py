"""Parameters that are not where, or what, they were: quantised, offloaded, sharded."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from performers import ListedKeys, PerformerAttention, SoftmaxFeatures, favor_attention
from performers.features import LearnedFeatures


def attention(**options):
    torch.manual_seed(0)
    return PerformerAttention(32, 4, batch_first=True, **options).eval()


X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


def rounded(weight):
    scale = weight.detach().abs().amax() / 127
    return (weight.detach() / scale).round() * scale


class Int8Linear(nn.Module):
    """Layer as dynamic quantisation replaces it: weight and bias are methods."""

    def __init__(self, linear):
        super().__init__()
        self.values = rounded(linear.weight), linear.bias.detach()

    def weight(self):
        return self.values[0]

    def bias(self):
        return self.values[1]

    def forward(self, x):
        return F.linear(x, *self.values)


def test_a_quantised_layer_is_called_as_it_is():
    module = attention()
    exact = module(X, X, X)[0]
    module.out_proj = Int8Linear(module.out_proj)
    out = module(X, X, X)[0]
    assert not torch.equal(out, exact)
    torch.testing.assert_close(out, exact, rtol=0, atol=0.02)


def offload(module):
    """Keep each module's own tensors elsewhere except during its forward, as hooks do."""
    for part in module.modules():
        owners = [
            (owner, name)
            for owner in (part._parameters, part._buffers)
            for name in owner
            if owner[name] is not None
        ]
        held = [owner[name] for owner, name in owners]
        part.forward = functools.partial(_fetched, part.forward, owners, held)
        _put(owners, held, "meta")


def _fetched(forward, owners, held, *args, **kwargs):
    _put(owners, held, "cpu")
    try:
        return forward(*args, **kwargs)
    finally:
        _put(owners, held, "meta")


def _put(owners, tensors, device):
    for (owner, name), x in zip(owners, tensors, strict=True):
        moved = x.detach().clone().to(device)
        owner[name] = nn.Parameter(moved) if isinstance(x, nn.Parameter) else moved


FEATURES = {
    "positive": lambda: SoftmaxFeatures(8, 16),
    "data_aware": lambda: SoftmaxFeatures(8, 16, estimator="data_aware").calibrate_(
        *torch.randn(2, 1, 2, 50, 8)
    ),
    "learned": lambda: LearnedFeatures(SoftmaxFeatures(8, 16, estimator="data_aware")),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_offloading(name, is_causal):
    module = attention(feature_map=FEATURES[name]())
    expected = module(X, X, X, is_causal=is_causal)[0]
    offload(module)
    assert module.feature_map.weight.is_meta
    assert torch.equal(module(X, X, X, is_causal=is_causal)[0], expected)


def test_offloaded_lists():
    listed_keys, features, x = ListedKeys(8, 4, 4), SoftmaxFeatures(8, 16), torch.randn(1, 2, 20, 8)
    expected = favor_attention(x, x, x, features, listed_keys=listed_keys)
    offload(listed_keys)
    assert torch.equal(favor_attention(x, x, x, features, listed_keys=listed_keys), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_may_free_what_it_fetched(grad):
    """As FSDP does after a module's forward."""
    module = attention(feature_map=FEATURES["learned"]())
    with torch.set_grad_enabled(grad):
        expected = module(X, X, X)[0]
        weight = module.feature_map.weight
        kept = weight.detach().clone()

        def fetch(*_):
            weight.data.copy_(kept)

        def free(*_):
            weight.data.fill_(torch.nan)

        module.feature_map.register_forward_pre_hook(fetch)
        module.feature_map.register_forward_hook(free)
        assert torch.equal(module(X, X, X)[0], expected)
