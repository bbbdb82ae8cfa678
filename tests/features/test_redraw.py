"""Redrawing on a step count: a function of the seed and the step, and of nothing else."""

import copy

import pytest
import torch
from torch import nn

from performers import PerformerAttention, SoftmaxFeatures, redraw_features_
from performers.features import FeatureRedrawer
from tests.features.cases import generator


def model(seed=0):
    return nn.ModuleList(
        [SoftmaxFeatures(8, generator=generator(seed + i)) for i in range(2)]
        + [nn.Linear(4, 4), nn.Sequential(PerformerAttention(16, 2))]
    )


def weights(module):
    return {
        name: x.clone()
        for name, x in module.state_dict().items()
        if "feature_map" in name or (name[1:] == ".weight" and name[0] in "01")
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def all_differ(first, second):
    return not any(torch.equal(first[name], second[name]) for name in first)


def test_redraw_features_reaches_every_map_and_nothing_else():
    module = model()
    before, linear = weights(module), module[2].weight.clone()
    assert len(before) == 3
    assert redraw_features_(module, generator(7)) == 3
    after = weights(module)
    assert all_differ(before, after)
    assert not torch.equal(after["0.weight"], after["1.weight"])
    assert torch.equal(module[2].weight, linear)
    again = model(50)
    redraw_features_(again, generator(7))
    assert same(after, weights(again))


def test_redraw_features_without_a_generator_uses_the_default_one():
    module = model()
    torch.manual_seed(3)
    redraw_features_(module)
    first = weights(module)
    redraw_features_(module)
    assert all_differ(first, weights(module))
    torch.manual_seed(3)
    redraw_features_(module)
    assert same(first, weights(module))


def test_redraws_are_due_by_step_count():
    module = model()
    redrawer = FeatureRedrawer(module, 3, seed=1)
    before = weights(module)
    history = []
    for _ in range(10):
        drawn = redrawer.step()
        after = weights(module)
        assert all_differ(before, after) if drawn else same(before, after)
        history.append(drawn)
        before = after
    assert history == [False, False, True] * 3 + [False]


def test_interval_zero_never_redraws():
    module = model()
    redrawer = FeatureRedrawer(module, 0)
    before = weights(module)
    assert not any(redrawer.step() for _ in range(20))
    assert same(before, weights(module))


def test_never_in_eval():
    module = model()
    redrawer = FeatureRedrawer(module, 1)
    before = weights(module)
    module.eval()
    assert not any(redrawer.step() for _ in range(3))
    assert same(before, weights(module))
    module.train()
    assert redrawer.step()
    assert redrawer.steps == 4


def test_a_resumed_run_draws_the_same():
    straight, resumed = model(), model()
    redrawer = FeatureRedrawer(straight, 4, seed=9)
    for _ in range(17):
        redrawer.step()
    first = FeatureRedrawer(resumed, 4, seed=9)
    for _ in range(6):
        first.step()
    state, parameters = copy.deepcopy(first.state_dict()), copy.deepcopy(resumed.state_dict())
    fresh = model(90)
    fresh.load_state_dict(parameters)
    second = FeatureRedrawer(fresh, 4, seed=9)
    second.load_state_dict(state)
    torch.rand(100)
    for _ in range(11):
        second.step()
    assert same(weights(straight), weights(fresh))


def test_the_callers_step_count_is_used():
    counted, told = model(), model()
    first, second = FeatureRedrawer(counted, 5), FeatureRedrawer(told, 5)
    for _ in range(10):
        first.step()
    assert second.step(10)
    assert second.steps == 10
    assert same(weights(counted), weights(told))


def test_processes_agree_whatever_their_data_and_global_randomness():
    first, second = model(), copy.deepcopy(model())
    redrawers = [FeatureRedrawer(m, 2, seed=4) for m in (first, second)]
    for step in range(1, 7):
        for rank, (module, redrawer) in enumerate(zip((first, second), redrawers, strict=True)):
            torch.manual_seed(1000 * rank + step)
            x = torch.randn(5 + rank, 2, 16) * 10**rank
            module[3][0](x, x, x)[0].sum().backward()
            redrawer.step()
    assert same(weights(first), weights(second))


def test_redrawing_leaves_the_global_stream_alone():
    redrawer = FeatureRedrawer(model(), 1)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    redrawer.step()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1])
def test_seeds_and_steps_give_different_projections(seed):
    module, other = model(), model()
    first, second = FeatureRedrawer(module, 1, seed=seed), FeatureRedrawer(other, 1, seed=seed + 1)
    first.step()
    second.step()
    at_one = weights(module)
    assert all_differ(at_one, weights(other))
    first.step()
    assert all_differ(at_one, weights(module))


def test_negative_interval():
    with pytest.raises(ValueError, match=r"interval must be >= 0.*got -1"):
        FeatureRedrawer(model(), -1)


def test_forward_draws_nothing(monkeypatch):
    """Neither a forward nor a backward pass may factorise a matrix or consume randomness."""
    module = PerformerAttention(16, 2, batch_first=True)
    x = torch.randn(2, 9, 16, requires_grad=True)

    def refuse(*args, **kwargs):
        raise AssertionError("a forward pass drew a projection")

    monkeypatch.setattr(torch.linalg, "qr", refuse)
    before = torch.get_rng_state()
    for training in (True, False):
        module.train(training)
        module(x, x, x, is_causal=True)[0].sum().backward()
        module(x, x, x)[0].sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(AssertionError):
        redraw_features_(module)
