"""Parameters that are not where, or what, they were: quantised, offloaded, sharded, autocast."""

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


def inputs():
    return torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))


class Int8Linear(nn.Module):
    """What dynamic quantisation puts in the place of a layer: weight and bias are methods."""

    def __init__(self, linear):
        super().__init__()
        self._scale = linear.weight.detach().abs().amax() / 127
        self._weight = (linear.weight.detach() / self._scale).round().to(torch.int8)
        self._bias = linear.bias.detach()

    def weight(self):
        return self._weight

    def bias(self):
        return self._bias

    def forward(self, x):
        return F.linear(x, self._weight.float() * self._scale, self._bias)


class Int8Weight(torch.Tensor):
    """A weight-only quantised parameter: a subclass that linear layers dequantise."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, *rest = args
            weight = weight.as_subclass(torch.Tensor)
            scale = weight.abs().amax() / 127
            return F.linear(x, (weight / scale).round() * scale, *rest)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_layer_whose_weight_is_a_method():
    module = attention()
    exact, x = module(inputs(), inputs(), inputs())[0], inputs()
    module.out_proj = Int8Linear(module.out_proj)
    torch.testing.assert_close(module(x, x, x)[0], exact, rtol=0, atol=0.02)


def test_a_weight_of_another_tensor_type():
    module = attention()
    exact, x = module(inputs(), inputs(), inputs())[0], inputs()
    module.out_proj.weight = nn.Parameter(
        module.out_proj.weight.detach().as_subclass(Int8Weight), requires_grad=False
    )
    out = module(x, x, x)[0]
    assert not torch.equal(out, exact)
    torch.testing.assert_close(out, exact, rtol=0, atol=0.02)


@pytest.mark.parametrize("is_causal", [False, True])
def test_autocast(is_causal):
    module, x = attention(), inputs()
    exact = module(x, x, x, is_causal=is_causal)[0]
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, x, x, is_causal=is_causal)[0]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=0.03)


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
        put_back = functools.partial(_put, owners, [_like(x, "meta") for x in held])

        def forward(*args, inner=part.forward, owners=owners, held=held, back=put_back, **kwargs):
            _put(owners, [_like(x, "cpu") for x in held])
            try:
                return inner(*args, **kwargs)
            finally:
                back()

        part.forward = forward
        put_back()


def _like(x, device):
    moved = x.detach().clone().to(device)
    return nn.Parameter(moved) if isinstance(x, nn.Parameter) else moved


def _put(owners, tensors):
    for (owner, name), x in zip(owners, tensors, strict=True):
        owner[name] = x


FEATURES = {
    "positive": lambda: SoftmaxFeatures(8, 16),
    "data_aware": lambda: SoftmaxFeatures(8, 16, estimator="data_aware"),
    "learned": lambda: LearnedFeatures(SoftmaxFeatures(8, 16, estimator="data_aware")),
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_offloading(name, is_causal):
    module, x = attention(feature_map=FEATURES[name]()), inputs()
    with torch.no_grad():
        expected = module(x, x, x, is_causal=is_causal)[0]
        offload(module)
        assert module.feature_map.weight.is_meta
        assert torch.equal(module(x, x, x, is_causal=is_causal)[0], expected)


def test_offloaded_buckets():
    listed_keys, features, x = ListedKeys(8, 4, 4), SoftmaxFeatures(8, 16), torch.randn(1, 2, 20, 8)
    expected = favor_attention(x, x, x, features, listed_keys=listed_keys)
    offload(listed_keys)
    assert torch.equal(favor_attention(x, x, x, features, listed_keys=listed_keys), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_a_hook_may_free_what_it_fetched(grad):
    """As FSDP does after a module's forward."""
    module, x = attention(feature_map=FEATURES["learned"]()), inputs()
    with torch.set_grad_enabled(grad):
        expected = module(x, x, x)[0]
        weight = module.feature_map.weight
        kept = weight.detach().clone()

        def fetch(*_):
            weight.data.copy_(kept)

        def free(*_):
            weight.data.fill_(torch.nan)

        module.feature_map.register_forward_pre_hook(fetch)
        module.feature_map.register_forward_hook(free)
        assert torch.equal(module(x, x, x)[0], expected)
