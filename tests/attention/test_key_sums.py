"""States from keys alone, and their merge."""

import pytest
import torch

from performers import favor_state, merge_states
from tests.attention.cases import PLAIN, STREAMED, Configuration, law, make_call
from tests.features.cases import by_name

KINDS = [by_name(name) for name in ("positive", "trigonometric", "relu")]


def made(case=KINDS[0], configuration=PLAIN, **options):
    return make_call(case, 150, "causal", configuration, dtype=torch.float64, **options)


def state_of(call, **options):
    options = {**call.options, **options}
    del options["is_causal"]
    return favor_state(call.key, call.value, call.feature_map, **options)


def continued(call, state):
    """Output of a causal call that goes on after a state."""
    query, key, value = (x[:, :, :20].detach().flip(-1) for x in call.inputs)
    return call.with_inputs(query, key, value).run(state=state, key_mask=None)


@law(configurations=[*STREAMED, Configuration("all in the window", 200, 3)], cases=KINDS)
def test_the_state_of_a_causal_call(case, configuration):
    call = made(case, configuration).leaves()
    _, expected = call.run(return_state=True)
    state = state_of(call)
    outs = [continued(call, x) for x in (state, expected)]
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), call.inputs[1:]) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    for name, tensor in expected._tensors().items():
        assert getattr(state, name).shape == tensor.shape
        assert getattr(state, name).dtype == tensor.dtype


def test_a_projection_for_each_query_head():
    call = made(heads=4, key_heads=2, num_heads=4)
    state, (_, expected) = state_of(call), call.run(return_state=True)
    torch.testing.assert_close(state.key_value, expected.key_value)
    torch.testing.assert_close(state.log_scale, expected.log_scale)


def test_a_key_that_is_not_finite():
    call = made()
    call.key[0, 1, 7] = torch.inf
    assert state_of(call).key_sum.isnan().any(-1).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_merging_is_associative_and_that_of_one_sequence(case):
    """Scales far apart, and a part without keys."""
    call = made(case)
    call.key = call.key * torch.linspace(0.1, 6, 150, dtype=torch.float64)[:, None]
    call = call.leaves()
    parts = zip(*(x.split([60, 0, 90], 2) for x in call.inputs), strict=True)
    a, b, c = (state_of(call.with_inputs(*part)) for part in parts)
    states = (merge_states(merge_states(a, b), c), merge_states(a, merge_states(b, c)))
    *outs, expected = (continued(call, state) for state in (*states, state_of(call)))
    (wanted,) = torch.autograd.grad(expected.square().sum(), call.key, retain_graph=True)
    for out in outs:
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
        (grad,) = torch.autograd.grad(out.square().sum(), call.key, retain_graph=True)
        assert (grad - wanted).abs().max() < 1e-11 * wanted.abs().max()


@pytest.mark.parametrize("options", [{"window": 3}, {"sinks": 1}])
def test_states_with_exact_keys_do_not_merge(options):
    call = made()
    state, other = state_of(call), state_of(call, **options)
    for pair, name in (((state, other), "later"), ((other, state), "earlier")):
        with pytest.raises(ValueError, match=f"{name} has {next(iter(options))}"):
            merge_states(*pair)


def test_states_of_other_shapes_do_not_merge():
    with pytest.raises(ValueError, match=r"later must have key_value of shape \(2, 2, 48, 8\)"):
        merge_states(state_of(made()), state_of(made(batch=1)))


def test_arguments_are_checked():
    key, value, features = made().key, made().value, made().feature_map
    with pytest.raises(ValueError, match="key_mask must be a bool tensor"):
        favor_state(key, value, features, key_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="value must have shape"):
        favor_state(key, value[:, :, 1:], features)
    with pytest.raises(ValueError, match="feature_map must be a FeatureMap"):
        favor_state(key, value, "positive")
