"""Torch's own Transformer layers, made linear in place."""

import copy
import warnings

import pytest
import torch
from torch import nn

from performers import PerformerAttention, favor_attention, redraw_features_
from performers.convert import to_performer
from performers.convert.options import Conversion
from tests.convert.torch_models import (
    CLOSE,
    EXACT,
    HEADS,
    PADDING,
    E,
    L,
    N,
    Wrapped,
    convert,
    encoder,
    inputs,
)
from tests.features.cases import generator
from tests.features.maps import QuadratureFeatures


class NoError(Conversion):
    """Features of heads of width 2 that are exact, so that no window is needed."""

    def features(self, head_dim, num_heads, generator=None):
        assert head_dim == 2
        return QuadratureFeatures()


CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
AFTER = torch.ones(L, L, dtype=torch.bool).triu(1)


def both(model, settings=EXACT):
    """A model, and a converted copy."""
    converted = copy.deepcopy(model)
    convert(converted, settings)
    return model, converted


MASKS = {
    "none": {},
    "bool padding": {"src_key_padding_mask": PADDING},
    "float padding": {"src_key_padding_mask": torch.zeros(N, L).masked_fill(PADDING, -torch.inf)},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal unannounced": {"mask": CAUSAL},
    "bool causal": {"mask": AFTER, "is_causal": True},
    "causal and padding": {
        "mask": AFTER,
        "is_causal": True,
        "src_key_padding_mask": PADDING,
    },
}


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"norm_first": True}, {"activation": "gelu"}], ids=str
)
def test_a_window_over_everything_reproduces_an_encoder(options, mask, mode):
    exact, ours = both(encoder(**options))
    assert len([m for m in ours.modules() if isinstance(m, PerformerAttention)]) == 2
    x = inputs()
    if not options.get("batch_first", True):
        x = x.transpose(0, 1)
    results = []
    for model in (exact, ours):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "eval without gradients"):
            out = model(x, **MASKS[mask])
        out = out if options.get("batch_first", True) else out.transpose(0, 1)
        results.append(out[~PADDING] if "padding" in mask else out)
    torch.testing.assert_close(results[1], results[0], **CLOSE)


@torch.no_grad()
def test_nested_tensors_are_made_for_layers_that_are_exact_only():
    exact, ours = both(encoder().eval())
    assert exact.use_nested_tensor
    assert not ours.use_nested_tensor
    x = inputs()
    # Zeros at padding show that torch took its fused path in one and not in the other.
    assert (exact(x, src_key_padding_mask=PADDING)[PADDING] == 0).all()
    assert (ours(x, src_key_padding_mask=PADDING)[PADDING] != 0).all()
    hybrid = encoder(3).eval()
    convert(hybrid, Conversion(num_features=8, window=L, layers=(1,)))
    torch.testing.assert_close(
        hybrid(x, src_key_padding_mask=PADDING)[~PADDING],
        encoder(3).eval()(x, src_key_padding_mask=PADDING)[~PADDING],
        **CLOSE,
    )


@torch.no_grad()
def test_evaluation_runs_features_and_no_fused_layer():
    _, ours = both(encoder(1).eval(), Conversion(num_features=8))
    layer, x = ours.layers[0], inputs()
    attention = layer.self_attn
    attended = attention(x, x, x)[0]
    query, key, value = (
        y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for y in nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(
            3, dim=-1
        )
    )
    by_hand = favor_attention(query, key, value, attention.feature_map)
    by_hand = attention.out_proj(by_hand.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attended, by_hand, **CLOSE)
    middle = layer.norm1(x + by_hand)
    expected = layer.norm2(middle + layer.linear2(layer.linear1(middle).relu()))
    torch.testing.assert_close(ours(x), expected, **CLOSE)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("cross_attention", [False, True])
def test_a_decoder(cross_attention, norm_first):
    torch.manual_seed(3)
    layer = nn.TransformerDecoderLayer(
        E, E // 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    exact = nn.TransformerDecoder(layer, 2).eval()
    ours = copy.deepcopy(exact)
    # Attention to the memory has no window to be exact with.
    settings = NoError(window=L, sinks=2, cross_attention=cross_attention)
    names = convert(ours, settings)
    kinds = ("self_attn", "multihead_attn") if cross_attention else ("self_attn",)
    assert names == [f"layers.{i}.{kind}" for i in range(2) for kind in kinds]
    assert type(ours.layers[0].multihead_attn) is (
        PerformerAttention if cross_attention else nn.MultiheadAttention
    )
    if cross_attention:
        cross = ours.layers[0].multihead_attn
        assert (cross.window, cross.sinks) == (None, 0)
        assert (ours.layers[0].self_attn.window, ours.layers[0].self_attn.sinks) == (L, 2)
    options = {
        "tgt_mask": CAUSAL,
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(20).expand(N, -1) >= 17,
    }
    target, memory = inputs(), inputs(N, 20, E, seed=4)
    out, expected = ours(target, memory, **options), exact(target, memory, **options)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 if cross_attention else 1e-5)
    assert (out != expected).any()


def test_a_whole_transformer():
    torch.manual_seed(5)
    exact = nn.Transformer(E, HEADS, 1, 2, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(exact)
    assert convert(ours) == [
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.1.self_attn",
    ]
    source, target = inputs(N, 9, E), inputs()
    options = {"tgt_mask": CAUSAL, "src_key_padding_mask": torch.arange(9).expand(N, -1) >= 7}
    torch.testing.assert_close(
        ours(source, target, **options), exact(source, target, **options), **CLOSE
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 10, "vdim": 6}, {"vdim": 6}],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_inside_a_module(masked, options):
    exact, ours = both(Wrapped(**options))
    assert type(ours.attention) is PerformerAttention
    shape = (N, L) if options.get("batch_first") else (L, N)
    key = inputs(*shape, options.get("kdim", E), seed=6)
    value = inputs(*shape, options.get("vdim", E), seed=7)
    arguments = {"key_padding_mask": PADDING, "attn_mask": AFTER} if masked else {}
    call = (inputs(*shape, E), key, value)
    out, weights = ours(*call, need_weights=True, **arguments)
    expected, expected_weights = exact(*call, need_weights=True, **arguments)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(weights, expected_weights, **CLOSE)


def test_inputs_without_a_batch():
    exact, ours = both(Wrapped())
    x = inputs(L, E)
    torch.testing.assert_close(ours(x)[0], exact(x)[0], **CLOSE)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_without_a_position(option):
    """Exact terms have none for them; features alone do."""
    model = nn.ModuleList([Wrapped(), Wrapped(**{option: True})])
    before = [m.attention for m in model]
    with pytest.raises(ValueError, match=f"1.attention: window and sinks .* {option}"):
        convert(model)
    assert [m.attention for m in model] == before
    exact, ours = both(Wrapped(E // 2, **{option: True}), NoError())
    x = inputs(L, N, E)
    torch.testing.assert_close(ours(x)[0], exact(x)[0], rtol=0, atol=1e-4)
    if option == "add_bias_kv":
        assert torch.equal(ours.attention.bias_k, exact.attention.bias_k)


@pytest.mark.parametrize("kind", [{}, {"kdim": 10, "vdim": 6}, {"bias": False}], ids=str)
def test_parameters_are_the_same_objects(kind):
    model = Wrapped(**kind)
    before = dict(model.named_parameters())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    convert(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
    converted = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(converted[name], tensor)
    assert {name for name in converted if name not in state} == {"attention.feature_map.weight"}


def test_gradients_reach_the_original_parameters():
    model = encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, Conversion(num_features=16, window=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(inputs())[:, :, 0].square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter != before[name]).any(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_mode_and_frozen_weights_stay(dtype):
    model = encoder().to(dtype).eval()
    model.layers[1].self_attn.requires_grad_(False).train()
    convert(model)
    first, second = (layer.self_attn for layer in model.layers)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(m.training for m in first.modules())
    assert second.training
    assert not second.out_proj.weight.requires_grad
    assert first.out_proj.weight.requires_grad
    features = torch.promote_types(dtype, torch.float32)
    assert first.feature_map.weight.dtype == features
    assert model(inputs().to(dtype)).dtype == dtype


def test_models_without_memory_can_be_converted():
    with torch.device("meta"):
        model = Wrapped()
    convert(model)
    assert {x.device.type for x in model.state_dict().values()} == {"meta"}
    assert model(torch.empty(L, N, E, device="meta"))[0].shape == (L, N, E)


def test_a_state_dict_goes_into_another_converted_model():
    settings = Conversion(num_features=16, window=2, sinks=1, estimator="data_aware")
    first, second = encoder(seed=0).eval(), encoder(seed=1).eval()
    convert(first, settings, [inputs()])
    convert(second, settings, [inputs(seed=9)], 7)
    x = inputs()
    assert (first(x) - second(x)).abs().max() > 1e-2
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_layers_left_out_stay_exact():
    for layers, kept in (((0, 2), [1]), ((-1,), [0, 1]), ((1, 1), [0, 2])):
        model = encoder(3)
        names = convert(model, Conversion(num_features=8, layers=layers))
        exact = [i for i in range(3) if type(model.layers[i].self_attn) is nn.MultiheadAttention]
        assert exact == kept
        assert names == [f"layers.{i}.self_attn" for i in range(3) if i not in kept]
    with pytest.raises(ValueError, match=r"layers must be in 0..2.* got \[3\]"):
        convert(encoder(3), Conversion(layers=(0, 3)))


def test_a_module_in_several_places_is_replaced_in_all():
    model = nn.Module()
    model.first = nn.MultiheadAttention(E, HEADS, batch_first=True)
    model.again = model.first
    model.rest = nn.ModuleDict({"a": nn.ModuleList([model.first, nn.Linear(2, 2)])})
    assert convert(model) == ["first"]
    assert type(model.first) is PerformerAttention
    assert model.first is model.again is model.rest["a"][0]
    assert [name for name, _ in model.named_children()] == ["first", "rest"]


def test_features_are_drawn_from_the_generator_one_per_head():
    found = []
    for seed in (3, 3, 4):
        model = encoder()
        convert(model, Conversion(num_features=8), None, seed)
        found.append([layer.self_attn.feature_map.weight for layer in model.layers])
    assert found[0][0].shape == (HEADS, 8, E // HEADS)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(found[0][0], found[0][1])
    assert redraw_features_(model, generator(5)) == 2


def test_dropout_of_weights_is_switched_off_with_a_warning():
    model = encoder(3, dropout=0.25)
    model.layers[1].self_attn.dropout = 0.0
    with pytest.warns(UserWarning, match=r"dropout .*\(0.25\) is switched off in 2 converted"):
        to_performer(model, num_features=8, window=L)
    # Other dropout stays.
    assert model.layers[0].dropout.p == 0.25
    attention = model.layers[0].self_attn.train()
    x = inputs()
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


@torch.no_grad()
def test_a_mask_that_is_not_causal_is_refused():
    band = (torch.arange(L)[:, None] - torch.arange(L)).abs() > 2
    model = encoder().eval()
    fitted = Conversion(num_features=8, estimator="data_aware")
    with pytest.raises(ValueError, match=r"layers.0.self_attn: attn_mask must be None or"):
        convert(model, fitted, [{"src": inputs(), "mask": band}])
    convert(model)
    with pytest.raises(ValueError, match="attn_mask must be None or the causal mask"):
        model(inputs(), mask=band)


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def parametrized():
    module = nn.MultiheadAttention(E, HEADS)
    return nn.utils.parametrizations.weight_norm(module, "in_proj_weight")


def hooked():
    module = nn.MultiheadAttention(E, HEADS)
    module.register_forward_hook(lambda *args: None)
    return module


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: OwnForward(E, HEADS), "forward of its own"),
        (parametrized, "parametrized weights"),
        (hooked, "hooks"),
    ],
)
def test_what_would_be_lost_is_refused(build, words):
    model = nn.ModuleList([nn.MultiheadAttention(E, HEADS), build()])
    with pytest.raises(ValueError, match=f"1 .*{words}"):
        convert(model)
    assert type(model[0]) is nn.MultiheadAttention
    assert convert(model, Conversion(num_features=8, layers=(0,))) == ["0"]


def test_models_with_nothing_to_convert():
    with pytest.raises(ValueError, match=r"cannot be replaced in place: pass the module that"):
        convert(nn.MultiheadAttention(E, HEADS))
    with pytest.raises(ValueError, match=r"Linear has nothing to convert: it has no nn.Multihead"):
        convert(nn.Linear(2, 2))
    model = encoder()
    convert(model)
    with pytest.raises(ValueError, match="is converted already"):
        convert(model)
    cross = nn.TransformerDecoderLayer(E, HEADS, dropout=0.0)
    cross.self_attn = PerformerAttention(E, HEADS)
    with pytest.raises(ValueError, match="cross_attention=True"):
        convert(cross)


def test_features_that_do_not_exist_are_refused_before_anything_changes():
    model = encoder()
    for options in ({"estimator": "best"}, {"projection": "qr"}, {"num_features": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            convert(model, Conversion(**options))
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


class Dispatching(nn.Module):
    """A block that asks for the type of its attention, and does without what it does not know."""

    def __init__(self, known=nn.MultiheadAttention):
        super().__init__()
        self.known = known
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        if type(self.attention) is self.known or (
            self.known is nn.MultiheadAttention and isinstance(self.attention, self.known)
        ):
            return self.attention(x, x, x, need_weights=False)[0]
        return x


def test_callers_that_ask_for_the_type_call_the_converted_attention():
    model = Dispatching().eval()
    exact = model(torch.ones(1, 9, 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_performer(model, window=16)
        torch.testing.assert_close(model(torch.ones(1, 9, 32)), exact)
    assert isinstance(model.attention, nn.MultiheadAttention)
    model.attention._reset_parameters()


def test_attention_that_is_not_called_is_reported_once():
    model = to_performer(Dispatching(known=int), window=4)
    x = torch.ones(1, 9, 32)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        with pytest.warns(UserWarning, match="did not call attention, converted"):
            each(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            each(x)
        assert not each._forward_hooks
        assert not each.attention._forward_pre_hooks
