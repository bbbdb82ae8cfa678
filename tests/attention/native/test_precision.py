"""Half-precision inputs: converted to the bit, summed in float32, rounded once."""

import itertools

import pytest
import torch

from performers import favor_attention
from performers.attention.native.operators import favor_backward, favor_forward
from tests.attention.cases import ALL, MODES, make_call, random_mask
from tests.attention.native.support import (
    NATIVE,
    values_and_gradients,
)
from tests.features.cases import by_name, generator

pytestmark = NATIVE

HALF = (torch.bfloat16, torch.float16)
CASES = {case.name: case for case in ALL}


def in_dtype(call, dtype):
    call.query, call.key, call.value = (x.to(dtype) for x in call.inputs)
    return call


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "bias", "relu"])
def test_only_the_results_are_rounded(name, mode, dtype):
    """The float32 call on the rounded inputs, to the bit: output and gradients."""
    call = in_dtype(make_call(CASES[name], 130, mode, heads=4, key_heads=2, value_dim=9), dtype)
    call.options["key_mask"] = random_mask(2, call.key.shape[2])
    half, wide = call.leaves(), call.leaves(torch.float32)
    out, expected = half.run("native"), wide.run("native")
    assert torch.equal(out, expected.to(dtype))
    weight = torch.randn(out.shape, generator=generator(1)).to(dtype)
    got = torch.autograd.grad(out, half.inputs, weight)
    wanted = torch.autograd.grad(expected, wide.inputs, weight.float())
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_state_is_that_of_float32(dtype):
    call = in_dtype(make_call(by_name("positive"), 100, "causal"), dtype)
    _, state = call.run("native", return_state=True)
    _, wide = call.leaves(torch.float32).run("native", return_state=True)
    for name in ("key_value", "key_sum", "log_scale"):
        assert torch.equal(getattr(state, name), getattr(wide, name))


@pytest.mark.parametrize("mode", MODES)
def test_autocast_with_every_mixture(mode):
    """Inputs keep their precision; the output takes autocast's dtype, gradients the inputs'."""
    for dtypes in itertools.product((torch.float32, torch.bfloat16, torch.float16), repeat=3):
        call = make_call(by_name("positive"), 70, mode)
        mixed = [x.to(d).requires_grad_() for x, d in zip(call.inputs, dtypes, strict=True)]
        wide = [x.detach().float().requires_grad_() for x in mixed]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = favor_attention(*mixed, call.feature_map, backend="native", **call.options)
        expected = favor_attention(*wide, call.feature_map, backend="native", **call.options)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, expected.bfloat16())
        weight = torch.randn(out.shape, generator=generator(2)).bfloat16()
        got = torch.autograd.grad(out, mixed, weight)
        wanted = torch.autograd.grad(expected, wide, weight.float())
        for a, b, d in zip(got, wanted, dtypes, strict=True):
            assert a.dtype == d
            assert torch.equal(a, b.to(d))


def single_key(value):
    """Arguments of a call whose only feature of the only key is one: the output is the value."""
    zero = value.new_zeros(value.shape[0], 1, 1, 1)
    return (
        zero.unsqueeze(2),
        zero,
        value,
        torch.ones(1, 1, 1),
        *(None,) * 9,
        "exponential",
        True,
        0.0,
        1.0,
        1.0,
        False,
        None,
        0,
        "whole",
        False,
    )


def every_pattern(dtype):
    """All 65,536 numbers of the type, 64 a row: subnormals, infinities and NaN as well."""
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    return patterns.view(dtype).view(1024, 1, 1, 64)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_is_read_as_what_it_is(dtype):
    """But those that are denormal in float32 too: they count as zero. Infinity makes a row NaN."""
    value = every_pattern(dtype)
    out = favor_forward(*single_key(value))[0].squeeze(2)
    expected = value.float()
    expected[~expected.isfinite().all(-1)] = torch.nan
    expected[expected.abs() < torch.finfo(torch.float32).tiny] = 0
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def between(dtype):
    """Float32 numbers at, beside and half-way between those of the type."""
    exact = every_pattern(dtype).flatten()
    exact = exact[exact.isfinite() & (exact != 0)].float().double()
    step = exact.abs().log2().floor().clamp_min(-14 if dtype == torch.float16 else -126).exp2()
    step = step * torch.finfo(dtype).eps
    shifts = torch.tensor([0.0, 0.5, -0.5, 0.25, 0.4999, 0.5001, 0.75], dtype=torch.float64)
    numbers = (exact[:, None] + step[:, None] * shifts).float().flatten()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e38, -1e38, 65519.0, 65520.0, 0.0])
    numbers = torch.cat((numbers, special))
    numbers[numbers.abs() < torch.finfo(torch.float32).tiny] = 0
    return torch.cat((numbers, numbers.new_zeros(-len(numbers) % 64))).view(-1, 1, 1, 64)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_every_number_is_rounded_to_the_nearest(dtype):
    """Through the gradient of the value, which here is the gradient of the output."""
    gradient = between(dtype)
    given = single_key(torch.ones(gradient.shape, dtype=dtype))
    results = favor_forward(*given)
    _, _, rounded, *_ = favor_backward(
        gradient.unsqueeze(2), None, None, None, *given, *results, False
    )
    torch.testing.assert_close(rounded, gradient.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_masked_infinities_and_nan_take_no_part(mode, dtype):
    call = in_dtype(make_call(by_name("positive"), 70, mode), dtype)
    call.options["key_mask"] = random_mask(2, 70)
    clean = values_and_gradients(call)
    hostile = ~call.options["key_mask"][:, None, :, None]
    for number in (torch.nan, torch.inf, -torch.inf):
        dirty = type(call)(
            call.case,
            call.feature_map,
            call.query,
            call.key.masked_fill(hostile, number),
            call.value.masked_fill(hostile, number),
            call.options,
        )
        for a, b in zip(values_and_gradients(dirty), clean, strict=True):
            assert torch.equal(a, b)
