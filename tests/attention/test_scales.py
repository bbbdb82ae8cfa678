"""Inputs from nothing to a thousand: finite always, accurate as far as float32 allows."""

import pytest
import torch

from tests.attention.cases import ALL, BACKENDS, MODES, TESTED, check_against_oracle, make_call
from tests.features.cases import by_name

SCALES = (0.0, 1e-3, 1.0, 4.0, 30.0, 1000.0)


@pytest.mark.parametrize("input_scale", SCALES)
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_finite_forward_and_backward(backend, case, mode, input_scale):
    call = make_call(
        case, 130, mode, batch=1, heads=1, head_dim=64, num_features=96, input_scale=input_scale
    ).leaves()
    out = call.run(backend)
    assert torch.isfinite(out).all()
    gradients = torch.autograd.grad(out.square().sum(), call.inputs)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("input_scale", SCALES)
@pytest.mark.parametrize("name", ["positive", "exp", "relu", "trigonometric"])
def test_the_reference_is_finite_too(name, input_scale):
    for mode in MODES:
        call = make_call(
            by_name(name),
            40,
            mode,
            batch=1,
            head_dim=64,
            num_features=96,
            input_scale=input_scale,
        ).leaves()
        out = call.run("reference")
        assert torch.isfinite(out).all()
        gradients = torch.autograd.grad(out.square().sum(), call.inputs)
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("input_scale", [0.0, 1e-3, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accurate_to_scale_four(backend, mode, input_scale):
    call = make_call(
        by_name("positive"),
        200,
        mode,
        batch=1,
        head_dim=64,
        num_features=256,
        input_scale=input_scale,
        seed=1,
    )
    check_against_oracle(call, backend, value_tolerance=1e-4, gradients=False)


@pytest.mark.parametrize("input_scale", [1.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_to_scale_four(backend, mode, input_scale):
    """An exponent of 100 is known to 1e-5 in float32, and gradients inherit that."""
    call = make_call(
        by_name("positive"),
        130,
        mode,
        batch=1,
        head_dim=64,
        num_features=256,
        input_scale=input_scale,
        seed=2,
    )
    check_against_oracle(call, backend, value_tolerance=1e-4, gradient_tolerance=2e-4)


@pytest.mark.parametrize("input_scale", [1.0, 4.0, 30.0, 1000.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "regularized", "relu", "exp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_averages_at_any_scale(backend, name, mode, input_scale):
    """Values of one come out as one: no row loses its keys to underflow."""
    call = make_call(
        by_name(name),
        130,
        mode,
        batch=1,
        head_dim=64,
        num_features=96,
        input_scale=input_scale,
        seed=3,
    )
    call.value = torch.ones_like(call.value)
    torch.testing.assert_close(call.run(backend), torch.ones(1, 2, 130, 8), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["positive", "hyperbolic", "exp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_keys_long(backend, name):
    """Every key feature is tiny next to one: a constant added to the normaliser would win."""
    call = make_call(by_name(name), 130, "causal", batch=1, head_dim=16, seed=4)
    call.key = call.key * 6
    check_against_oracle(call, backend, value_tolerance=1e-4, gradient_tolerance=2e-4)
    call.options = {}
    check_against_oracle(call, backend, value_tolerance=1e-4, gradient_tolerance=2e-4)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", TESTED)
def test_keys_of_very_different_lengths(backend, mode):
    call = make_call(by_name("positive"), 200, mode, batch=1, head_dim=16, seed=5)
    call.key = call.key * torch.logspace(-3, 1, 200)[torch.randperm(200)][:, None]
    check_against_oracle(call, backend, value_tolerance=1e-4, gradient_tolerance=2e-4)


@pytest.mark.parametrize("value_scale", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_values_of_any_size(backend, mode, value_scale):
    call = make_call(by_name("positive"), 130, mode, seed=6)
    expected = call.run(backend)
    call.value = call.value * value_scale
    torch.testing.assert_close(call.run(backend) / value_scale, expected, rtol=1e-4, atol=1e-5)
