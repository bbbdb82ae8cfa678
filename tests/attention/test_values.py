"""Values and gradients of every backend against the dense oracle and the reference."""

import pytest
import torch

from tests.attention.cases import (
    ALL,
    BACKENDS,
    FEW,
    GRADIENT_TOLERANCE,
    MODES,
    TESTED,
    VALUE_TOLERANCE,
    WIDE,
    assert_close_gradients,
    assert_close_rows,
    check_against_oracle,
    make_call,
    random_mask,
    upstream,
)
from tests.features.cases import by_name

LENGTHS = (1, 2, 63, 64, 65, 127, 129, 200)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map(backend, case, mode):
    check_against_oracle(make_call(case, 129, mode), backend)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_awkward_lengths(backend, case, mode, length):
    check_against_oracle(make_call(case, length, mode, seed=length), backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_a_thousand_tokens(backend, case, mode):
    check_against_oracle(make_call(case, 1000, mode, batch=1, seed=1), backend)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["positive", "relu"])
@pytest.mark.parametrize("backend", TESTED)
def test_more_than_one_block(backend, name, mode):
    """Long enough, with enough features, that no backend can hold all features at once."""
    call = make_call(
        by_name(name), 600, mode, batch=1, heads=4, num_features=1024, head_dim=8, seed=2
    )
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_against_the_reference(backend, case, mode):
    """The whole of what a call can ask for at once, values and gradients."""
    call = make_call(case, 200, mode, heads=4, key_heads=2, num_heads=2, seed=3, scale=0.4)
    call.options["key_mask"] = random_mask(2, call.key.shape[2], seed=3)
    ours, reference = call.leaves(), call.leaves(torch.float64)
    _, conditioning = call.expected()
    out, expected = ours.run(backend), reference.run("reference")
    assert_close_rows(out.detach(), expected.detach(), conditioning, VALUE_TOLERANCE)
    weighting = upstream(expected, conditioning)
    assert_close_gradients(
        torch.autograd.grad(out, ours.inputs, weighting.to(out.dtype)),
        torch.autograd.grad(expected, reference.inputs, weighting),
        GRADIENT_TOLERANCE,
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", WIDE)
def test_float64(backend, case, mode):
    call = make_call(case, 70, mode, dtype=torch.float64, seed=4)
    assert call.run(backend).dtype == torch.float64
    check_against_oracle(call, backend, value_tolerance=1e-10, gradient_tolerance=1e-10)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend, case, mode, scale):
    """Four at head_dim 16 is sixteen times the default."""
    call = make_call(case, 70, mode, head_dim=16, input_scale=0.7, seed=5, scale=scale)
    check_against_oracle(call, backend, value_tolerance=1e-4 if scale > 1 else VALUE_TOLERANCE)


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_zero_is_the_mean(backend, case):
    call = make_call(case, 10, head_dim=8, scale=0.0)
    if case.name in ("identity", "tanh", "gelu"):
        # phi(0) = epsilon still: the kernel is a constant like any other.
        assert call.case.epsilon > 0
    expected = call.value.mean(-2, keepdim=True).expand_as(call.value)
    assert_close_rows(call.run(backend), expected, 1.0, 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_default_scale_is_that_of_the_head_dimension(backend, mode):
    call = make_call(by_name("positive"), 20, mode, head_dim=9, heads=4)
    torch.testing.assert_close(call.run(backend), call.run(backend, scale=1 / 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_agree_to_the_bit(backend, case, mode):
    results = []
    for _ in range(2):
        call = make_call(case, 150, mode, seed=6).leaves()
        out = call.run(backend)
        results.append((out, *torch.autograd.grad(out.square().sum(), call.inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", WIDE)
def test_gradcheck(backend, case, mode):
    call = make_call(
        case,
        4,
        mode,
        batch=1,
        heads=2,
        key_heads=1,
        head_dim=3,
        value_dim=2,
        num_features=4,
        dtype=torch.float64,
        seed=7,
    ).leaves()
    call.options["key_mask"] = torch.arange(call.key.shape[2])[None] != 1

    def run(query, key, value):
        call.query, call.key, call.value = query, key, value
        return call.run(backend)

    assert torch.autograd.gradcheck(run, call.inputs, fast_mode=True)


@pytest.mark.parametrize("backend", WIDE)
def test_gradcheck_across_a_chunk_boundary(backend):
    call = make_call(
        by_name("positive"),
        67,
        "causal",
        batch=1,
        heads=1,
        head_dim=2,
        value_dim=1,
        num_features=4,
        dtype=torch.float64,
        seed=8,
    ).leaves()

    def run(query, key, value):
        call.query, call.key, call.value = query, key, value
        return call.run(backend)

    assert torch.autograd.gradcheck(run, call.inputs, fast_mode=True)
