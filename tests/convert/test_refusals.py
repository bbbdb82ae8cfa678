"""Models and calls that linear attention cannot compute are refused: the reason and a remedy."""

import functools

import pytest
import torch
import transformers
from torch import nn

from performers import PerformerAttention
from performers.convert import to_performer
from tests.convert.models import (
    CLOSE,
    build,
    converted,
    favors,
    inputs,
    linear,
    output,
    performer,
    sharpen,
    small,
    token_ids,
    torch_model,
)


def snapshot(model):
    """Parts that a conversion changes: modules, hooks, modes, tensors and configurations."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    configs = [x.config for x in model.modules() if hasattr(x, "config")]
    return (
        [(name, type(x), x.training) for name, x in model.named_modules()],
        [list(getattr(x, each)) for x in model.modules() for each in hooks],
        {name: id(x) for name, x in model.named_parameters()},
        list(model.state_dict()),
        [(_written(x.to_dict()), x._attn_implementation) for x in configs],
    )


def _written(config):
    """A configuration without the mark that transformers sets when an implementation changes."""
    return {
        name: _written(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name != "_attn_was_changed"
    }


def meta():
    with torch.device("meta"):
        return transformers.BertModel(transformers.BertConfig())


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def beside(attention):
    """A layer of torch's own, and one that is not."""
    return nn.ModuleList([nn.MultiheadAttention(32, 4), attention])


def extra_key(option):
    return nn.MultiheadAttention(32, 4, **{option: True})


def parametrized():
    return nn.utils.parametrizations.weight_norm(nn.MultiheadAttention(32, 4), "in_proj_weight")


def hooked():
    module = nn.MultiheadAttention(32, 4)
    module.register_forward_hook(lambda *args: None)
    return module


def decoder_of_converted():
    layer = nn.TransformerDecoderLayer(32, 4, dropout=0.0)
    layer.self_attn = PerformerAttention(32, 4)
    return layer


def asking_for_the_implementation():
    """Code that nothing but a comparison of outputs shows."""
    model = build("bert")

    class Scaled(transformers.models.bert.modeling_bert.BertSelfOutput):
        def forward(self, hidden_states, input_tensor):
            factor = 2.0 if model.config._attn_implementation == "favor" else 1.0
            return super().forward(factor * hidden_states, input_tensor)

    for layer in model.bert.encoder.layer:
        layer.attention.output.__class__ = Scaled
    return model


def mixed():
    """A part that does not go through the interface, and one with another implementation."""
    text = small("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    encoder = small("ViTModel")
    model = transformers.VisionEncoderDecoderModel(encoder=encoder, decoder=text)
    encoder.set_attn_implementation("eager")
    text._can_set_attn_implementation = lambda *args: False
    return model


GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]}
SWIN["window_size"] = 4
NOT_CALLED = "none of its modules calls"
# transformers 5.10 computes some biases beside the interface.
BIAS = f"position bias|{NOT_CALLED}"
OWN_MASK = "computes with its attention masks itself"
of = functools.partial(functools.partial, small)
EXACT = "start from a model with attention='exact'"
# Model, options of the conversion, words of the refusal.
CONVERSIONS = [
    # Attention that is not masked softmax over the same tokens.
    (of("Gemma2ForCausalLM"), {}, "soft-caps its scores"),
    (of("T5ForConditionalGeneration"), {}, BIAS),
    (of("Wav2Vec2ConformerModel", position_embeddings_type="relative"), {}, BIAS),
    (of("GptOssForCausalLM"), {}, "learned sink logits"),
    (of("Gemma3nForCausalLM", **GEMMA3N), {}, "its keys and values"),
    (of("Gemma3nForCausalLM", **GEMMA3N), {"layers": [1]}, "keys and values from another layer"),
    (of("DebertaV2ForMaskedLM", relative_attention=True), {}, NOT_CALLED),
    (of("BloomForCausalLM"), {}, NOT_CALLED),
    (of("XLNetLMHeadModel"), {}, NOT_CALLED),
    (of("BeitModel", use_relative_position_bias=True), {}, OWN_MASK),
    (of("GitModel"), {}, OWN_MASK),
    (of("SwinModel", **SWIN), {}, "a mask of shape"),
    (of("LayoutLMModel"), {}, "a mask of shape"),
    (of("SegformerModel"), {}, "is no self-attention"),
    (of("PaliGemmaForConditionalGeneration"), {}, "Gemma.* computes something else"),
    (asking_for_the_implementation, {}, "computes something else"),
    (lambda: build("mistral", sliding_window=6), {}, "sliding window already"),
    (meta, {}, "no weights in memory"),
    (mixed, {}, "BertLMHeadModel does not go through the attention"),
    # What would be lost, or is not there.
    (lambda: beside(OwnForward(32, 4)), {}, "1 .*forward of its own"),
    (lambda: beside(parametrized()), {}, "1 .*parametrized weights"),
    (lambda: beside(hooked()), {}, "1 .*hooks"),
    (lambda: beside(extra_key("add_bias_kv")), {"window": 3}, "1: window and .* add_bias_kv"),
    (lambda: beside(extra_key("add_zero_attn")), {"sinks": 3}, "1: window and .* add_zero_attn"),
    (lambda: nn.MultiheadAttention(8, 2), {}, "replaced in place: pass the module that"),
    (lambda: nn.Linear(2, 2), {}, "Linear has nothing to convert: it has no nn.Multi"),
    (lambda: nn.Sequential(build("bert")), {}, r"Sequential around a Bert.* model\[0\]"),
    (decoder_of_converted, {}, "cross_attention=True"),
    (lambda: converted(build("bert")), {}, "converted already"),
    (lambda: converted(torch_model()), {}, "is converted already"),
    (lambda: converted(performer()), {}, "linear attention already"),
    (lambda: performer(attention="favor-softmax"), {}, f"linear attention already.*{EXACT}"),
    (lambda: performer(attention="favor-relu"), {}, f"linear attention already.*{EXACT}"),
    (lambda: performer(attention="identity"), {}, f"computes no attention.*{EXACT}"),
    # Lists of keys, which only encoders can have.
    (lambda: build("gpt2"), {"listed_keys": 4}, "a decoder's running sums hold no lists"),
    (lambda: build("bart"), {"listed_keys": 4}, "a decoder's running sums hold no lists"),
    (performer, {"listed_keys": 4}, "listed_keys=4 is for encoders among transformers"),
    (torch_model, {"listed_keys": 4}, "listed_keys=4 is for encoders among transformers"),
]
ARGUMENTS = [
    ({"window": -1}, "window must be"),
    ({"window": 2.5}, "window must be"),
    ({"sinks": -1}, "sinks must be"),
    ({"layers": []}, "at least one"),
    ({"layers": [2]}, r"layers must be in 0\.\.1.* got \[2\]"),
    ({"layers": ["0"]}, "layers must be"),
    ({"estimator": "sharp"}, "estimator must be one of"),
    ({"projection": "sharp"}, "projection"),
    ({"num_features": 0}, "num_features"),
    ({"num_features": 7, "estimator": "hyperbolic"}, "num_features must be a positive even"),
    ({"estimator": "data_aware"}, "pass calibration"),
    ({"listed_keys": -1}, "listed_keys must be an integer of at least 0, got -1"),
    ({"listed_keys": 4, "estimator": "trigonometric"}, "needs positive features"),
]
CONVERSIONS += [(functools.partial(build, "bert"), *case) for case in ARGUMENTS]
# Layers are counted by each family.
CONVERSIONS += [(make, *case) for make in (performer, torch_model) for case in ARGUMENTS[3:5]]


@pytest.mark.parametrize(("make", "options", "words"), CONVERSIONS)
def test_conversions(make, options, words):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        to_performer(model, **options)
    assert snapshot(model) == before


def test_what_is_no_module():
    with pytest.raises(TypeError, match="model must be a torch module, got str"):
        to_performer("bert-base-uncased")


def test_what_is_left_out_need_not_be_convertible():
    model = beside(OwnForward(32, 4))
    to_performer(model, layers=[0])
    assert favors(model) == [model[0]]


ROW, ROWS = token_ids(1, 8), token_ids(2, 20)
BOUNDARIES = torch.tensor([0, 4, 8], dtype=torch.int32)
PACKED = {"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES}
TRIANGLE = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
BLOCKS = torch.block_diag(torch.ones(9, 9), torch.ones(11, 11)).bool().expand(2, 1, 20, 20)
BAND = (torch.arange(20)[:, None] - torch.arange(20)).abs() > 2
MAPS = {"output_attentions": True, "use_cache": True}
# Model, layers, arguments of the call, words of the refusal.
CALLS = [
    ("llama", None, ROWS, {"attention_mask": TRIANGLE}, r"\(2, 1, 20, 20"),
    ("bert", None, ROWS, {"attention_mask": BLOCKS}, "mask of shape"),
    ("torch_encoder", None, torch.ones(2, 20, 32), {"mask": BAND}, "None or the causal mask"),
    ("llama", None, ROW, PACKED, "position_ids that tell where each begins"),
    ("llama", None, ROW, MAPS, "use_cache=False"),
]
for each in ("softcap", "s_aux", "sinks", "position_bias", "indices"):
    CALLS.append(("llama", None, ROW, {each: torch.ones(1)}, "linear attention cannot do"))
for each in ("s_aux", "sinks", "indices"):
    CALLS.append(("llama", (1,), ROW, {each: torch.ones(1)}, "not even in part"))


@pytest.mark.parametrize(("name", "layers", "x", "options", "words"), CALLS)
def test_calls(name, layers, x, options, words):
    model = linear(name, num_features=16, layers=layers)
    expected = output(model, inputs(name))
    with pytest.raises(ValueError, match=words):
        model(x, **options)
    # Nothing of the failed call is left behind.
    assert torch.equal(output(model, inputs(name)), expected)


def test_exact_layers_keep_a_prefix_that_is_not_causal():
    """The part that becomes linear is tried by itself where no inputs suit the whole model."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes["intermediate_size"] = 48
    text = {"model_type": "gemma", "vocab_size": 60, "num_key_value_heads": 2, "head_dim": 8}
    vision = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}
    parts = {"text_config": text | sizes, "vision_config": vision | sizes}
    config = transformers.PaliGemmaConfig(**parts, image_token_index=59, projection_dim=32)
    model = sharpen(transformers.PaliGemmaForConditionalGeneration(config).eval())
    ids = torch.cat((torch.full((2, 16), 59), token_ids(2, 8).clamp_max(58)), 1)
    given = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    given["pixel_values"] = torch.randn(2, 3, 32, 32)
    names = [type(x).__name__ for x in model.modules()]
    order = [x for x in names if x in ("GemmaAttention", "SiglipAttention")]
    layers = [index for index, x in enumerate(order) if x == "SiglipAttention"]
    mixed = converted(model, window=64, layers=layers)
    assert len(favors(mixed)) == 2
    torch.testing.assert_close(output(mixed, given), output(model, given), **CLOSE)


def test_boundaries_with_positions():
    positions = torch.arange(8).remainder(4)[None]
    model = linear("llama", num_features=16)
    packed = output(model, {"input_ids": ROW}, position_ids=positions, use_cache=False, **PACKED)
    first = output(model, {"input_ids": ROW[:, :4]}, use_cache=False)
    torch.testing.assert_close(packed[:, :4], first, **CLOSE)


def test_dropout_that_comes_back_is_not_ignored():
    model = to_performer(build("llama"), num_features=16)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    with pytest.raises(ValueError, match=r"dropout of 0\.2"):
        model.train()(ROW)


def test_a_model_that_was_never_converted():
    model = build("bert")
    model.set_attn_implementation("favor")
    with pytest.raises(ValueError, match=r"to_performer\(model\), which adds them"):
        model(**inputs("bert"))
