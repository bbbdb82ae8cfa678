"""Shapes, strides and dtypes that a caller may bring."""

import itertools

import pytest
import torch

from performers import SoftmaxFeatures, favor_attention
from tests.attention import oracle
from tests.attention.cases import (
    BACKENDS,
    CASES,
    CONFIGURATIONS,
    LINEAR,
    POSITIVE,
    VALUE_TOLERANCE,
    assert_close_rows,
    law,
    make_call,
    with_gradients,
)
from tests.features.cases import generator

HALF = (torch.bfloat16, torch.float16)


def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def sliced(x):
    wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"), dtype=x.dtype)
    wide[..., ::3] = x
    return wide[..., ::3]


def offset(x):
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def every_third_row(x):
    return x.repeat_interleave(3, dim=-2)[..., ::3, :]


def columns_outermost(x):
    return x.mT.contiguous().mT


def length_outermost(x):
    """(length, batch, heads, head_dim), as recurrent code keeps it."""
    return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


ORDERS = (transposed, sliced, offset, every_third_row, columns_outermost, length_outermost)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=lambda f: f.__name__)
@law()
def test_the_order_of_memory(backend, configuration, mode, order, dtype):
    """It changes results by rounding at most, and by nothing in the compiled kernels."""
    call = make_call(POSITIVE, 130, mode, configuration, value_dim=16, dtype=dtype, seed=3)
    expected = call.leaves()
    views = [order(x).requires_grad_() for x in call.inputs]
    results = []
    for ours in (expected, call.with_inputs(*views)):
        out = ours.run(backend)
        # The gradient comes in another order still.
        weight = torch.randn(out.shape, generator=generator(0)).to(dtype).mT.contiguous().mT
        results.append((out, *torch.autograd.grad(out, ours.inputs, weight)))
    for wanted, got in zip(*results, strict=True):
        if backend == "native" and not configuration.listed:
            assert torch.equal(got, wanted)
        else:
            eps = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            assert (got - wanted).abs().max() <= eps * max(1, wanted.abs().max())


@pytest.mark.parametrize("dim", [0, 1, 2])
@law()
def test_strides_of_zero(backend, configuration, mode, dim):
    """Keys and values that are one head, one batch row or one position, expanded; and out.sum()."""
    small = make_call(POSITIVE, 70, mode, configuration, batch=2).leaves()
    views = [x.narrow(dim, 0, 1).expand(x.shape) for x in small.inputs]
    whole = small.with_inputs(*views).leaves()
    out, expected = small.with_inputs(*views).run(backend), whole.run(backend)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    gradients = torch.autograd.grad(out.sum(), small.inputs)
    wanted = torch.autograd.grad(expected.sum(), whole.inputs)
    for a, b in zip(gradients, wanted, strict=True):
        total = b.sum(dim, keepdim=True)
        torch.testing.assert_close(a.narrow(dim, 0, 1), total, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("batch", "length", "size"),
    [(0, 5, 5), (2, 0, 0), (2, 0, 4), (2, 4, 0), (0, 0, 0)],
    ids=str,
)
@law()
def test_empty_inputs(backend, case, configuration, mode, batch, length, size, device):
    """Nothing asked gives nothing; nothing to attend to gives zeros, with gradients of zero."""
    if (mode != "cross" and length != size) or (configuration.packed and batch == 0):
        pytest.skip("these sizes do not go together")
    sizes = {"size": size, "batch": batch, "device": device}
    call = make_call(case, length, mode, configuration, **sizes).leaves()
    out = call.run(backend)
    assert out.shape == (*call.query.shape[:3], 8)
    assert (out == 0).all()
    gradients = torch.autograd.grad(out.sum(), call.inputs, allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@law()
def test_half_precision(backend, case, configuration, mode, dtype, device):
    """Computed in float32: against the oracle on the rounded inputs, only results are rounded."""
    call = make_call(case, 130, mode, configuration, dtype=dtype, seed=4, device=device)
    dense = call.dense()
    expected, conditioning = dense.expected()
    weight = torch.randn(expected.shape, generator=generator(1)).to(dtype)
    out, *got = with_gradients(call, backend, weight)
    assert out.dtype == dtype
    tolerance = 6e-5 if configuration.listed else VALUE_TOLERANCE
    error = (out.cpu().double() - expected).abs() - torch.finfo(dtype).eps * expected.abs()
    size = conditioning if not case.signed else conditioning * (1 + expected.abs().amax())
    assert (error <= tolerance * size).all(), error.max()
    if case.signed:
        return
    wanted = torch.autograd.grad(expected, dense.inputs, weight.double())
    # Passes over lists round their shares of a gradient one by one.
    units = 8 if configuration.listed else 4
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.cpu().double() - b).abs().max() <= units * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tokens", "piece"),
    [
        (torch.bfloat16, 6_000, 500),
        (torch.float16, 6_000, 500),
        *(
            pytest.param(torch.bfloat16, 50_000, piece, marks=pytest.mark.slow)
            for piece in (1, 1024, 50_000)
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", LINEAR)
def test_half_precision_over_many_tokens(backend, dtype, tokens, piece):
    """Only the state lives on; the last row is compared with dense attention over all keys."""
    call = make_call(POSITIVE, tokens, "causal", batch=1, heads=1, dtype=dtype, seed=11)
    state = None
    with torch.no_grad():
        for start in range(0, tokens, piece):
            rows = call.with_inputs(*(x[..., start : start + piece, :] for x in call.inputs))
            out, state = rows.run(backend, state=state, return_state=True)
            assert torch.isfinite(out).all()
        query = call.query[..., -1:, :]
        expected, _ = oracle.attend(POSITIVE, call.feature_map, query, call.key, call.value)
    error = (out[..., -1:, :].double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 2e-5).all(), error.max()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@law()
def test_autocast(backend, case, configuration, mode, dtype):
    """The output takes autocast's dtype; no product inside loses precision to it."""
    call = make_call(case, 130, mode, configuration, seed=6).leaves()
    with torch.autocast("cpu", dtype=dtype):
        out = call.run(backend)
    assert out.dtype == dtype
    # Identical sums, rounded once.
    assert torch.equal(out, call.run(backend).to(dtype))
    for gradient in torch.autograd.grad(out.float().sum(), call.inputs):
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all()


@law()
def test_autocast_with_every_mixture(backend, mode):
    """Inputs keep their precision; the output takes autocast's dtype, gradients the inputs'."""
    every = (torch.float32, torch.bfloat16, torch.float16)
    for first, second in itertools.product(range(3), repeat=2):
        # Every pair of dtypes, in each two of the three.
        dtypes = [every[i % 3] for i in (first, second, first + second)]
        call = make_call(POSITIVE, 70, mode)
        mixed = [x.to(d).requires_grad_() for x, d in zip(call.inputs, dtypes, strict=True)]
        wide = call.with_inputs(*mixed).leaves(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call.with_inputs(*mixed).run(backend)
        expected = wide.run(backend)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected.bfloat16())
        weight = torch.randn(out.shape, generator=generator(2)).bfloat16()
        got = torch.autograd.grad(out, mixed, weight)
        wanted = torch.autograd.grad(expected, wide.inputs, weight.float())
        for a, b, dtype in zip(got, wanted, dtypes, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a, b.to(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_float64(backend, dtype):
    call = make_call(POSITIVE, 20, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call.run(backend).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_feature_map_in_another_dtype(name, configuration, dtype):
    """A model cast to half precision keeps its projection there; the sums do not follow it."""
    call = make_call(POSITIVE, 70, "causal", configuration, seed=7)
    call.feature_map.to(dtype)
    expected, conditioning = call.expected()
    assert_close_rows(call.run(name), expected, conditioning, 6e-5)


@pytest.mark.parametrize("terms", [{}, {"window": 5, "sinks": 2}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_meta_tensors_have_a_shape(is_causal, terms):
    with torch.device("meta"):
        query, features = torch.empty(2, 4, 100, 16), SoftmaxFeatures(16, 32)
        out = favor_attention(query, query, query, features, is_causal=is_causal, **terms)
    assert out.shape == query.shape


@pytest.mark.parametrize("name", ["deterministic-relu", "positive"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_default_device(backend, name):
    call = make_call(CASES[name], 6)
    wanted = call.run(backend)
    with torch.device("meta"):
        got = call.run(backend)
    torch.testing.assert_close(got, wanted)
