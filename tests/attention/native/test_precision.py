"""Half-precision inputs: converted to the bit, summed in float32, rounded once."""

import pytest
import torch

from performers.attention.native.operators import favor_backward, favor_forward
from tests.attention.cases import CASES, CONFIGURATIONS, POSITIVE, law, make_call
from tests.attention.native.support import NATIVE
from tests.features.cases import generator

pytestmark = NATIVE

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "bias", "relu"])
@law(configurations=[x for x in CONFIGURATIONS if not x.listed])
def test_only_the_results_are_rounded(name, configuration, mode, dtype):
    """The float32 call on the rounded inputs, to the bit: output and gradients."""
    call = make_call(CASES[name], 130, mode, configuration, value_dim=9, dtype=dtype)
    half, wide = call.leaves(), call.leaves(torch.float32)
    out, expected = half.run("native"), wide.run("native")
    assert torch.equal(out, expected.to(dtype))
    weight = torch.randn(out.shape, generator=generator(1)).to(dtype)
    got = torch.autograd.grad(out, half.inputs, weight)
    wanted = torch.autograd.grad(expected, wide.inputs, weight.float())
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_state_is_that_of_float32(dtype):
    call = make_call(POSITIVE, 100, "causal", dtype=dtype)
    _, state = call.run("native", return_state=True)
    _, wide = call.leaves(torch.float32).run("native", return_state=True)
    for name in ("key_value", "key_sum", "log_scale"):
        assert torch.equal(getattr(state, name), getattr(wide, name))


def single_key(value):
    """Arguments of a call whose only feature of the only key is one: the output is the value."""
    zero = value.new_zeros(value.shape[0], 1, 1, 1)
    return (
        zero.unsqueeze(2),
        zero,
        value,
        torch.ones(1, 1, 1),
        *(None,) * 10,
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
