"""Torch's own Transformer layers and attention modules, made linear in place."""

import copy

import pytest
import torch
from torch import nn

from performers import PerformerAttention, favor_attention
from performers.convert import to_performer
from tests.convert.models import CLOSE, HEADS, WIDTH, Wrapped, converted, favors, torch_model

N, L = 3, 12
PADDING = torch.arange(L).expand(N, -1) >= torch.tensor([[12], [9], [5]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(L)
AFTER = torch.ones(L, L, dtype=torch.bool).triu(1)
EXACT = {"num_features": 8, "window": L}
MASKS = {
    "none": {},
    "bool padding": {"src_key_padding_mask": PADDING},
    "float padding": {"src_key_padding_mask": torch.zeros(N, L).masked_fill(PADDING, -torch.inf)},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "causal unannounced": {"mask": CAUSAL},
    "bool causal": {"mask": AFTER, "is_causal": True},
    "causal and padding": {"mask": AFTER, "is_causal": True, "src_key_padding_mask": PADDING},
}


def draw(*shape, seed=1):
    return torch.randn(*(shape or (N, L, WIDTH)), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", ["train", "eval", "eval without gradients"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    "options", [{}, {"batch_first": False}, {"norm_first": True}, {"activation": "gelu"}], ids=str
)
def test_a_window_over_everything_reproduces_an_encoder(options, mask, mode):
    exact, x, results = torch_model(**options), draw(), []
    batch_first = options.get("batch_first", True)
    for model in (exact, converted(exact, **EXACT)):
        model.train(mode == "train")
        with torch.set_grad_enabled(mode != "eval without gradients"):
            out = model(x if batch_first else x.transpose(0, 1), **MASKS[mask])
        out = out if batch_first else out.transpose(0, 1)
        results.append(out[~PADDING] if "padding" in mask else out)
    torch.testing.assert_close(*results, **CLOSE)


# Torch says of its nested tensors that they may change.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@torch.no_grad()
def test_nested_tensors_are_made_for_layers_that_are_exact_only():
    exact = torch_model(layers=3)
    exact.use_nested_tensor = exact.enable_nested_tensor = True
    ours, hybrid = converted(exact, **EXACT), converted(exact, **EXACT, layers=[1])
    assert not ours.use_nested_tensor
    x, expected = draw(), exact(draw(), src_key_padding_mask=PADDING)
    # Zeros at padding show that torch took its fused path in one and not in the other.
    assert (expected[PADDING] == 0).all()
    assert (ours(x, src_key_padding_mask=PADDING)[PADDING] != 0).all()
    for model in (ours, hybrid):
        out = model(x, src_key_padding_mask=PADDING)
        torch.testing.assert_close(out[~PADDING], expected[~PADDING], **CLOSE)


@torch.no_grad()
def test_evaluation_runs_features_and_no_fused_layer():
    ours, x = converted(torch_model(layers=1), num_features=8), draw()
    layer, attention = ours.layers[0], ours.layers[0].self_attn
    projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected.chunk(3, dim=-1)]
    attended = favor_attention(*heads, attention.feature_map).transpose(1, 2).flatten(2)
    attended = attention.out_proj(attended)
    torch.testing.assert_close(attention(x, x, x)[0], attended, **CLOSE)
    middle = layer.norm1(x + attended)
    expected = layer.norm2(middle + layer.linear2(layer.linear1(middle).relu()))
    torch.testing.assert_close(ours(x), expected, **CLOSE)


@pytest.mark.parametrize(
    "options",
    [{"batch_first": False}, {}, {"bias": False}, {"kdim": 10, "vdim": 6}, {"vdim": 6}],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_inside_a_module(masked, options):
    model = Wrapped(**options)
    exact, ours = model.attention, converted(model, **EXACT).attention
    assert type(ours) is PerformerAttention
    shape = (N, L) if options.get("batch_first", True) else (L, N)
    widths = (WIDTH, options.get("kdim", WIDTH), options.get("vdim", WIDTH))
    call = [draw(*shape, width, seed=width) for width in widths]
    arguments = {"key_padding_mask": PADDING, "attn_mask": AFTER} if masked else {}
    for got, expected in zip(
        ours(*call, need_weights=True, **arguments),
        exact(*call, need_weights=True, **arguments),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, **CLOSE)


def test_a_module_in_several_places_is_replaced_in_all():
    model = nn.Module()
    model.first = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    model.again = model.first
    model.rest = nn.ModuleDict({"a": nn.ModuleList([model.first, nn.Linear(2, 2)])})
    to_performer(model)
    assert favors(model) == [model.first]
    assert model.first is model.again is model.rest["a"][0]
    assert [name for name, _ in model.named_children()] == ["first", "rest"]


class Dispatching(nn.Module):
    """A block that asks for the type of its attention, and does without what it does not know."""

    def __init__(self, known=nn.MultiheadAttention):
        super().__init__()
        self.known = known
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        if isinstance(self.attention, self.known):
            return self.attention(x, x, x, need_weights=False)[0]
        return x


def test_callers_that_ask_for_the_type_call_the_converted_attention():
    model, x = Dispatching().eval(), torch.ones(1, 9, WIDTH)
    exact = model(x)
    to_performer(model, window=16)
    torch.testing.assert_close(model(x), exact)
    model.attention._reset_parameters()


def test_attention_that_is_not_called_is_reported_once():
    model, x = to_performer(Dispatching(known=int), window=4), torch.ones(1, 9, WIDTH)
    for each in (model, copy.deepcopy(model)):
        with pytest.warns(UserWarning, match="did not call attention, converted"):
            each(x)
        each(x)
        assert not each._forward_hooks
        assert not each.attention._forward_pre_hooks


def test_torch_models_without_memory_can_be_converted():
    with torch.device("meta"):
        encoder = nn.TransformerEncoderLayer(16, 2, dropout=0.0)
    to_performer(nn.ModuleList([encoder]))
    assert {x.device.type for x in encoder.state_dict().values()} == {"meta"}
    assert encoder(torch.empty(5, 3, 16, device="meta")).shape == (5, 3, 16)
