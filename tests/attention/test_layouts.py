"""Shapes, heads, strides and dtypes that a caller may bring."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import (
    ALL,
    BACKENDS,
    FEW,
    MODES,
    TESTED,
    WIDE,
    assert_close_rows,
    check_against_oracle,
    make_call,
)
from tests.features.cases import by_name, generator


@pytest.mark.parametrize("num_heads", [None, 2, 6])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "trigonometric", "relu"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend, name, mode, num_heads):
    """A projection shared by all heads, one per key head, one per query head."""
    call = make_call(by_name(name), 70, mode, heads=6, key_heads=2, num_heads=num_heads, seed=1)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_head_for_all(backend, mode):
    check_against_oracle(
        make_call(by_name("positive"), 70, mode, heads=4, key_heads=1, num_heads=4), backend
    )


@pytest.mark.parametrize(("head_dim", "value_dim"), [(1, 1), (16, 1), (5, 33), (24, 24)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_and_value_dimensions(backend, mode, head_dim, value_dim):
    call = make_call(by_name("positive"), 66, mode, head_dim=head_dim, value_dim=value_dim)
    assert call.run(backend).shape == (2, 2, 66, value_dim)
    check_against_oracle(call, backend)


@pytest.mark.parametrize(("length", "size"), [(1, 1), (1, 300), (300, 1), (65, 64), (3, 129)])
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_cross_attention_sizes(backend, case, length, size):
    check_against_oracle(make_call(case, length, "cross", size=size, seed=2), backend)


def rearranged(x, how):
    """The same numbers in memory laid out another way."""
    if how == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "sliced":
        wide = torch.full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"), dtype=x.dtype)
        wide[..., ::3] = x
        return wide[..., ::3]
    if how == "offset":
        flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
        flat[1:] = x.flatten()
        return flat[1:].view(x.shape)
    return x.flip(-2).contiguous().flip(-2)


@pytest.mark.parametrize("how", ["transposed", "sliced", "offset", "flipped"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend, mode, how):
    call = make_call(by_name("positive"), 130, mode, heads=4, key_heads=2, seed=3)
    plain, strided = call.leaves(), call.leaves()
    expected = plain.run(backend)
    for name in ("query", "key", "value"):
        setattr(strided, name, rearranged(getattr(call, name), how).requires_grad_())
    out = strided.run(backend)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    gradient = torch.randn(out.shape, generator=generator(0)).transpose(1, 2).contiguous()
    gradient = gradient.transpose(1, 2)
    for a, b in zip(
        torch.autograd.grad(out, strided.inputs, gradient),
        torch.autograd.grad(expected, plain.inputs, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs(backend, mode):
    call = make_call(by_name("positive"), 70, mode, batch=1, heads=1)
    expanded = [x.expand(3, 2, -1, -1) for x in call.inputs]
    out = favor_attention(*expanded, call.feature_map, backend=backend, **call.options)
    expected, _ = call.expected()
    assert_close_rows(out, expected.expand(3, 2, -1, -1), 1.0, 2e-5)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_alone(backend, mode):
    call = make_call(by_name("positive"), 70, mode)
    copies = [x.clone() for x in call.inputs]
    call.options["key_mask"] = torch.arange(70).expand(2, -1) % 3 > 0
    call.run(backend)
    assert all(torch.equal(a, b) for a, b in zip(copies, call.inputs, strict=True))


@pytest.mark.parametrize(
    ("batch", "length", "size", "mode"),
    [
        (0, 5, 5, "bidirectional"),
        (0, 5, 5, "causal"),
        (2, 0, 0, "bidirectional"),
        (2, 0, 0, "causal"),
        (2, 0, 4, "cross"),
        (2, 4, 0, "cross"),
        (0, 0, 0, "cross"),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", WIDE)
def test_empty_inputs(backend, case, masked, batch, length, size, mode):
    """Nothing asked gives nothing; nothing to attend to gives zeros, with gradients of zero."""
    call = make_call(case, length, mode, size=size, batch=batch).leaves()
    if masked:
        call.options["key_mask"] = torch.ones(batch, size, dtype=torch.bool)
    out = call.run(backend)
    assert out.shape == (batch, 2, length, 8)
    assert (out == 0).all()
    gradients = torch.autograd.grad(out.sum(), call.inputs, allow_unused=True)
    assert all(g is None or (g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_inputs(backend, case, mode, dtype):
    """Computed in float32: against the oracle on the rounded inputs, only the output rounds."""
    call = make_call(case, 70, mode, seed=4)
    call.query, call.key, call.value = (x.to(dtype) for x in call.inputs)
    out = call.run(backend)
    assert out.dtype == dtype
    expected, conditioning = call.expected()
    rounding = torch.finfo(dtype).eps * expected.abs()
    error = (out.double() - expected).abs() - rounding
    assert (error <= 2e-5 * conditioning).all(), error.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients(backend, mode, dtype):
    call = make_call(by_name("positive"), 130, mode, seed=5)
    call.query, call.key, call.value = (x.to(dtype) for x in call.inputs)
    ours, dense = call.leaves(), call.leaves(torch.float64)
    weight = torch.randn(2, 2, 130, 8, generator=generator(1)).to(dtype)
    got = torch.autograd.grad(ours.run(backend), ours.inputs, weight)
    wanted = torch.autograd.grad(dense.expected()[0], dense.inputs, weight.double())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend, case, mode, dtype):
    """The output takes autocast's dtype; no product inside loses precision to it."""
    call = make_call(case, 130, mode, seed=6).leaves()
    with torch.autocast("cpu", dtype=dtype):
        out = call.run(backend)
    assert out.dtype == dtype
    plain = call.run(backend)
    # Identical sums, rounded once.
    assert torch.equal(out, plain.to(dtype))
    out.float().sum().backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.isfinite().all() for x in call.inputs)


@pytest.mark.parametrize("backend", WIDE)
def test_autocast_accepts_mixed_dtypes_and_keeps_float64(backend):
    call = make_call(by_name("positive"), 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = favor_attention(
            call.query.bfloat16(), call.key, call.value, call.feature_map, backend=backend
        )
        wide = favor_attention(
            *(x.double() for x in call.inputs), call.feature_map, backend=backend
        )
    assert out.dtype == torch.bfloat16
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_map_in_another_dtype(backend, dtype):
    """A model cast to half precision keeps its projection there; the sums do not follow it."""
    call = make_call(by_name("positive"), 70, seed=7)
    call.feature_map.to(dtype)
    expected, conditioning = call.expected()
    assert_close_rows(call.run(backend), expected, conditioning, 2e-5)
