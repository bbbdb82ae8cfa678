"""Models and calls that linear attention cannot compute are refused: the reason and a remedy."""

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
    output,
    performer,
    small,
    token_ids,
    torch_model,
)


def snapshot(model):
    """What a conversion changes: modules, hooks, modes, tensors and configurations."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    configs = [x.config for x in model.modules() if hasattr(x, "config")]
    return (
        [(name, type(x), x.training) for name, x in model.named_modules()],
        [list(getattr(x, each)) for x in model.modules() for each in hooks],
        {name: id(x) for name, x in model.named_parameters()},
        list(model.state_dict()),
        [(x.to_dict(), x._attn_implementation) for x in configs],
    )


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
RELATIVE = {"position_embeddings_type": "relative"}
NOT_CALLED = "none of its modules calls"
# transformers 5.10 computes some biases beside the interface.
BIAS = f"position bias|{NOT_CALLED}"
OWN_MASK = "computes with its attention masks itself"
# Model, options of the conversion, words of the refusal.
CONVERSIONS = {
    # What other attention computes.
    "soft-capping": (lambda: small("Gemma2ForCausalLM"), {}, "soft-caps its scores"),
    "position bias": (lambda: small("T5ForConditionalGeneration"), {}, BIAS),
    "relative keys": (lambda: small("Wav2Vec2ConformerModel", **RELATIVE), {}, BIAS),
    "learned sinks": (lambda: small("GptOssForCausalLM"), {}, "learned sink logits"),
    "shared keys": (lambda: small("Gemma3nForCausalLM", **GEMMA3N), {}, "its keys and values"),
    "borrowed keys": (
        lambda: small("Gemma3nForCausalLM", **GEMMA3N),
        {"layers": [1]},
        "takes its keys and values from another layer",
    ),
    "deberta": (lambda: small("DebertaV2ForMaskedLM", relative_attention=True), {}, NOT_CALLED),
    "bloom": (lambda: small("BloomForCausalLM"), {}, NOT_CALLED),
    "xlnet": (lambda: small("XLNetLMHeadModel"), {}, NOT_CALLED),
    "relative positions": (
        lambda: small("BeitModel", use_relative_position_bias=True),
        {},
        OWN_MASK,
    ),
    "a mask that other parts add to scores": (lambda: small("GitModel"), {}, OWN_MASK),
    "windows of an image": (lambda: small("SwinModel", **SWIN), {}, "a mask of shape"),
    "a mask of its own": (lambda: small("LayoutLMModel"), {}, "a mask of shape"),
    "fewer keys than queries": (lambda: small("SegformerModel"), {}, "is no self-attention"),
    "a prefix that is not causal": (
        lambda: small("PaliGemmaForConditionalGeneration"),
        {},
        "GemmaModel computes something else|PaliGemma.* computes something else",
    ),
    "another implementation": (asking_for_the_implementation, {}, "computes something else"),
    "windows alone": (lambda: build("mistral", sliding_window=6), {}, "sliding window already"),
    "weights not in memory": (meta, {}, "no weights in memory"),
    "a part beside the interface": (mixed, {}, "BertLMHeadModel does not go through the attention"),
    # What would be lost, or is not there.
    "own forward": (lambda: beside(OwnForward(32, 4)), {}, "1 .*forward of its own"),
    "parametrized": (lambda: beside(parametrized()), {}, "1 .*parametrized weights"),
    "hooks": (lambda: beside(hooked()), {}, "1 .*hooks"),
    "bias_k": (
        lambda: beside(nn.MultiheadAttention(32, 4, add_bias_kv=True)),
        {"window": 3},
        "1: window and sinks .* add_bias_kv",
    ),
    "zero_attn": (
        lambda: beside(nn.MultiheadAttention(32, 4, add_zero_attn=True)),
        {"sinks": 3},
        "1: window and sinks .* add_zero_attn",
    ),
    "itself": (lambda: nn.MultiheadAttention(8, 2), {}, "replaced in place: pass the module that"),
    "nothing": (lambda: nn.Linear(2, 2), {}, "Linear has nothing to convert: it has no nn.Multi"),
    "a wrapper": (
        lambda: nn.Sequential(build("bert")),
        {},
        r"a Sequential around a BertForMaskedLM: .* model\[0\]",
    ),
    "cross-attention": (decoder_of_converted, {}, "cross_attention=True"),
    "converted": (lambda: converted(build("bert")), {}, "converted already"),
    "converted torch": (lambda: converted(torch_model()), {}, "is converted already"),
    "converted performer": (lambda: converted(performer()), {}, "linear attention already"),
    **{
        attention: (
            lambda attention=attention: performer(attention=attention),
            {},
            f"{words}.*start from a model with attention='exact'",
        )
        for attention, words in (
            ("favor-softmax", "linear attention already"),
            ("favor-relu", "linear attention already"),
            ("identity", "computes no attention"),
        )
    },
    # Arguments out of range.
    **{
        f"{family} {options}": (lambda family=family: build(family), options, words)
        for family in ("bert", "performer_masked", "torch_encoder")
        for options, words in (
            ({"window": -1}, "window must be"),
            ({"window": 2.5}, "window must be"),
            ({"sinks": -1}, "sinks must be"),
            ({"layers": []}, "at least one"),
            ({"layers": [2]}, r"layers must be in 0\.\.1.* got \[2\]"),
            ({"layers": [-3]}, r"layers must be in 0\.\.1"),
            ({"layers": ["0"]}, "layers must be"),
            ({"estimator": "sharp"}, "estimator must be one of"),
            ({"projection": "sharp"}, "projection"),
            ({"num_features": 0}, "num_features"),
            (
                {"num_features": 7, "estimator": "hyperbolic"},
                "num_features must be a positive even",
            ),
            ({"estimator": "data_aware"}, "pass calibration"),
        )
    },
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(name):
    make, options, words = CONVERSIONS[name]
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
LINEAR = "linear attention cannot do"
# Model, layers, arguments of the call, words of the refusal.
CALLS = {
    "a mask of one's own": ("llama", None, (ROWS, {"attention_mask": TRIANGLE}), r"\(2, 1, 20, 20"),
    "blocks": ("bert", None, (ROWS, {"attention_mask": BLOCKS}), "mask of shape"),
    "a band": (
        "torch_encoder",
        None,
        (torch.randn(2, 20, 32), {"mask": BAND}),
        "None or the causal",
    ),
    "boundaries": ("llama", None, (ROW, PACKED), "position_ids that tell where each begins"),
    "maps with a cache": (
        "llama",
        None,
        (ROW, {"output_attentions": True, "use_cache": True}),
        "use_cache=False",
    ),
    **{
        name: ("llama", None, (ROW, {name: torch.ones(1)}), LINEAR)
        for name in ("softcap", "s_aux", "sinks", "position_bias", "indices")
    },
    **{
        f"{name} in part": ("llama", [1], (ROW, {name: torch.ones(1)}), "not even in part")
        for name in ("s_aux", "sinks", "indices")
    },
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    model_name, layers, (x, options), words = CALLS[name]
    model = converted(build(model_name), num_features=16, layers=layers)
    expected = output(model, inputs(model_name))
    with pytest.raises(ValueError, match=words):
        model(x, **options)
    # Nothing of the failed call is left behind.
    assert torch.equal(output(model, inputs(model_name)), expected)


def test_exact_layers_take_any_mask():
    model = build("bert")
    linear = converted(model, num_features=16)
    linear.set_attn_implementation("sdpa")
    given = {**inputs("bert"), "attention_mask": BLOCKS}
    assert torch.equal(output(linear, given), output(model, given))


def test_boundaries_with_positions():
    positions = torch.arange(8).remainder(4)[None]
    model = converted(build("llama"), num_features=16)
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
