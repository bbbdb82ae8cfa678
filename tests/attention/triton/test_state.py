"""Streams: chunks, single steps, other backends' states, and gradients through states."""

import math

import pytest
import torch

from tests.attention.cases import exhaustive, random_mask, stream
from tests.attention.triton.support import TOLERANCE, small_call
from tests.attention.triton.test_values import EXACT, FORM
from tests.features.cases import generator

RELU, EXP = ({**FORM, "name": name} for name in ("relu", "exp"))
WINDOW = {**EXACT, "window": 9, "sinks": 3}


def sums(state):
    """Sums over keys at the scale one."""
    scale = state.log_scale.exp()
    return state.key_value * scale.unsqueeze(-1), state.key_sum * scale


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([70, 1, 1, 68], {}),
        *(exhaustive(x, {}) for x in ([1] * 20, [64, 64, 12])),
        ([70, 1, 1, 6], RELU),
        exhaustive([70, 1, 1, 6], EXP),
        ([70, 1, 1, 28], WINDOW),
        *(exhaustive(x, WINDOW) for x in ([5] * 4, [30, 70])),
    ],
    ids=str,
)
def test_streams(lengths, options):
    call = small_call(sum(lengths), batch=2, heads=2, key_heads=1, **options)
    call.options["key_mask"] = random_mask(2, sum(lengths))
    whole, expected = call.run("reference", is_causal=True, return_state=True)
    out, state = stream(call, lengths, "triton")
    assert (out - whole).abs().max() < TOLERANCE
    for ours, theirs in zip(sums(state), sums(expected), strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert options != RELU or (state.log_scale == 0).all()


@pytest.mark.parametrize(
    "options", [exhaustive({"heads": 6, "key_heads": 2}), {"heads": 2, "num_heads": 2}], ids=str
)
def test_single_steps(options):
    call = small_call(12, value_dim=20, **options)
    out, _ = stream(call, [1] * 12, "triton")
    assert (out - call.run("reference", is_causal=True)).abs().max() < TOLERANCE


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


@pytest.mark.parametrize("options", [{}, RELU, exhaustive(EXP)], ids=str)
def test_states_of_other_backends(options):
    """Their scales are no integers of binary logarithms."""
    call = small_call(140, **options)
    whole = call.run("reference", is_causal=True)
    halves = zip(*(x.split(70, dim=-2) for x in call.inputs), strict=True)
    first, second = (call.with_inputs(*half) for half in halves)
    for a, b in (("reference", "triton"), ("triton", "reference")):
        _, state = first.run(a, is_causal=True, return_state=True)
        out = second.run(b, is_causal=True, state=state)
        assert (out - whole[:, :, 70:]).abs().max() < TOLERANCE


def test_an_empty_past():
    call = small_call(70)
    nothing = {"key_mask": torch.zeros(1, 70, dtype=torch.bool), "is_causal": True}
    out, state = call.run("triton", return_state=True, **nothing)
    assert (out == 0).all()
    assert (state.log_scale == -math.inf).all()
    for length in (1, 70):
        later = call.with_inputs(*small_call(length, seed=2).inputs)
        again = later.run("triton", is_causal=True, state=state)
        assert (again - later.run("reference", is_causal=True)).abs().max() < TOLERANCE


def gradients(call, backend, lengths):
    """Gradients of a weighted sum of outputs and of the last state."""
    leaves = call.leaves()
    out, state = stream(leaves, lengths, backend)
    key_value, key_sum = sums(state)
    # The state's own scale is arbitrary.
    level = key_sum.detach().sum(-1, keepdim=True)
    wanted = torch.randn(key_value.shape, generator=generator(2))
    total = (out * torch.randn(out.shape, generator=generator(1))).sum()
    total = total + (key_sum / level * wanted[..., 0]).sum()
    total = total + (key_value / level.unsqueeze(-1) * wanted).sum()
    return torch.autograd.grad(total, leaves.inputs)


@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ([70, 30], {}),
        exhaustive([40, 1, 64], {}),
        ([70, 10], RELU),
        exhaustive([60, 40], WINDOW),
    ],
    ids=str,
)
def test_gradients_through_states(lengths, options):
    call = small_call(sum(lengths), heads=2, key_heads=1, seed=4, **options)
    ours, exact = (gradients(call, backend, lengths) for backend in ("triton", "torch"))
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


def test_a_step_with_gradients():
    call = small_call(21).leaves()
    out, _ = stream(call, [20, 1], "triton")
    got = torch.autograd.grad(out[..., 20, :].sum(), call.inputs)
    wanted = torch.autograd.grad(call.run("torch", is_causal=True)[..., 20, :].sum(), call.inputs)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() < TOLERANCE


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
    large, scale = call.with_inputs(*(x * 5 for x in call.inputs)), state.log_scale
    for _ in range(3):
        _, state = large.run("triton", is_causal=True, state=state, return_state=True)
    kept = state.log_scale == scale
    assert kept.float().mean() > 0.5
