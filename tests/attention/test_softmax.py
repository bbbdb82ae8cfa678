"""Softmax attention, where features are exact or every pair is: convention by convention."""

import pytest
import torch
from torch.nn import functional as F

from performers import ListedKeys, favor_attention
from tests.attention import oracle
from tests.attention.cases import (
    ALL,
    BACKENDS,
    POSITIVE,
    SELF,
    assert_close_gradients,
    law,
    make_call,
    random_mask,
    with_gradients,
)
from tests.features.cases import generator
from tests.features.maps import QuadratureFeatures

SOFTMAX = [case for case in ALL if case.softmax]
EXACT_TERMS = [{}, {"window": 0}, {"window": 9, "sinks": 2}, {"sinks": 3}]


def tensors(key_heads):
    random = generator(0)
    shapes = ((2, 4, 70, 2), (2, key_heads, 70, 2), (2, key_heads, 70, 3))
    return [torch.randn(shape, generator=random) for shape in shapes]


@pytest.mark.parametrize("terms", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_features_without_error(backend, key_heads, options, terms):
    """Wherever exact pairs begin, with gradients."""
    results = []
    for attend in (
        lambda *x: favor_attention(*x, QuadratureFeatures(), backend=backend, **options, **terms),
        lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True, **options),
    ):
        inputs = [x.requires_grad_() for x in tensors(key_heads)]
        out = attend(*inputs)
        weight = torch.randn(out.shape, generator=generator(1))
        results.append((out, *torch.autograd.grad(out, inputs, weight)))
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 1e-4 * max(1, 4 * wanted.abs().max())


@pytest.mark.parametrize("masking", ["none", "mask", "packed"])
@pytest.mark.parametrize(
    "terms",
    [
        {"window": 129},
        {"window": 2**40},
        {"window": 200, "sinks": 5, "scale": 0.9},
        {"sinks": 130},
        {"window": 64, "sinks": 66, "is_causal": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@law(cases=SOFTMAX, modes=SELF)
def test_exact_terms_over_everything(backend, case, mode, key_heads, terms, masking):
    """Whatever the features: also ones far too few. A sink that is near counts once."""
    batch = 1 if masking == "packed" else 2
    call = make_call(case, 130, mode, batch=batch, heads=4, key_heads=key_heads, num_features=4)
    call.options |= terms
    who = {}
    if masking == "mask":
        who["key_mask"] = random_mask(2, 130)
        who["key_mask"][:, 0] = True
    elif masking == "packed":
        who["cu_seqlens"] = torch.tensor([0, 75, 75, 76, 130])
    seen = oracle.visible(130, 130, is_causal=call.options.get("is_causal", False), **who)
    call.options |= who
    weight = torch.randn(batch, 4, 130, 8, generator=generator(0))
    out, *gradients = with_gradients(call, backend, weight)
    dense = call.leaves()
    options = {"attn_mask": seen, "enable_gqa": True, "scale": terms.get("scale")}
    exact = F.scaled_dot_product_attention(*dense.inputs, **options)
    torch.testing.assert_close(out, exact.detach(), rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(exact, dense.inputs, weight)
    assert_close_gradients(gradients, wanted, 5e-5)


@pytest.mark.parametrize("dtype", [torch.float64])
@law(modes=SELF)
def test_a_window_over_everything_at_large_inputs(backend, mode, dtype):
    """Logits of hundreds, which estimates from a handful of features would miss by far."""
    call = make_call(POSITIVE, 130, mode, num_features=4, dtype=dtype, input_scale=12)
    exact = F.scaled_dot_product_attention(*call.inputs, is_causal=mode == "causal")
    torch.testing.assert_close(call.run(backend, window=130), exact, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [None, 4, 2**40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_lists_of_every_key(backend, window):
    call = make_call(POSITIVE, 60, heads=4, key_heads=2, num_features=4, window=window)
    call.options["listed_keys"] = ListedKeys(16, 4, 200, generator=generator(7))
    exact = F.scaled_dot_product_attention(*call.inputs, enable_gqa=True)
    torch.testing.assert_close(call.run(backend), exact, rtol=0, atol=2e-5)


@law(modes=SELF)
def test_no_window_is_none_and_zero_is_the_own_key(backend, mode):
    call = make_call(POSITIVE, 90, mode)
    plain = call.run(backend)
    assert torch.equal(plain, call.run(backend, window=None, sinks=0))
    assert (plain - call.run(backend, window=0)).abs().max() > 1e-3
