"""Features that change between a checkpointed forward pass and its backward pass."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from performers import (
    ListedKeys,
    PerformerAttention,
    SoftmaxFeatures,
    favor_attention,
    redraw_features_,
)
from performers.features import LearnedFeatures
from tests.attention.cases import BACKENDS, LINEAR, exhaustive
from tests.features.cases import generator

DIM, LENGTH = 8, 100
CHANGED = r"features changed .*between a checkpointed forward pass and its backward"


def leaf(seed=0):
    return torch.randn(1, 2, LENGTH, DIM, generator=generator(seed)).requires_grad_()


def features(estimator="data_aware"):
    built = SoftmaxFeatures(DIM, 16, estimator=estimator, generator=generator(1))
    return calibrate(built, seed=2)


def load(feature_map, listed_keys):
    other = SoftmaxFeatures(DIM, 16, estimator="data_aware")
    feature_map.load_state_dict(calibrate(other).state_dict())


def calibrate(feature_map, seed=4):
    return feature_map.calibrate_(leaf(seed).detach(), leaf(seed + 1).detach())


CHANGES = {
    "redraw": lambda f, b: redraw_features_(f),
    "calibrate": lambda f, b: calibrate(f),
    "reset": lambda f, b: (f.reset_parameters(), calibrate(f)),
    "load": load,
    "listed_keys": lambda f, b: b.calibrate_(leaf(4).detach()),
}


def attend(x, feature_map, listed_keys, backend=None, **options):
    return favor_attention(
        x, x, x, feature_map, listed_keys=listed_keys, backend=backend, **options
    )


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_before_the_recomputation(backend, change, use_reentrant):
    feature_map, listed_keys, x = features(), ListedKeys(DIM, 4, 8), leaf()

    def run(x):
        return attend(x, feature_map, listed_keys, backend)

    out = checkpoint(run, x, use_reentrant=use_reentrant)
    CHANGES[change](feature_map, listed_keys)
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()
    # The next pass is as good as any.
    checkpoint(run, x, use_reentrant=use_reentrant).sum().backward()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_autograd_keeps_the_old_features(backend, change):
    feature_map, listed_keys, x = features(), ListedKeys(DIM, 4, 8), leaf()
    expected = torch.autograd.grad(attend(x, feature_map, listed_keys, backend).square().sum(), x)[
        0
    ]
    loss = attend(x, feature_map, listed_keys, backend).square().sum()
    CHANGES[change](feature_map, listed_keys)
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_two_passes_with_a_change_in_between():
    """Both are told apart where each has left a graph."""
    feature_map, first, second = features("positive"), leaf(), leaf(1)

    def run(x):
        return attend(x, feature_map, None)

    early = checkpoint(run, first, use_reentrant=False)
    feature_map.redraw_()
    late = checkpoint(run, second, use_reentrant=False)
    late.sum().backward()
    with pytest.raises(RuntimeError, match=CHANGED):
        early.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_nested_checkpoints(use_reentrant):
    feature_map, x = features(), leaf()

    def run(x):
        return attend(checkpoint(inner, x, use_reentrant=use_reentrant), feature_map, None)

    def inner(x):
        return attend(x, feature_map, None, is_causal=True)

    expected = torch.autograd.grad(attend(inner(x), feature_map, None).square().sum(), x)[0]
    checkpoint(run, x, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    out = checkpoint(run, x, use_reentrant=use_reentrant)
    feature_map.redraw_()
    with pytest.raises(RuntimeError, match=CHANGED):
        out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_steps_of_training(use_reentrant):
    """Redraws between steps, evaluation in between, copies: none of it is in the way."""
    module = PerformerAttention(16, 2, batch_first=True)
    x = torch.randn(1, 9, 16, generator=generator(0)).requires_grad_()
    for _ in range(3):
        redraw_features_(module)
        out = checkpoint(lambda x: module(x, x, x)[0], x, use_reentrant=use_reentrant)
        with torch.no_grad():
            copy.deepcopy(module)(x, x, x)
        out.sum().backward()
        module(x, x, x)


def test_trained_projections_are_not_drawn():
    """An optimiser's step is torch's affair, as with every other layer."""
    learned, x = LearnedFeatures(features()), leaf()
    out = checkpoint(lambda x: attend(x, learned, None), x, use_reentrant=False)
    redraw_features_(learned)
    out.sum().backward()
    assert learned.weight.grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_features_and_the_kernel_themselves(use_reentrant):
    feature_map, x = features("positive"), leaf()
    for function in (feature_map, lambda x: feature_map.estimate_kernel(x, x)):
        checkpoint(function, x, use_reentrant=use_reentrant).sum().backward()
        out = checkpoint(function, x, use_reentrant=use_reentrant)
        feature_map.redraw_()
        with pytest.raises(RuntimeError, match=CHANGED):
            out.sum().backward()


@pytest.mark.parametrize("backend", [LINEAR[0], *map(exhaustive, LINEAR[1:])])
def test_compiled(backend):
    """A compiled pass keeps the old draw; a checkpoint inside it does too, or is an error."""
    feature_map, x = features("positive"), leaf()

    def run(x):
        return attend(x, feature_map, None, backend)

    expected = torch.autograd.grad(run(x).square().sum(), x)[0]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    loss = compiled(x).square().sum()
    feature_map.redraw_()
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
    torch.testing.assert_close(compiled(x), run(x))
