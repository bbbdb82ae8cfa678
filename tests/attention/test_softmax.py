"""With exact features the package is ``scaled_dot_product_attention``, convention by convention."""

import pytest
import torch
from torch.nn import functional as F

from performers import favor_attention, favor_attention_weights
from tests.attention.cases import BACKENDS, TESTED, random_mask
from tests.features.cases import generator
from tests.features.maps import QuadratureFeatures


def tensors(heads=4, key_heads=4, length=70, size=70, dtype=torch.float32):
    random = generator(0)
    shapes = ((2, heads, length, 2), (2, key_heads, size, 2), (2, key_heads, size, 3))
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}], ids=str)
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_scaled_dot_product_attention(backend, key_heads, options):
    x = tensors(key_heads=key_heads)
    out = favor_attention(*x, QuadratureFeatures(), backend=backend, **options)
    exact = F.scaled_dot_product_attention(*x, enable_gqa=True, **options)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_cross_attention(backend):
    x = tensors(length=20, size=90)
    mask = random_mask(2, 90)
    out = favor_attention(*x, QuadratureFeatures(), key_mask=mask, backend=backend)
    exact = F.scaled_dot_product_attention(*x, attn_mask=mask[:, None, None, :])
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("backend", TESTED)
def test_gradients(backend, is_causal):
    ours, exact = ([x.requires_grad_() for x in tensors()] for _ in range(2))
    out = favor_attention(*ours, QuadratureFeatures(), is_causal=is_causal, backend=backend)
    wanted = F.scaled_dot_product_attention(*exact, is_causal=is_causal)
    weight = torch.randn(out.shape, generator=generator(1))
    for a, b in zip(
        torch.autograd.grad(out, ours, weight),
        torch.autograd.grad(wanted, exact, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-4)


def test_weights_are_softmax():
    query, key, _ = tensors()
    weights = favor_attention_weights(query, key, QuadratureFeatures(), scale=0.5)
    exact = (0.5 * query @ key.mT).softmax(-1)
    torch.testing.assert_close(weights, exact, rtol=0, atol=1e-5)
