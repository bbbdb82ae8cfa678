"""Streams: chunks, single steps, other backends' states, and gradients through states."""

import math

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import exhaustive, random_mask, stream
from tests.attention.triton.support import small_call
from tests.features.cases import generator


@pytest.mark.parametrize("lengths", [[70, 1, 1, 68], *map(exhaustive, ([1] * 20, [64, 64, 12]))])
def test_streams(lengths):
    call = small_call(sum(lengths), batch=2, heads=2, key_heads=1)
    call.options["key_mask"] = random_mask(2, sum(lengths))
    whole, expected = call.run("reference", is_causal=True, return_state=True)
    out, state = stream(call, lengths, "triton")
    assert (out - whole).abs().max() < 5e-6
    sums = expected.key_sum * expected.log_scale.exp()
    assert (state.key_sum * state.log_scale.exp() / sums - 1).abs().max() < 1e-5
    values = expected.key_value * expected.log_scale.exp().unsqueeze(-1)
    ours = state.key_value * state.log_scale.exp().unsqueeze(-1)
    assert (ours - values).abs().max() < 1e-5 * values.abs().max()


@pytest.mark.parametrize(
    "options", [exhaustive({"heads": 6, "key_heads": 2}), {"heads": 2, "num_heads": 2}], ids=str
)
def test_single_steps(options):
    call = small_call(12, value_dim=20, **options)
    out, _ = stream(call, [1] * 12, "triton")
    assert (out - call.run("reference", is_causal=True)).abs().max() < 5e-6


@pytest.mark.parametrize(
    "name", ["data_aware", *map(exhaustive, ("hyperbolic", "optimal-simplex"))]
)
def test_single_steps_of_feature_maps(name):
    call = small_call(8, name=name)
    out, _ = stream(call, [1] * 8, "triton")
    assert (out - call.run("reference", is_causal=True)).abs().max() < 1e-5


def test_steps_of_half_precision():
    call = small_call(8, dtype=torch.bfloat16)
    out, _ = stream(call, [1] * 8, "triton")
    assert out.dtype == torch.bfloat16
    assert (out - call.run("reference", is_causal=True)).abs().max() < 3e-2


def test_states_of_other_backends():
    """Their scales are no integers of binary logarithms."""
    call = small_call(140)
    whole = call.run("reference", is_causal=True)
    first, second = ([x[:, :, rows] for x in call.inputs] for rows in (slice(70), slice(70, 140)))
    for a, b in (("reference", "triton"), ("triton", "reference")):
        options = {"is_causal": True, "return_state": True}
        _, state = favor_attention(*first, call.feature_map, backend=a, **options)
        out, _ = favor_attention(*second, call.feature_map, backend=b, state=state, **options)
        assert (out - whole[:, :, 70:]).abs().max() < 5e-6


def test_an_empty_past():
    call = small_call(70)
    call.options["key_mask"] = torch.zeros(1, 70, dtype=torch.bool)
    out, state = call.run("triton", is_causal=True, return_state=True)
    assert (out == 0).all()
    assert (state.log_scale == -math.inf).all()
    for length in (1, 70):
        later = small_call(length, "causal", seed=2)
        again = favor_attention(
            *later.inputs, call.feature_map, backend="triton", is_causal=True, state=state
        )
        plain = favor_attention(
            *later.inputs, call.feature_map, backend="reference", is_causal=True
        )
        assert (again - plain).abs().max() < 5e-6


def gradients(call, backend, lengths, weight, wanted):
    """Gradients of a weighted sum of outputs and of the last state."""
    leaves = call.leaves()
    out, state = stream(leaves, lengths, backend)
    # The state's own scale is arbitrary.
    level = (state.key_sum.detach() * state.log_scale.exp()).sum(-1, keepdim=True)
    sums = state.key_sum * state.log_scale.exp() / level
    values = state.key_value * (state.log_scale.exp() / level).unsqueeze(-1)
    total = (out * weight).sum() + (sums * wanted[..., 0]).sum() + (values * wanted).sum()
    return torch.autograd.grad(total, leaves.inputs)


@pytest.mark.parametrize("lengths", [[70, 30], exhaustive([40, 1, 64])])
def test_gradients_through_states(lengths):
    call = small_call(sum(lengths), heads=2, key_heads=1, seed=4)
    weight = torch.randn(1, 2, sum(lengths), 16, generator=generator(1))
    wanted = torch.randn(1, 1, 40, 16, generator=generator(2))
    ours = gradients(call, "triton", lengths, weight, wanted)
    exact = gradients(call, "torch", lengths, weight, wanted)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_a_step_with_gradients():
    call = small_call(21).leaves()
    out, _ = stream(call, [20, 1], "triton")
    got = torch.autograd.grad(out[..., 20, :].sum(), call.inputs)
    wanted = torch.autograd.grad(call.run("torch", is_causal=True)[..., 20, :].sum(), call.inputs)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() < 5e-6


def test_steps_that_see_nan():
    call = small_call(6, batch=2)
    call.value[0, 0, 3, 5] = math.inf
    call.query[1, 0, 2, 0] = math.nan
    out, _ = stream(call, [1] * 6, "triton")
    expected = call.run("reference", is_causal=True)
    assert torch.equal(out.isnan(), expected.isnan())


def test_scales_do_not_drift():
    call = small_call(3)
    _, state = call.run("triton", is_causal=True, return_state=True)
    small = [x * 5 for x in call.inputs]
    scale = state.log_scale
    for _ in range(3):
        _, state = favor_attention(
            *small, call.feature_map, backend="triton", is_causal=True, state=state,
            return_state=True,
        )  # fmt: skip
    kept = state.log_scale == scale
    assert kept.float().mean() > 0.5
