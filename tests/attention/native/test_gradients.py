"""Gradients that only some want, of results that only some use, and those there are none of."""

import pytest
import torch

from performers import favor_attention, use_backend
from tests.attention.cases import ALL, MODES, assert_close_gradients, make_call, random_mask
from tests.attention.native.support import NATIVE
from tests.features.cases import by_name, generator

pytestmark = NATIVE

NAMES = ("query", "key", "value")


@pytest.mark.parametrize("wanted", [("query",), ("key",), ("value",), ("query", "value")])
@pytest.mark.parametrize("mode", MODES)
def test_only_some_inputs_want_gradients(mode, wanted):
    call = make_call(by_name("positive"), 130, mode, seed=1)
    full = call.leaves()
    weight = torch.randn(full.run("native").shape, generator=generator(2))
    expected = dict(
        zip(NAMES, torch.autograd.grad(full.run("native"), full.inputs, weight), strict=True)
    )
    for name in wanted:
        getattr(call, name).requires_grad_()
    call.run("native").backward(weight)
    for name in NAMES:
        gradient = getattr(call, name).grad
        assert (gradient is None) == (name not in wanted)
        assert gradient is None or torch.equal(gradient, expected[name])


def states(call, past, use):
    """Losses of the same call on the kernels, and in float64 on the torch backend."""
    losses = []
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        ours = call.leaves(dtype)
        _, state = past.leaves(dtype).run(backend, return_state=True)
        state = state.detach()
        leaves = [*ours.inputs, state.key_value.requires_grad_(), state.key_sum.requires_grad_()]
        out, after = ours.run(backend, state=state, return_state=True)
        losses.append((use(out, after), leaves))
    return losses


USES = {
    "output": lambda out, after: out.square().sum(),
    "sum of keys": lambda out, after: after.key_sum.square().sum(),
    "sum of values": lambda out, after: after.key_value.square().sum(),
    "both sums": lambda out, after: (after.key_value.sum(-1) * after.key_sum).sum(),
    "everything": lambda out, after: (
        out.square().sum() + after.key_value.square().sum() + after.key_sum.sum()
    ),
}


@pytest.mark.parametrize("length", [1, 64, 100, 129])
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "relu"])
@pytest.mark.parametrize("use", USES)
def test_whatever_of_the_results_is_used(use, name, length):
    """Output and sums each alone: what was not used is None to the backward pass."""
    call, past = (
        make_call(by_name(name), n, "causal", heads=4, key_heads=2, num_features=20, seed=n)
        for n in (length, 40)
    )
    call.feature_map = past.feature_map
    if length > 1:
        call.options["key_mask"] = random_mask(2, length)
    (loss, leaves), (dense_loss, dense) = states(call, past, USES[use])
    torch.testing.assert_close(loss.double(), dense_loss, rtol=1e-4, atol=0)
    got, wanted = (
        torch.autograd.grad(x, y, allow_unused=True, materialize_grads=True)
        for x, y in ((loss, leaves), (dense_loss, dense))
    )
    for a, b in zip(got, wanted, strict=True):
        assert (a.double() - b).abs().max() <= 2e-4 * max(b.abs().max().item(), 1e-2)


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_is_used_twice(mode):
    call = make_call(by_name("positive"), 100, mode).leaves()
    out = call.run("native")
    once = torch.autograd.grad((out * out.exp()).sum(), call.inputs, retain_graph=True)
    parts = [torch.autograd.grad(out, call.inputs, w, retain_graph=True) for w in (out.exp(),)]
    parts.append(torch.autograd.grad(out, call.inputs, out * out.exp(), retain_graph=True))
    assert_close_gradients(once, tuple(a + b for a, b in zip(*parts, strict=True)))


@pytest.mark.parametrize("mode", MODES)
def test_no_second_derivative(mode):
    """An error that says what to do, not a gradient without the second term."""
    call = make_call(by_name("positive"), 20, mode).leaves()
    (gradient,) = torch.autograd.grad(call.run("native").sum(), call.key, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative.*backend"):
        gradient.square().sum().backward()
    with use_backend("torch"):
        (gradient,) = torch.autograd.grad(call.run().sum(), call.key, create_graph=True)
        gradient.square().sum().backward()
    assert call.key.grad.isfinite().all()


@pytest.mark.parametrize("name", ["positive", "bias", "hyperbolic", "relu"])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_a_redraw_before_the_backward_pass(mode, name):
    """Every tensor of the map may change in place: bias and projection of each head."""
    case = {case.name: case for case in ALL}[name]
    gradients = []
    for redraw in (False, True):
        call = make_call(case, 130, mode, num_heads=2, seed=3).leaves()
        out = call.run("native")
        if redraw:
            for buffer in call.feature_map.buffers():
                buffer.add_(1)
        gradients.append(torch.autograd.grad(out.square().sum(), call.inputs))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_changed_in_place_before_the_backward_pass_are_an_error(name):
    call = make_call(by_name("positive"), 20, "causal").leaves()
    copies = [x * 1 for x in call.inputs]
    out = favor_attention(*copies, call.feature_map, is_causal=True, backend="native")
    copies[NAMES.index(name)].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_gradients_only_under_grad_mode():
    call = make_call(by_name("positive"), 20, "causal").leaves()
    with torch.no_grad():
        assert not call.run("native").requires_grad
    with torch.inference_mode():
        out = call.run("native")
    assert torch.equal(out, call.run("native"))
