"""Attention mechanisms that a program adds by itself."""

import pytest
import torch
from torch import nn

from performers.models import PerformerConfig, PerformerForCausalLM, register_attention
from performers.models.registry import ATTENTIONS


class Before(nn.Module):
    """The mean of the values so far."""

    def forward(self, query, key, value, context, layer):
        counts = torch.arange(1, value.shape[2] + 1).unsqueeze(-1)
        return value.cumsum(2) / counts, None


@pytest.fixture
def registered():
    yield register_attention
    ATTENTIONS.pop("mean")


def small(**options):
    return PerformerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **options)


def test_a_registered_attention_is_built_and_generates(registered):
    registered("mean", lambda config, generator: Before())
    model = PerformerForCausalLM(small(attention="mean")).eval()
    assert isinstance(model.performer.layers[0].attention.mechanism, Before)
    ids = torch.tensor([[1, 5, 6]])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= 6
    with pytest.raises(ValueError, match="has no cache"):
        model(ids, use_cache=True)


def test_names_are_taken_once_and_reasons_are_told(registered):
    registered("mean", lambda config, generator: Before(), not_causal="it looks ahead")
    with pytest.raises(ValueError, match="'mean' is registered already"):
        registered("mean", lambda config, generator: Before())
    with pytest.raises(ValueError, match="has no causal form, because it looks ahead"):
        small(attention="mean", is_decoder=True)
