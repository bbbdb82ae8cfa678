"""Exact attention within a window, in blocks, against a dense mask."""

import pytest
import torch
import torch.nn.functional as F

from performers.convert.interface.call import sliding_attention


def tensors(length, heads=4, key_heads=2, batch=2, width=8, value_width=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)

    def draw(count, size):
        shape = (batch, count, length, size)
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return draw(heads, width), draw(key_heads, width), draw(key_heads, value_width)


def dense(query, key, value, window, is_causal, key_mask, scale=None):
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    distance = torch.arange(length).unsqueeze(-1) - torch.arange(length)
    seen = (distance.abs() <= window) & ((distance >= 0) | (not is_causal))
    seen = seen.expand(query.shape[0], 1, length, length)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    blind = ~seen.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen | blind, scale=scale)
    return out.masked_fill(blind, 0.0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 1, 5, 64, 70, 300])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
def test_blocks_compute_what_a_dense_mask_does(length, window, is_causal, masked):
    given = tensors(length)
    mask = None
    if masked:
        mask = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) < 0.6
        # A row whose beginning sees nothing.
        mask[1, : length // 2] = False
    got = sliding_attention(*given, window, is_causal=is_causal, key_mask=mask)
    expected = dense(*given, window, is_causal, mask)
    torch.testing.assert_close(got, expected)
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(got.shape, generator=generator, dtype=got.dtype)
    gradients = torch.autograd.grad(got, given, weight)
    wanted = torch.autograd.grad(expected, given, weight)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (6, 2), (6, 1)])
def test_grouped_heads(heads, key_heads):
    given = tensors(100, heads, key_heads)
    got = sliding_attention(*given, 9, is_causal=True)
    torch.testing.assert_close(got, dense(*given, 9, True, None))


def test_scale():
    given = tensors(100)
    got = sliding_attention(*given, 9, is_causal=False, scale=0.7)
    torch.testing.assert_close(got, dense(*given, 9, False, None, scale=0.7))


def test_rows_that_see_nothing_are_zero():
    given = tensors(80)
    mask = torch.zeros(2, 80, dtype=torch.bool)
    mask[0] = True
    out = sliding_attention(*given, 4, is_causal=True, key_mask=mask)
    assert (out[1] == 0).all()
    gradients = torch.autograd.grad(out.sum(), given)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    given = tensors(100, dtype=dtype)
    out = sliding_attention(*given, 9, is_causal=True)
    assert out.dtype == dtype
    expected = dense(*(x.double() for x in given), 9, True, None)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_memory_is_linear_in_the_length():
    """No tensor of the computation has as many elements as there are pairs."""
    length, window = 4096, 8
    largest = 0

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    query, key, value = (x.detach() for x in tensors(length, 1, 1, 1))
    with Largest():
        sliding_attention(query, key, value, window, is_causal=True)
    assert 0 < largest <= length * 4 * (window + 64)
