"""No change of a later token, of any size, moves an earlier output or its gradient."""

import pytest
import torch

from tests.attention.cases import (
    BACKENDS,
    PACKED,
    POSITIVE,
    SELF,
    STREAMED,
    assert_close_rows,
    law,
    make_call,
    stream,
)

LENGTH = 140
# Both ends of chunks and of stretches of lists, inside and beyond a window.
POSITIONS = (1, 63, 64, 66, 100, 139)
FACTORS = (1e4, 250.0, 1e-3, 0.0)


def assert_unmoved(before, after, conditioning=1.0):
    """The same rows to rounding: within 2e-6, times what the conditioning makes of it."""
    assert_close_rows(after, before.cpu(), conditioning, 2e-6)


def changed(call, where, factor, names=("query", "key", "value")):
    """The same call with queries, keys and values multiplied by ``factor`` at some positions."""
    where = where[:, None].to(call.query.device)
    inputs = (
        torch.where(where, x * factor, x) if name in names else x
        for name, x in zip(("query", "key", "value"), call.inputs, strict=True)
    )
    return call.with_inputs(*inputs)


def later(position):
    return torch.arange(LENGTH) >= position


@pytest.mark.parametrize("which", ["all", "query", "key", "value"])
@pytest.mark.parametrize("position", POSITIONS)
@law()
def test_later_tokens_do_not_matter(backend, case, configuration, position, which, device):
    """All of them changed, or one tensor of one of them."""
    call = make_call(case, LENGTH, "causal", configuration, seed=position, device=device)
    before, (_, conditioning) = call.run(backend), call.expected()
    rows = slice(0, position)
    where = later(position) if which == "all" else torch.arange(LENGTH) == position
    names = ("query", "key", "value") if which == "all" else (which,)
    for factor in FACTORS:
        after = changed(call, where, factor, names).run(backend)
        assert torch.isfinite(after).all()
        assert_unmoved(before[..., rows, :], after[..., rows, :], conditioning[..., rows, :])


@pytest.mark.parametrize("factor", [1.0, 250.0, 1e4])
@pytest.mark.parametrize("position", POSITIONS)
@law()
def test_gradients_of_earlier_outputs_stop_at_later_tokens(
    backend, case, configuration, position, factor, device
):
    call = make_call(case, LENGTH, "causal", configuration, seed=position, device=device)
    call = changed(call, later(position), factor).leaves()
    call.run(backend)[..., :position, :].square().sum().backward()
    for x in call.inputs:
        assert (x.grad[..., position:, :] == 0).all()
        assert torch.isfinite(x.grad).all()
    assert configuration.masked or (call.value.grad[..., :position, :] != 0).any()


@law(configurations=PACKED, modes=SELF)
def test_packed_sequences_do_not_see_each_other(backend, case, configuration, mode, device):
    """A window that reaches over a boundary, and sinks, belong to one sequence."""
    call = make_call(case, LENGTH, mode, configuration, device=device)
    before, (_, conditioning) = call.run(backend), call.expected()
    for start, stop in ((4, 40), (65, 128)):
        rows, others = slice(start, stop), (torch.arange(LENGTH) < start) | later(stop)
        for factor in FACTORS[:2]:
            after = changed(call, others, factor).run(backend)
            assert_unmoved(before[..., rows, :], after[..., rows, :], conditioning[..., rows, :])
        leaves = call.leaves()
        leaves.run(backend)[..., rows, :].square().sum().backward()
        for x in leaves.inputs:
            assert (x.grad[..., others, :] == 0).all()
        assert (leaves.value.grad[..., rows, :] != 0).any()


@law(configurations=STREAMED)
def test_a_stream_is_as_causal_as_one_call(backend, case, configuration):
    """The past is all that a state carries."""
    call = make_call(case, LENGTH, "causal", configuration)
    before, (_, conditioning) = stream(call, [70, 70], backend)[0], call.expected()
    for factor in FACTORS[::2]:
        after, _ = stream(changed(call, later(100), factor), [70, 70], backend)
        assert_unmoved(before[..., :100, :], after[..., :100, :], conditioning[..., :100, :])


@pytest.mark.parametrize("length", [5, 20, 64])
@pytest.mark.parametrize("size", [1e10, 3e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_whose_norm_overflows_touches_no_earlier_row(backend, length, size):
    call = make_call(POSITIVE, length, "causal").leaves()
    key = call.key.detach().clone()
    key[:, :, -1] = size
    out = call.with_inputs(call.query, key, call.value).run(backend)[:, :, :-1]
    torch.testing.assert_close(out, call.run(backend)[:, :, :-1], rtol=1e-6, atol=2e-6)
    gradients = torch.autograd.grad(out.sum(), (call.query, call.value))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
