"""Models are tried before they are converted; what cannot be computed is refused then."""

import copy

import pytest
import torch
import transformers

from performers.convert import to_performer
from performers.convert.families.trial import try_model
from tests.convert.architectures import ARCHITECTURES, PIXELS, SIZES, TEXT, build, inputs, output

AUDIO = {**SIZES, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
REFUSED = {
    "relative positions": (
        "BeitModel",
        "BeitConfig",
        {**PIXELS, "use_relative_position_bias": True},
        "computes with its attention masks itself",
    ),
    "a mask that other parts add to scores": (
        "GitModel",
        "GitConfig",
        {**TEXT, "vision_config": PIXELS},
        "computes with its attention masks itself",
    ),
    "windows of an image": (
        "SwinModel",
        "SwinConfig",
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [2],
            "num_heads": [2],
            "window_size": 4,
        },
        "a mask of shape",
    ),
    "relative keys": (
        "Wav2Vec2ConformerModel",
        "Wav2Vec2ConformerConfig",
        {**AUDIO, "position_embeddings_type": "relative"},
        # Older releases of transformers compute it beside the interface.
        r"a position bias|none of its modules calls",
    ),
    "a mask of its own": ("LayoutLMModel", "LayoutLMConfig", TEXT, "a mask of shape"),
    "fewer keys than queries": (
        "SegformerModel",
        "SegformerConfig",
        {
            "num_encoder_blocks": 1,
            "depths": [1],
            "hidden_sizes": [16],
            "num_attention_heads": [2],
            "sr_ratios": [2],
            "patch_sizes": [3],
            "strides": [2],
            "mlp_ratios": [2],
        },
        "is no self-attention",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_changes(name):
    model_name, config_name, options, reason = REFUSED[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**options)
    model = getattr(transformers, model_name)(config).eval()
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=reason):
        to_performer(model, num_features=16, window=3)
    assert model.config.to_dict() == before
    assert not any("favor" in key for key in model.state_dict())


def test_a_model_that_the_interface_changes_is_refused():
    """Code that asks for the attention implementation, which nothing but a comparison shows."""
    model = build("bert")

    class Scaled(transformers.models.bert.modeling_bert.BertSelfOutput):
        def forward(self, hidden_states, input_tensor):
            factor = 2.0 if model.config._attn_implementation == "favor" else 1.0
            return super().forward(factor * hidden_states, input_tensor)

    for layer in model.bert.encoder.layer:
        layer.attention.output.__class__ = Scaled
    with pytest.raises(ValueError, match="computes something else"):
        to_performer(model, num_features=16)


def test_the_trial_leaves_no_trace():
    """Neither on the model nor on the caller's random numbers."""
    model = build("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    given, state = inputs("llama"), torch.get_rng_state()
    expected = output(copy.deepcopy(model).eval(), given)
    from performers.convert.families.transformers_models import attention_modules

    try_model(model, attention_modules(model))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output(model.eval(), given), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_made_up_inputs_suit_every_architecture(name, monkeypatch):
    from performers.convert.families import trial as probing
    from performers.convert.families.transformers_models import attention_modules

    model = build(name)
    parts = [part for part in attention_modules(model) if part.window() is None]
    called = set()
    monkeypatch.setattr(probing, "_check_heads", lambda part, call: called.add(part.name))
    try_model(model, parts)
    assert called == {part.name for part in parts}
