"""In the place of ``self_attn`` inside torch's own transformer layers."""

import pytest
import torch
from torch import nn

from performers import GeneralizedFeatures, PerformerAttention, redraw_features_
from tests.features.cases import generator
from tests.features.maps import QuadratureFeatures

E, HEADS, L, N = 16, 8, 12, 4


def replace_attention(module, build=QuadratureFeatures):
    """Every ``nn.MultiheadAttention`` inside replaced by ours with its weights."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.MultiheadAttention):
            ours = PerformerAttention(
                child.embed_dim,
                child.num_heads,
                batch_first=child.batch_first,
                feature_map=build(),
            )
            ours.load_state_dict(child.state_dict(), strict=False)
            setattr(module, name, ours)
        else:
            replace_attention(child, build)
    return module


def layer(seed=0, **options):
    torch.manual_seed(seed)
    return nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True, **options)


def inputs():
    return torch.randn(N, L, E, generator=generator(1))


MASKS = {
    "none": {},
    "padding": {"src_key_padding_mask": torch.arange(L).expand(N, -1) >= 9},
    "causal": {"src_mask": nn.Transformer.generate_square_subsequent_mask(L), "is_causal": True},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(norm_first, mask, training):
    exact, ours = layer(norm_first=norm_first), replace_attention(layer(norm_first=norm_first))
    x = inputs()
    exact.train(training)
    ours.train(training)
    with torch.set_grad_enabled(training):
        out, wanted = ours(x, **MASKS[mask]), exact(x, **MASKS[mask])
    real = slice(None, 9) if mask == "padding" else slice(None)
    assert (out - wanted)[:, real].abs().max() < 1e-4


@pytest.mark.parametrize("training", [True, False])
def test_encoder(training):
    ours = replace_attention(nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False))
    exact = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
    exact.load_state_dict({k: v for k, v in ours.state_dict().items() if "feature_map" not in k})
    x = inputs()
    with torch.set_grad_enabled(training):
        out, wanted = ours.train(training)(x), exact.train(training)(x)
    assert (out - wanted).abs().max() < 1e-4
    assert redraw_features_(ours) == 2


@pytest.mark.parametrize("mask", MASKS)
def test_evaluation_runs_this_attention_and_no_other(mask):
    """In evaluation torch's layer has a fused path that never calls the attention it was given.

    With features that are not softmax's, softmax attention would be seen at once.
    """
    relu = replace_attention(layer(), lambda: GeneralizedFeatures(2, generator=generator(0)))
    encoder = nn.TransformerEncoder(relu, 2, enable_nested_tensor=False)
    exact = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)
    x = inputs()
    options = {("mask" if k == "src_mask" else k): v for k, v in MASKS[mask].items()}
    trained = encoder(x, **options)
    encoder.eval()
    exact.eval()
    with torch.no_grad():
        real = slice(None, 9) if mask == "padding" else slice(None)
        out, softmax = encoder(x, **options)[:, real], exact(x, **options)[:, real]
    torch.testing.assert_close(out, trained[:, real], rtol=0, atol=1e-5)
    assert (out - softmax).abs().max() > 1e-2


def test_decoder_layer_with_cross_attention():
    torch.manual_seed(0)
    exact = nn.TransformerDecoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    torch.manual_seed(0)
    ours = replace_attention(
        nn.TransformerDecoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    )
    target, memory = inputs(), torch.randn(N, 2 * L, E, generator=generator(2))
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(2 * L).expand(N, -1) >= 20,
    }
    difference = ours(target, memory, **options) - exact(target, memory, **options)
    assert difference.abs().max() < 1e-4


def test_a_layer_with_it_trains():
    """Copying the first token to everywhere takes attention: the loss must fall a long way."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(E, HEADS, 32, dropout=0.0, batch_first=True)
    model.self_attn = PerformerAttention(E, 2, batch_first=True)
    head = nn.Linear(E, 4)
    marker = torch.randn(E)
    optimizer = torch.optim.Adam([*model.parameters(), *head.parameters()], lr=3e-3)
    random = generator(3)
    codes = torch.randn(4, E, generator=random)
    losses = []
    for step in range(150):
        labels = torch.randint(4, (32,), generator=random)
        x = torch.randn(32, L, E, generator=random) * 0.3
        x[:, 0] += codes[labels] + marker
        loss = nn.functional.cross_entropy(
            head(model(x)).flatten(0, 1), labels.repeat_interleave(L)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 49:
            redraw_features_(model, random)
    assert sum(losses[:5]) / 5 > 1.2
    assert sum(losses[-5:]) / 5 < 0.6, losses[-5:]
