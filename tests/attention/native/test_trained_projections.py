"""Gradients of weight and bias from the compiled kernels, without exact pairs.

Those beside exact pairs are in ``test_exact_terms``.
"""

from dataclasses import replace

import pytest
import torch

from performers.attention import favor_attention
from performers.attention.native import backend
from performers.attention.torch_backend import backend as torch_backend
from performers.features import FeatureForm, LearnedFeatures, SoftmaxFeatures
from tests.attention.native.exact_problems import make
from tests.attention.native.support import NATIVE, threads
from tests.features.cases import generator

pytestmark = NATIVE

LAYOUTS = {
    "one projection": {},
    "one a head": {"num_heads": 2, "bias": True},
    "groups and a mask": {"groups": 2, "masked": 0.7, "bias": True},
    "odd sizes": {"head_dim": 7, "value_dim": 19, "num_features": 29},
    "packed": {"lengths": [70, 1, 0, 60, 69], "num_heads": 2},
}


def run(function, call, kind, dtype, wanted=None):
    """Output and gradients of ``wanted`` leaves for one problem, computed in ``dtype``."""
    call = call.to(dtype)
    form = FeatureForm(
        "exponential" if kind == "softmax" else "elementwise",
        call.weight,
        call.bias,
        call.weight.shape[-2],
        1.0,
        epsilon=0.0 if kind == "softmax" else 1e-3,
        function=None if kind == "softmax" else torch.relu,
    )
    out, state = function(call.problem().replaced(form=form, dtype=dtype))
    weight = torch.randn(out.shape, generator=generator(3)).to(out.dtype)
    loss = (out * weight).sum()
    if state is not None:
        loss = loss + (state.key_value * state.log_scale.exp().unsqueeze(-1)).sum()
    return out, torch.autograd.grad(loss, wanted(call) if wanted else call.leaves)


def assert_close(got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 0.3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_against_the_torch_backend(kind, causal, layout):
    """In float64 there; every gradient, the final sums' share in it too."""
    for length in (1, 64, 200):
        options = dict(LAYOUTS[layout])
        if "lengths" in options:
            length = 200
        call = make(length, None, causal=causal, trained=True, **options)
        call.return_state = causal and call.segments is None
        expected = run(torch_backend.attend, call, kind, torch.float64)
        got = run(backend.attend, call, kind, torch.float32)
        assert (got[0] - expected[0]).abs().max() <= 1e-5
        assert_close(got[1], expected[1])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "relu"])
def test_heads_cut_among_threads(kind, causal):
    """However many threads; the same number gives the same bits."""
    call = make(1500, None, causal=causal, batch=1, key_heads=1, trained=True, num_features=8)
    expected = run(torch_backend.attend, call, kind, torch.float64)[1]
    for count in (1, 2, 4):
        with threads(count):
            _, got = run(backend.attend, call, kind, torch.float32)
            _, again = run(backend.attend, call, kind, torch.float32)
        assert_close(got, expected, 2e-5)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("causal", [True, False])
def test_only_some_are_wanted(causal):
    call = make(130, None, causal=causal, trained=True, bias=True)
    _, (query, *_, weight, bias) = run(backend.attend, call, "softmax", torch.float32)
    for wanted, expected in (
        (lambda c: [c.weight], [weight]),
        (lambda c: [c.bias], [bias]),
        (lambda c: [c.query, c.bias], [query, bias]),
    ):
        _, got = run(backend.attend, call, "softmax", torch.float32, wanted)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    other = replace(call, trained=False)
    _, (again, *_) = run(backend.attend, other, "softmax", torch.float32)
    assert torch.equal(again, query)


def test_rows_summed_at_a_scale_of_their_own():
    """Exact rows give the weights their share too."""
    call = make(150, None, num_features=16, trained=True, seed=5, batch=1)
    along = torch.randn(call.key.shape[-1], generator=generator(9))
    call.key = call.key / 2 + 60 * along / along.norm()
    call.key[..., 63::64, :] *= 0.1 / 60
    expected = run(torch_backend.attend, call, "softmax", torch.float64)[1]
    got = run(backend.attend, call, "softmax", torch.float32)[1]
    assert_close(got, expected, 2e-3)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("length", [1, 5, 24, 33, 63, 70, 129])
def test_rows_beyond_the_last_are_not_read(length, is_causal):
    """Scratch memory holds what other calls left there: here, what is not a number."""
    generator = torch.Generator().manual_seed(length)
    drawn = SoftmaxFeatures(8, 8, num_heads=2, generator=generator)
    features = LearnedFeatures(drawn, num_heads=2)
    inputs = [
        torch.randn(2, heads, length, 8, generator=generator).requires_grad_()
        for heads in (4, 2, 2)
    ]
    upstream = torch.randn(2, 4, length, 8, generator=generator)

    def gradients(backend):
        junk = [torch.full((size,), torch.nan) for size in (100, 1000, 5000, 20000, 100000) * 9]
        del junk
        out = favor_attention(*inputs, features, is_causal=is_causal, window=4, backend=backend)
        leaves = [*inputs, features.weight, features.bias]
        return torch.autograd.grad(out, leaves, upstream)

    expected = gradients("torch")
    for _ in range(4):
        for ours, theirs in zip(gradients("native"), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-4)
