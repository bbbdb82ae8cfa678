"""What linear attention cannot do is refused with a sentence that names it."""

import copy

import pytest
import torch
import transformers

from performers.convert import to_performer
from performers.convert.interface.implementation import intercept_attention
from tests.convert.architectures import (
    GROUPED,
    PIXELS,
    TEXT,
    VOCABULARY,
    build,
    converted,
    inputs,
    output,
    sharpen,
    token_ids,
)

T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 48}
GPT_OSS = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6}
GEMMA3N = {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
UNSUITABLE = {
    "soft-capping": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**GROUPED, "head_dim": 8},
        "soft-caps its scores",
    ),
    "position bias": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "num_layers": 2},
        # Older releases of transformers compute it beside the interface.
        "position bias|none of its modules calls",
    ),
    "learned sinks": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**GROUPED, **GPT_OSS},
        "learned sink logits",
    ),
    "shared keys": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        GROUPED | GEMMA3N,
        "its keys and values",
    ),
    "deberta": (
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {**TEXT, **RELATIVE},
        "none of its modules calls",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
        "none of its modules calls",
    ),
    "xlnet": (
        "XLNetLMHeadModel",
        "XLNetConfig",
        {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": VOCABULARY},
        "none of its modules calls",
    ),
}


def untouched(model, implementation):
    """Whether a model is as it was before a conversion that failed."""
    return (
        not any(hasattr(x, "favor") or x._forward_pre_hooks for x in model.modules())
        and getattr(model.config, "performers", None) is None
        and model.config._attn_implementation == implementation
    )


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_attention_that_is_not_masked_softmax(kind):
    model_class, config_class, options, sentence = UNSUITABLE[kind]
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**options))
    implementation = model.config._attn_implementation
    with pytest.raises(ValueError, match=sentence):
        to_performer(model)
    assert untouched(model, implementation)


def test_a_layer_that_borrows_its_keys():
    config = transformers.Gemma3nTextConfig(**(GROUPED | GEMMA3N))
    model = transformers.Gemma3nForCausalLM(config)
    with pytest.raises(ValueError, match="takes its keys and values from another layer"):
        to_performer(model, layers=[1])


def test_masks_of_the_users_own():
    given = inputs("llama")
    mask = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    model = build("llama")
    with pytest.raises(ValueError, match=r"mask of shape \(2, 1, 20, 20\)"):
        output(converted(model, num_features=16), given, attention_mask=mask)
    bert = build("bert")
    block = torch.block_diag(torch.ones(9, 9), torch.ones(11, 11)).bool().expand(2, 1, 20, 20)
    linear = converted(bert, num_features=16)
    with pytest.raises(ValueError, match="mask of shape"):
        output(linear, inputs("bert"), attention_mask=block)
    # Exact layers take any mask.
    linear.set_attn_implementation("sdpa")
    expected = output(bert, inputs("bert"), attention_mask=block)
    assert torch.equal(output(linear, inputs("bert"), attention_mask=block), expected)


def prefix_model(**options):
    config = transformers.PaliGemmaConfig(
        text_config={"model_type": "gemma", **GROUPED, "head_dim": 8},
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
        image_token_index=59,
        projection_dim=32,
    )
    ids = token_ids(2, 24).clamp_max(58)
    ids[:, :16] = 59
    generator = torch.Generator().manual_seed(0)
    given = {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "token_type_ids": torch.zeros_like(ids),
    }
    return sharpen(transformers.PaliGemmaForConditionalGeneration(config)), given


def test_a_prefix_that_is_not_causal():
    """transformers lets such a model attend to both sides where it gets no mask."""
    model, _ = prefix_model()
    with pytest.raises(ValueError, match="GemmaModel computes something else"):
        converted(model, num_features=16)


def test_exact_layers_keep_their_prefix():
    model, given = prefix_model()
    names = [n for n, x in model.named_modules() if type(x).__name__ == "SiglipAttention"]
    everything = [n for n, _ in _attention(model)]
    vision = [everything.index(name) for name in names]
    assert len(vision) == 2
    linear = converted(model, window=64, layers=vision)
    expected = output(model, given)
    torch.testing.assert_close(output(linear, given), expected, atol=1e-5, rtol=1e-5)


def _attention(model):
    from performers.convert.interface.implementation import interface_modules

    return list(interface_modules(model))


def test_weights_that_are_not_in_memory():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    with pytest.raises(ValueError, match="no weights in memory"):
        to_performer(model)
    assert untouched(model, "sdpa")


def test_a_part_that_does_not_go_through_the_interface(monkeypatch):
    """The whole model is refused, and every part keeps the attention that it had."""
    text = transformers.BertConfig(**TEXT, is_decoder=True, add_cross_attention=True)
    encoder = transformers.ViTModel(transformers.ViTConfig(**PIXELS))
    decoder = transformers.BertLMHeadModel(text)
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    encoder.set_attn_implementation("eager")
    before = [x.config._attn_implementation for x in (model, encoder, decoder)]
    assert len(set(before)) > 1
    monkeypatch.setattr(type(decoder), "_can_set_attn_implementation", lambda *args: False)
    with pytest.raises(ValueError, match="BertLMHeadModel does not go through the attention"):
        to_performer(model)
    assert [x.config._attn_implementation for x in (model, encoder, decoder)] == before
    assert untouched(model, before[0])


def test_dropout_that_comes_back_is_not_ignored():
    model = build("llama", attention_dropout=0.2)
    with pytest.warns(UserWarning, match="dropout"):
        to_performer(model, num_features=16)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    with pytest.raises(ValueError, match=r"dropout of 0\.2"):
        model.train()(token_ids(1, 8))


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "position_bias", "indices"])
def test_options_of_the_interface_that_change_attention(name):
    model = build("llama")
    linear = converted(model, num_features=16)
    with pytest.raises(ValueError, match="linear attention cannot do"):
        linear(token_ids(1, 8), **{name: torch.ones(1)})
    if name in ("s_aux", "sinks", "indices"):
        half = converted(model, num_features=16, layers=[1])
        with pytest.raises(ValueError, match="not even in part"):
            half(token_ids(1, 8), **{name: torch.ones(1)})


def test_boundaries_without_positions():
    model = converted(build("llama"), num_features=16)
    boundaries = torch.tensor([0, 4, 8], dtype=torch.int32)
    with pytest.raises(ValueError, match="position_ids that tell where each begins"):
        model(token_ids(1, 8), cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    model(
        token_ids(1, 8),
        position_ids=positions,
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        use_cache=False,
    )


def test_a_model_that_was_never_converted():
    from performers.convert.interface import implementation as interface

    model = build("bert")
    model.set_attn_implementation(interface.IMPLEMENTATION)
    with pytest.raises(ValueError, match=r"to_performer\(model\), which adds them"):
        model(**inputs("bert"))


def test_converting_twice():
    model = converted(build("bert"), num_features=16)
    with pytest.raises(ValueError, match="converted already"):
        to_performer(model)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window": -1}, "window must be"),
        ({"window": 2.5}, "window must be"),
        ({"sinks": -1}, "sinks must be"),
        ({"layers": []}, "at least one"),
        ({"layers": [2]}, r"layers must be in 0\.\.1"),
        ({"layers": [-3]}, r"layers must be in 0\.\.1"),
        ({"layers": ["0"]}, "layers must be"),
        ({"estimator": "sharp"}, "estimator"),
        ({"projection": "sharp"}, "projection"),
        ({"num_features": 0}, "num_features"),
        ({"estimator": "data_aware"}, "pass calibration"),
    ],
)
def test_arguments_out_of_range(options, sentence):
    model = build("bert")
    with pytest.raises(ValueError, match=sentence):
        to_performer(model, **options)
    assert untouched(model, "sdpa")
    assert output(model, inputs("bert")).isfinite().all()


def test_what_is_no_module():
    with pytest.raises(TypeError, match="model must be a torch module"):
        to_performer("bert-base-uncased")


def test_an_unused_calibration_is_said_to_be_unused():
    with pytest.warns(UserWarning, match="nothing to fit"):
        to_performer(build("bert"), calibration=[inputs("bert")])


def test_interception_refuses_a_cache():
    model = converted(build("llama"), num_features=16)
    module = model.model.layers[0].self_attn
    calls = {module: lambda call: call.query}
    with (
        intercept_attention(calls, model),
        pytest.raises(ValueError, match="pass use_cache=False"),
    ):
        model(token_ids(1, 8))
    before = copy.deepcopy(output(model, inputs("llama")))
    assert torch.equal(output(model, inputs("llama")), before)
