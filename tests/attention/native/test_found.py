"""Defects that were found once in the kernels or around them."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from performers import FavorState, GeneralizedFeatures, SoftmaxFeatures, favor_attention
from performers.features import FeatureForm
from tests.attention.cases import MODES, make_call
from tests.attention.native.support import NATIVE
from tests.features.cases import by_name

pytestmark = NATIVE


def test_forward_mode_derivatives_are_not_dropped():
    call = make_call(by_name("positive"), 9)
    tangents = {}
    for backend in (None, "torch"):
        with forward_ad.dual_level():
            query = forward_ad.make_dual(call.query, torch.ones_like(call.query))
            out = favor_attention(query, call.key, call.value, call.feature_map, backend=backend)
            tangents[backend] = forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangents[None], tangents["torch"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("field", ["key_value", "key_sum", "log_scale"])
def test_a_state_that_does_not_fit_is_refused(field):
    call = make_call(by_name("positive"), 5, "causal")
    _, state = call.run("native", return_state=True)
    setattr(state, field, getattr(state, field)[..., :1])
    if field == "key_value":
        state.key_value = state.key_value[:, :1]
    with pytest.raises(ValueError, match=f"state must have {field}"):
        call.run("native", state=state)


class _SharedBias(SoftmaxFeatures):
    """A projection for each head, one bias for all."""

    def form(self) -> FeatureForm:
        return super().form()._replace(bias=torch.linspace(-1, 1, self.num_features)[None])


@pytest.mark.parametrize("length", [1, 40])
def test_one_bias_for_all_heads(length):
    call = make_call(by_name("positive"), length, "causal", heads=3)
    call.feature_map = _SharedBias(16, 24, num_heads=3)
    torch.testing.assert_close(call.run("native"), call.run("reference"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("mode", MODES)
def test_a_large_epsilon_hides_no_slope(mode, epsilon):
    call = make_call(by_name("relu"), 70, mode)
    call.feature_map = GeneralizedFeatures(16, 24, epsilon=epsilon)
    call = call.leaves()
    weight = torch.randn((*call.value.shape[:2], 70, 8))
    got, wanted = (
        torch.autograd.grad(call.run(backend), call.inputs, weight)
        for backend in ("native", "reference")
    )
    for ours, theirs in zip(got, wanted, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * max(theirs.abs().max(), 1 / epsilon)


@pytest.mark.parametrize("length", [5, 20, 64])
@pytest.mark.parametrize("size", [1e10, 3e38])
def test_a_key_whose_norm_overflows_touches_no_earlier_row(length, size):
    call = make_call(by_name("positive"), length, "causal").leaves()
    key = call.key.detach().clone()
    key[:, :, -1] = size
    out = favor_attention(call.query, key, call.value, call.feature_map, is_causal=True)
    earlier = call.run("native")[:, :, :-1]
    torch.testing.assert_close(out[:, :, :-1], earlier, rtol=0, atol=2e-6)
    gradients = torch.autograd.grad(out[:, :, :-1].sum(), (call.query, call.value))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_an_absent_feature_does_not_set_the_scale():
    """A state in which one feature has seen nothing, and the others only tiny features."""
    call = make_call(by_name("positive"), 1, "causal", batch=1, heads=1, num_features=8)
    call.key = call.key * 0 + 40
    state = FavorState(
        torch.randn(1, 1, 8, 8).where(torch.arange(8)[:, None] > 0, 0.0),
        torch.ones(1, 1, 8).where(torch.arange(8) > 0, 0.0),
        torch.full((1, 1, 8), -200.0).where(torch.arange(8) > 0, -torch.inf),
    )
    mask = torch.zeros(1, 1, dtype=torch.bool)
    got, wanted = (
        call.run(backend, state=state, key_mask=mask) for backend in ("native", "reference")
    )
    assert wanted.abs().max() > 0.01
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_state_wants_gradients_only_if_something_in_it_does():
    call = make_call(by_name("positive"), 5, "causal")
    query = call.query.clone().requires_grad_()
    out, state = favor_attention(
        query, call.key, call.value, call.feature_map, is_causal=True, return_state=True
    )
    assert out.requires_grad
    assert not state.key_value.requires_grad
    assert not state.key_sum.requires_grad


def test_no_projection_under_another_default_device():
    features = GeneralizedFeatures(8, fn="relu", projection=None)
    query = torch.randn(1, 2, 6, 8)
    wanted = favor_attention(query, query, query, features)
    torch.set_default_device("meta")
    try:
        got = favor_attention(query, query, query, features)
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_checkpointing_changes_nothing(mode):
    call = make_call(by_name("positive"), 70, mode).leaves()

    def attend(query, key, value):
        return favor_attention(query, key, value, call.feature_map, **call.options)

    plain = torch.autograd.grad(attend(*call.inputs).square().sum(), call.inputs)
    again = checkpoint(attend, *call.inputs, use_reentrant=False)
    kept = torch.autograd.grad(again.square().sum(), call.inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, kept, strict=True))
