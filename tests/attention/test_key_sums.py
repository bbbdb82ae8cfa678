"""States from keys alone, and their merge."""

from itertools import product

import pytest
import torch

import performers

LENGTH = 150


def make(features="softmax", *, num_heads=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    if features == "relu":
        return performers.GeneralizedFeatures(8, 24, generator=generator).to(dtype)
    return performers.SoftmaxFeatures(
        8, 24, estimator=features, num_heads=num_heads, generator=generator
    ).to(dtype)


def keys(*, heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 2, heads, LENGTH, 8, generator=generator, dtype=dtype).unbind(0)


def continue_from(state, features, **options):
    """Output and gradients of a causal call that goes on after a state."""
    generator = torch.Generator().manual_seed(2)
    heads = state.key_value.shape[1]
    query, key, value = torch.randn(3, 2, heads, 20, 8, generator=generator, dtype=torch.float64)
    return performers.favor_attention(
        query, key, value, features, is_causal=True, state=state, **options
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "window", "sinks"),
    [
        *product(("positive", "trigonometric", "relu"), (None,), (0,)),
        *product(("positive", "trigonometric"), (5, 200), (0, 3)),
        ("positive", None, 3),
    ],
)
def test_the_state_of_a_causal_call(kind, window, sinks, masked):
    features, (key, value) = make(kind, dtype=torch.float64), keys()
    key.requires_grad_()
    value.requires_grad_()
    mask = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(3)) < 0.6
    exact = {"window": window, "sinks": sinks}
    options = {**exact, "key_mask": mask if masked else None}
    _, expected = performers.favor_attention(
        torch.zeros_like(key), key, value, features, is_causal=True, return_state=True, **options
    )
    state = performers.favor_state(key, value, features, **options)
    outs = [continue_from(x, features, **exact) for x in (state, expected)]
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(out.square().sum(), (key, value)) for out in outs]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    for name, tensor in expected._tensors().items():
        assert getattr(state, name).shape == tensor.shape
        assert getattr(state, name).dtype == tensor.dtype


def test_a_projection_for_each_query_head():
    features, (key, value) = make("positive", num_heads=4, dtype=torch.float64), keys()
    state = performers.favor_state(key, value, features)
    query = torch.zeros(2, 4, LENGTH, 8, dtype=torch.float64)
    _, expected = performers.favor_attention(
        query, key, value, features, is_causal=True, return_state=True
    )
    torch.testing.assert_close(state.key_value, expected.key_value)
    torch.testing.assert_close(state.log_scale, expected.log_scale)


def test_a_key_that_is_not_finite():
    features, (key, value) = make("positive", dtype=torch.float64), keys()
    key[0, 1, 7] = torch.inf
    state = performers.favor_state(key, value, features)
    assert state.key_sum.isnan().any(-1).tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize("kind", ["positive", "trigonometric", "relu"])
def test_merging_is_associative_and_that_of_one_sequence(kind):
    features, (key, value) = make(kind, dtype=torch.float64), keys()
    # Scales far apart, and a part without keys.
    key = (key * torch.linspace(0.1, 6, LENGTH, dtype=torch.float64)[:, None]).requires_grad_()
    parts = [
        performers.favor_state(k, v, features)
        for k, v in zip(key.split([60, 0, 90], 2), value.split([60, 0, 90], 2), strict=True)
    ]
    a, b, c = parts
    merge = performers.merge_states
    whole = performers.favor_state(key, value, features)
    states = (merge(merge(a, b), c), merge(a, merge(b, c)), whole)
    outs = [continue_from(state, features) for state in states]
    grads = [torch.autograd.grad(x.square().sum(), key, retain_graph=True)[0] for x in outs]
    for out, grad in zip(outs[:2], grads[:2], strict=True):
        torch.testing.assert_close(out, outs[2], rtol=1e-10, atol=1e-12)
        assert (grad - grads[2]).abs().max() < 1e-11 * grads[2].abs().max()


@pytest.mark.parametrize("options", [{"window": 3}, {"sinks": 1}])
def test_states_with_exact_keys_do_not_merge(options):
    features, (key, value) = make("positive", dtype=torch.float64), keys()
    state = performers.favor_state(key, value, features)
    other = performers.favor_state(key, value, features, **options)
    for pair, name in (((state, other), "later"), ((other, state), "earlier")):
        with pytest.raises(ValueError, match=f"{name} has {next(iter(options))}"):
            performers.merge_states(*pair)


def test_states_of_other_shapes_do_not_merge():
    features, (key, value) = make("positive", dtype=torch.float64), keys()
    state = performers.favor_state(key, value, features)
    with pytest.raises(ValueError, match=r"later must have key_value of shape \(2, 2, 24, 8\)"):
        performers.merge_states(state, performers.favor_state(key[:1], value[:1], features))


def test_arguments_are_checked():
    features, (key, value) = make("positive", dtype=torch.float64), keys()
    with pytest.raises(ValueError, match="key_mask must be a bool tensor"):
        performers.favor_state(key, value, features, key_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="value must have shape"):
        performers.favor_state(key, value[:, :, 1:], features)
    with pytest.raises(ValueError, match="feature_map must be a FeatureMap"):
        performers.favor_state(key, value, "positive")
