"""Initial weights: set by the seed, at their scales."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from performers import SoftmaxFeatures
from performers.models import PerformerForCausalLM, PerformerForMaskedLM
from tests.models.cases import make_config


@pytest.mark.parametrize(
    ("model_class", "automatic"),
    [
        (PerformerForMaskedLM, AutoModelForMaskedLM),
        (PerformerForCausalLM, AutoModelForCausalLM),
    ],
)
def test_the_seed_sets_the_weights_and_features(model_class, automatic):
    config = make_config()

    def build(make, seed):
        torch.manual_seed(seed)
        model = make(config)
        assert type(model) is model_class
        return model

    for make in (model_class, automatic.from_config):
        first, same, other = (build(make, seed).state_dict() for seed in (3, 3, 4))
        drawn = [name for name in first if name.endswith("feature_map.weight")]
        assert len(drawn) == 2
        for name, tensor in first.items():
            assert torch.equal(tensor, same[name]), name
        for name in (*drawn, "lm_head.weight"):
            assert not torch.equal(first[name], other[name]), name


def test_initial_weights_have_their_scales():
    torch.manual_seed(0)
    config = make_config(hidden_size=128, initializer_range=0.1, num_hidden_layers=8)
    model = PerformerForMaskedLM(config)
    layer = model.performer.layers[3]
    for weight, expected in (
        (model.performer.embeddings.weight[1:], 0.1),
        (layer.attention.query_key_value.weight, 0.1),
        (layer.mlp_input.weight, 0.1),
        (layer.attention.output.weight, 0.1 / 4),
        (layer.mlp_output.weight, 0.1 / 4),
    ):
        assert abs(weight.std() / expected - 1) < 0.05
    assert (model.performer.embeddings.weight[0] == 0).all()
    reference = SoftmaxFeatures(config.head_dim, 4096)
    drawn = layer.attention.mechanism.feature_map.weight
    assert abs(drawn.norm(dim=-1).mean() / reference.weight.norm(dim=-1).mean() - 1) < 0.1
