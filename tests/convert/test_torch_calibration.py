"""Features of torch's attention modules, fitted to what the exact model computes."""

import copy

import pytest
import torch
from torch import nn

from performers import SoftmaxFeatures
from performers.convert import to_performer
from performers.convert.options import Conversion
from performers.features import LearnedFeatures
from tests.convert.torch_models import (
    CLOSE,
    HEADS,
    PADDING,
    E,
    L,
    N,
    Skewed,
    Wrapped,
    convert,
    encoder,
    inputs,
)


def relative_error(model, exact, x):
    return ((model(x) - exact(x)).square().sum() / exact(x).square().sum()).sqrt().item()


@torch.no_grad()
def test_calibration_lowers_the_error_on_anisotropic_data():
    exact, x = Skewed().eval(), inputs(8, 32, E, seed=3)
    samples = [inputs(4, 32, E, seed=seed) for seed in (11, 12)]
    errors = {}
    for estimator in ("positive", "data_aware"):
        settings = Conversion(num_features=64, estimator=estimator)
        calibration = samples if estimator == "data_aware" else None
        found = []
        for seed in range(5):
            model = copy.deepcopy(exact)
            convert(model, settings, calibration, seed)
            found.append(relative_error(model, exact, x))
        errors[estimator] = sum(found) / len(found)
    assert errors["data_aware"] < 0.5 * errors["positive"], errors


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
@torch.no_grad()
def test_features_are_fitted_to_the_projections_of_all_batches(is_causal, batch_first):
    """Of the exact model: what the second layer sees does not pass through features."""
    model = encoder(2, batch_first=batch_first, norm_first=True).train()
    exact = copy.deepcopy(model).eval()
    batches = [inputs(seed=11), inputs(2, 20, E, seed=12)]
    masks = [
        nn.Transformer.generate_square_subsequent_mask(x.shape[1]) if is_causal else None
        for x in batches
    ]
    settings = Conversion(num_features=8, estimator="data_aware", window=2, sinks=1)
    given = [
        {"src": x if batch_first else x.transpose(0, 1), "mask": mask}
        for x, mask in zip(batches, masks, strict=True)
    ]
    convert(model, settings, iter(given))
    assert all(m.training for m in model.modules())
    expected = SoftmaxFeatures(4, 8, estimator="data_aware", num_heads=HEADS)
    for x, mask in zip(batches, masks, strict=True):
        x = x if batch_first else x.transpose(0, 1)
        x = exact.layers[1].norm1(exact.layers[0](x, mask))
        x = x if batch_first else x.transpose(0, 1)
        attention = exact.layers[1].self_attn
        projected = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
        query, key = (
            y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected.chunk(3, dim=-1)[:2]
        )
        expected.calibrate_(query, key, is_causal=is_causal, window=2, sinks=1)
    fitted = model.layers[1].self_attn.feature_map
    for name in ("center", "transform", "query_transform"):
        torch.testing.assert_close(getattr(fitted, name), getattr(expected, name), **CLOSE)


@pytest.mark.parametrize("fused", [True, False])
def test_padding_is_left_out_of_the_fit(fused):
    """Queries and keys alike: rows alone, at their own lengths, give the same fit."""
    settings = Conversion(num_features=8, estimator="data_aware", window=1)
    together, alone = encoder().train(not fused), encoder()
    x = inputs()
    everything_hidden = torch.ones(1, L, dtype=torch.bool)
    garbage = x.masked_fill(PADDING[:, :, None], 30.0)
    batch = (
        torch.cat((garbage, garbage[:1])),
        None,
        torch.cat((PADDING, everything_hidden)),
    )
    convert(together, settings, [batch])
    lengths = (~PADDING).sum(1).tolist()
    convert(alone, settings, [x[i : i + 1, :length] for i, length in enumerate(lengths)])
    for ours, expected in zip(together.layers, alone.layers, strict=True):
        for name, tensor in expected.self_attn.feature_map.named_buffers():
            found = getattr(ours.self_attn.feature_map, name)
            torch.testing.assert_close(found, tensor, rtol=0, atol=1e-4)


def test_calibration_changes_nothing_but_the_features():
    model = nn.Sequential(Skewed(), nn.Dropout(0.5)).eval()
    model[0].train()
    flag = torch.backends.mha.get_fastpath_enabled()
    settings = Conversion(num_features=8, estimator="optimal")
    convert(model, settings, [inputs()])
    assert model[0].training
    assert not model[1].training
    assert torch.backends.mha.get_fastpath_enabled() is flag
    # Those that wait for the first call are gone after it.
    model(inputs())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    # A later error leaves no hook either, and the exact modules in their places.
    model = Skewed()
    for batches, error, words in (
        ([], ValueError, "at least one batch"),
        ([inputs(), "text"], TypeError, "tensor, a tuple .* got str"),
        ([inputs(seed=1), torch.full((1, L, E), torch.nan)], ValueError, "attention: .*finite"),
        ([inputs(N, L, E + 1)], ValueError, "attention: query must have width 16"),
    ):
        with pytest.raises(error, match=words):
            convert(model, settings, batches)
        assert type(model.attention) is nn.MultiheadAttention
        assert not model.attention._forward_pre_hooks
        assert model.training
        assert torch.backends.mha.get_fastpath_enabled() is flag


def test_batches_may_be_arguments_of_any_kind():
    fitted = []
    for batch in ((inputs(), None), {"x": inputs(), "scale": 1.0}, [inputs()], inputs()):
        model = Skewed()
        convert(model, Conversion(num_features=8, estimator="sderf"), [batch])
        fitted.append(model.attention.feature_map.transform)
    assert all(torch.equal(fitted[0], other) for other in fitted[1:])


def test_calibration_that_is_missing_or_of_no_use():
    with pytest.raises(ValueError, match="'data_aware' is fitted to data: pass calibration"):
        convert(encoder(), Conversion(estimator="data_aware"))
    with pytest.warns(UserWarning, match="calibration is not used: estimator='positive'"):
        to_performer(encoder(), num_features=8, calibration=[inputs()])
    settings = Conversion(num_features=8, estimator="data_aware", window=L, sinks=0)
    model = encoder()
    with pytest.raises(ValueError, match=r"nothing to fit in layers.0.self_attn.* window=12"):
        convert(model, settings, [inputs()])
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    # One batch that is long enough does, whatever the others are.
    convert(model, settings, [inputs(), inputs(1, 2 * L, E)])
    assert (model.layers[0].self_attn.feature_map.center != 0).any()


def test_layers_that_are_not_called_or_not_chosen():
    model = nn.ModuleDict({"used": Skewed(), "idle": Skewed()})
    model.forward = lambda x: model["used"](x)
    settings = Conversion(num_features=8, estimator="data_aware")
    with pytest.raises(ValueError, match=r"idle.attention: the model did not call it"):
        convert(model, settings, [inputs()])
    chosen = Conversion(num_features=8, estimator="data_aware", layers=(0,))
    assert convert(model, chosen, [inputs()]) == ["used.attention"]


def test_learned_features_of_a_distilled_model_have_their_place():
    settings = Conversion(num_features=8, estimator="data_aware", window=2, learned=True)
    model, other = encoder().eval(), encoder(seed=1).eval()
    convert(model, settings, [inputs()])
    assert isinstance(model.layers[0].self_attn.feature_map, LearnedFeatures)
    model(inputs()).sum().backward()
    assert model.layers[1].self_attn.feature_map.weight.grad.abs().sum() > 0
    convert(other, settings)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(inputs()), model(inputs()))


class CrossAttending(Wrapped):
    def forward(self, x, memory):
        return super().forward(x, memory)[0]


def test_cross_attention_that_shows_when_it_is_called():
    pair = (inputs(), inputs(N, 20, E, seed=4))
    fitted = {"num_features": 8, "estimator": "data_aware"}
    for options, remedy in (
        ({}, "cross_attention=True"),
        ({"window": 2}, "layers"),
        ({"window": 2, "cross_attention": True}, "layers"),
    ):
        model = CrossAttending(batch_first=True)
        with pytest.raises(ValueError, match=f"attention attends from 12 .* to 20 .*{remedy}"):
            convert(model, Conversion(**fitted, **options), [pair])
        assert type(model.attention) is nn.MultiheadAttention
    convert(model, Conversion(**fitted, cross_attention=True), [pair])
    assert model(*pair).shape == pair[0].shape
    windowed = CrossAttending(batch_first=True)
    convert(windowed)
    with pytest.raises(ValueError, match="window needs as many keys as queries"):
        windowed(*pair)


@torch.no_grad()
@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_keys_without_a_position_are_fitted_to(option):
    model = Wrapped(batch_first=True, **{option: True})
    attention, x = model.attention, inputs()
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query, key = nn.functional.linear(x, weight, bias).chunk(3, dim=-1)[:2]
    more = torch.zeros(N, 1, E) if attention.bias_k is None else attention.bias_k.expand(N, 1, E)
    key = torch.cat((key, more), dim=1)
    query, key = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (query, key))
    mask = torch.cat((~PADDING, torch.ones(N, 1, dtype=torch.bool)), dim=1)
    expected = SoftmaxFeatures(E // HEADS, 8, estimator="data_aware", num_heads=HEADS)
    expected.calibrate_(query, key, mask)
    settings = Conversion(num_features=8, estimator="data_aware")
    convert(model, settings, [{"query": x, "key_padding_mask": PADDING}])
    fitted = model.attention.feature_map
    for name in ("center", "transform", "query_transform"):
        torch.testing.assert_close(getattr(fitted, name), getattr(expected, name), **CLOSE)
