"""Averaged copies of a model whose features are redrawn."""

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from performers import PerformerAttention, redraw_features_


def averaged(use_buffers, ema):
    """A model after twenty steps with a redraw each, and its average."""
    torch.manual_seed(0)
    model = PerformerAttention(32, 4)
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None, use_buffers=use_buffers
    )
    for _ in range(20):
        redraw_features_(model)
        average.update_parameters(model)
    return model, average.module


def length(module):
    """Mean squared length of projection rows, over that of draws."""
    weight = module.feature_map.weight
    return weight.square().sum(-1).mean().item() / weight.shape[-1]


@pytest.mark.parametrize("ema", [False, True])
def test_averages_of_parameters_copy_the_projection(ema):
    model, average = averaged(False, ema)
    assert torch.equal(average.feature_map.weight, model.feature_map.weight)


@pytest.mark.parametrize("ema", [False, True])
def test_averages_of_buffers_need_a_fresh_draw(ema):
    _, average = averaged(True, ema)
    assert length(average) < 0.5
    redraw_features_(average)
    assert length(average) == pytest.approx(1, abs=0.2)
