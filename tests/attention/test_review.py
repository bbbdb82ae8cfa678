"""Cases that a reader of the code broke once."""

import copy
import io

import pytest
import torch
from torch import nn

from performers import (
    FavorState,
    GeneralizedFeatures,
    PerformerAttention,
    SoftmaxFeatures,
    favor_attention,
)


def inputs(length, heads=2, head_dim=16, batch=1):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, length, head_dim, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [50, 3000])
def test_a_redraw_between_forward_and_backward_changes_no_gradient(length, is_causal):
    query, key, value = inputs(length, heads=8)
    features = SoftmaxFeatures(16, 256)
    query.requires_grad_()

    def gradient(redraw):
        feature_map = copy.deepcopy(features)
        out = favor_attention(query, key, value, feature_map, is_causal=is_causal)
        if redraw:
            feature_map.redraw_()
        return torch.autograd.grad(out.square().sum(), query)[0]

    assert torch.equal(gradient(redraw=True), gradient(redraw=False))


def test_a_short_causal_call_keeps_its_features():
    """It works under torch.func, which cannot recompute."""
    query, key, value = inputs(100)
    features = SoftmaxFeatures(16, 32, generator=torch.Generator().manual_seed(0))

    def loss(query):
        return favor_attention(query, key, value, features, is_causal=True).square().sum()

    found = torch.func.grad(loss)(query)
    query.requires_grad_()
    expected = torch.autograd.grad(loss(query), query)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bidirectional_attention_compiles_once_for_all_lengths():
    features = SoftmaxFeatures(16, 32)
    compiled = torch.compile(
        lambda q, k, v: favor_attention(q, k, v, features),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for length in range(60, 200, 12):
        q, k, v = inputs(length)
        torch.testing.assert_close(compiled(q, k, v), favor_attention(q, k, v, features))


def test_a_transformer_layer_with_padding_compiles():
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    layer.self_attn = PerformerAttention(32, 2, batch_first=True)
    layer.train()
    x = torch.randn(2, 10, 32)
    padding = torch.zeros(2, 10, dtype=torch.bool)
    padding[1, 6:] = True
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, src_key_padding_mask=padding), layer(x, src_key_padding_mask=padding)
    )


def test_estimates_ignore_autocast():
    features = SoftmaxFeatures(16, 64)
    query, key, _ = inputs(20)
    with torch.autocast("cpu", torch.bfloat16):
        estimate, phi = features.estimate_kernel(query, key), features(query)
    assert torch.equal(estimate, features.estimate_kernel(query, key))
    assert torch.equal(phi, features(query))


def test_meta_tensors_have_a_shape():
    with torch.device("meta"):
        features = SoftmaxFeatures(16, 32)
        query = torch.empty(2, 4, 100, 16)
        assert favor_attention(query, query, query, features, is_causal=True).shape == query.shape


def test_materialised_meta_modules_get_features():
    attention = PerformerAttention(32, 2, device="meta").to_empty(device="cpu")
    attention.feature_map.weight.fill_(torch.nan)
    attention.reset_parameters()
    assert attention.feature_map.weight.isfinite().all()


def test_a_given_feature_map_is_not_redrawn():
    features = SoftmaxFeatures(16, 32)
    before = features.weight.clone()
    assert torch.equal(PerformerAttention(32, 2, feature_map=features).feature_map.weight, before)


def test_states_are_saved_and_compared():
    query, key, value = inputs(10)
    _, state = favor_attention(
        query, key, value, SoftmaxFeatures(16, 32), is_causal=True, return_state=True
    )
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file)
    assert isinstance(loaded, FavorState)
    assert torch.equal(loaded.key_value, state.key_value)
    assert state == state
    assert loaded != state


def test_the_deterministic_map_is_its_formula():
    features = GeneralizedFeatures(16, fn="relu", projection=None, epsilon=0.1)
    x = torch.randn(5, 16)
    torch.testing.assert_close(features(x, scale=1.0), x.relu() + 0.1)
    phi = features(x)
    torch.testing.assert_close(features.estimate_kernel(x, x), phi @ phi.T)
