"""Inputs from nothing to a thousand: finite always, accurate as far as float32 allows."""

import pytest
import torch

from tests.attention.cases import (
    BOTH,
    LINEAR,
    PLAIN,
    POSITIVE,
    WINDOW,
    Configuration,
    check_against_oracle,
    law,
    make_call,
    with_gradients,
)

SCALES = (0.0, 1e-3, 1.0, 4.0, 30.0, 1000.0)
SIZES = {"batch": 1, "head_dim": 64, "num_features": 96}
TERMS = [PLAIN, BOTH, WINDOW, Configuration("one sink", sinks=1)]


@pytest.mark.parametrize("input_scale", SCALES)
@law()
def test_finite_averages_and_finite_gradients(
    backend, case, configuration, mode, input_scale, device
):
    """Values of one come out as one: no row that sees a key loses its keys to underflow."""
    options = {**SIZES, "input_scale": input_scale, "device": device, "seed": 3}
    call = make_call(case, 130, mode, configuration, **options)
    assert all(torch.isfinite(x).all() for x in with_gradients(call, backend))
    if case.signed:
        return
    call.value = torch.ones_like(call.value)
    out = call.run(backend)
    seen = out != 0 if "key_mask" in call.options else torch.ones_like(out, dtype=torch.bool)
    assert seen.double().mean() > 0.5
    torch.testing.assert_close(out[seen], torch.ones_like(out)[seen], rtol=0, atol=1e-5)


@pytest.mark.parametrize("input_scale", [0.0, 1e-3, 1.0, 2.0, 4.0])
@law(configurations=TERMS)
def test_accurate_to_scale_four(backend, configuration, mode, input_scale):
    """An exponent of 100 is known to 1e-5 in float32, and gradients inherit that.

    Near keys outweigh far ones by powers of e: nothing may be taken from a sum again.
    """
    sizes = {"batch": 1, "head_dim": 64, "num_features": 256, "input_scale": input_scale}
    call = make_call(POSITIVE, 200, mode, configuration, seed=1, **sizes)
    check_against_oracle(call, backend, value_tolerance=1e-4, gradient_tolerance=2e-4)


def keys_long(call):
    """Every key feature is tiny next to one: a constant added to the normaliser would win."""
    call.key = call.key * 6


def keys_of_very_different_lengths(call):
    call.key = call.key * torch.logspace(-3, 1, call.key.shape[2])[
        torch.randperm(call.key.shape[2])
    ].unsqueeze(-1)


def near_keys_heavy(call):
    """Weights of near and far keys e^30 apart; every tenth key is long."""
    size = call.key.shape[2]
    long = (torch.arange(size) % 10 == 0)[:, None]
    call.key = torch.where(long, 6 * call.query[:, :, :size], call.key)


def far_keys_heavy(call):
    long = (torch.arange(call.key.shape[2]) % 10 == 0)[:, None]
    call.query = call.query.abs() * 3
    call.key = torch.where(long, call.key.abs() * 4, -call.key.abs() * 2)


def a_sink_that_outweighs_everything(call):
    """Most of the attention on the first key, as in pretrained decoders, and tiny values there."""
    direction = call.key[:, :, :1] / call.key[:, :, :1].norm(dim=-1, keepdim=True)
    call.query = call.query + 3 * direction
    call.key[:, :, :1] = 24 * direction
    call.value[:, :, :1] *= 1e-3


def a_sink_that_weighs_nothing(call):
    """Its weight underflows next to the others': what is met through features must remain."""
    call.query, call.key = call.query.abs(), call.key.abs()
    call.key[:, :, :1] *= -40


SKEWS = [
    keys_long,
    keys_of_very_different_lengths,
    near_keys_heavy,
    far_keys_heavy,
    a_sink_that_outweighs_everything,
    a_sink_that_weighs_nothing,
]


@pytest.mark.parametrize("skew", SKEWS, ids=lambda f: f.__name__)
@law(configurations=TERMS)
def test_one_side_far_larger_than_the_other(backend, configuration, mode, skew):
    call = make_call(POSITIVE, 150, mode, configuration, batch=1, heads=1, seed=2)
    skew(call)
    tolerances = {"value_tolerance": 1e-4, "gradient_tolerance": 2e-4}
    check_against_oracle(call, backend, gradients=skew is keys_long, **tolerances)


@pytest.mark.parametrize("value_scale", [1e-30, 1e-6, 1e6, 1e30])
@law(backends=LINEAR)
def test_values_of_any_size(backend, configuration, mode, value_scale):
    call = make_call(POSITIVE, 130, mode, configuration, seed=6)
    expected = call.run(backend)
    call.value = call.value * value_scale
    torch.testing.assert_close(call.run(backend) / value_scale, expected, rtol=1e-4, atol=1e-5)
