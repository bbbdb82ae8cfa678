"""``PerformerAttention`` against a dense computation from its own weights."""

import copy
import io

import pytest
import torch
from torch import nn

from performers import GeneralizedFeatures, PerformerAttention, SoftmaxFeatures
from tests.features.cases import generator
from tests.nn.dense import dense

N, L, S, E, HEADS = 3, 20, 30, 24, 4


def module(seed=0, **options):
    torch.manual_seed(seed)
    made = PerformerAttention(E, HEADS, batch_first=True, **options)
    for parameter in made.parameters():
        # Biases begin at zero, where a missing one would not be noticed.
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    return made


def inputs(kdim=E, vdim=E, size=S, seed=1):
    random = generator(seed)
    return [
        torch.randn(N, length, width, generator=random)
        for length, width in ((L, E), (size, kdim), (size, vdim))
    ]


def padding(size=S):
    ignore = torch.rand(N, size, generator=generator(2)) < 0.4
    ignore[0] = False
    return ignore


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kdim", "vdim"), [(None, None), (10, None), (None, 7), (10, 7)])
def test_projections(bias, kdim, vdim):
    attention = module(bias=bias, kdim=kdim, vdim=vdim)
    x = inputs(kdim or E, vdim or E)
    expected, weights = dense(attention, *x)
    out, implied = attention(*x, need_weights=True, average_attn_weights=False)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(implied.double(), weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_self_attention(is_causal, masked):
    attention = module()
    (x, *_), ignore = inputs(), padding(L) if masked else None
    expected, weights = dense(attention, x, x, x, ignore=ignore, is_causal=is_causal)
    out, implied = attention(
        x, x, x, key_padding_mask=ignore, is_causal=is_causal, need_weights=True
    )
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(implied.double(), weights.mean(1), rtol=0, atol=1e-6)


def test_one_tensor_given_three_times_equals_three_tensors():
    attention = module()
    x = inputs()[0]
    torch.testing.assert_close(
        attention(x, x, x)[0], attention(x, x.clone(), x.clone())[0], rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        attention(x, x, x.clone())[0], attention(x, x, x)[0], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("feature_map", "case"),
    [
        (SoftmaxFeatures(6, 40, estimator="hyperbolic", num_heads=HEADS), "hyperbolic"),
        (GeneralizedFeatures(6, 40), "relu"),
        (GeneralizedFeatures(6, fn="elu+1", projection=None), "deterministic-elu+1"),
    ],
)
def test_any_feature_map(feature_map, case):
    attention = module(feature_map=feature_map)
    assert attention.feature_map is feature_map
    x = inputs()
    expected, _ = dense(attention, *x, case=case)
    torch.testing.assert_close(attention(*x)[0].double(), expected, rtol=0, atol=2e-5)


def test_default_feature_map():
    feature_map = PerformerAttention(128, 2).feature_map
    assert isinstance(feature_map, SoftmaxFeatures)
    assert (feature_map.head_dim, feature_map.num_features) == (64, 256)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_reach_every_parameter_and_input(is_causal):
    attention = module().double()
    x = [t.double().requires_grad_() for t in inputs(size=L)]
    names, parameters = zip(*attention.named_parameters(), strict=True)
    out, _ = attention(*x, is_causal=is_causal)
    gradients = torch.autograd.grad(out.square().sum(), (*x, *parameters))
    for name, gradient in zip(("query", "key", "value", *names), gradients, strict=True):
        assert gradient.abs().max() > 0, name
    # One directional derivative over everything at once.
    step = 1e-6
    random = generator(3)
    directions = [torch.randn(g.shape, generator=random).double() for g in gradients]
    with torch.no_grad():
        losses = []
        for sign in (1, -1):
            for tensor, direction in zip((*x, *parameters), directions, strict=True):
                tensor.add_(direction, alpha=sign * step)
            losses.append(attention(*x, is_causal=is_causal)[0].square().sum().item())
            for tensor, direction in zip((*x, *parameters), directions, strict=True):
                tensor.sub_(direction, alpha=sign * step)
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_autocast(dtype, is_causal):
    attention = module()
    x = inputs(size=L)
    expected, _ = attention(*x, is_causal=is_causal)
    with torch.autocast("cpu", dtype=dtype):
        out, _ = attention(*x, is_causal=is_causal)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < 8 * torch.finfo(dtype).eps * expected.abs().max()
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in attention.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_module_in_another_dtype(dtype, extra, is_causal):
    attention = module(add_bias_kv=extra, add_zero_attn=extra)
    x = inputs(size=L)
    expected, _ = attention(*x, is_causal=is_causal)
    out, _ = attention.to(dtype)(*(t.to(dtype) for t in x), is_causal=is_causal)
    assert out.dtype == dtype
    tolerance = max(10 * torch.finfo(dtype).eps, 1e-5)
    assert (out.float() - expected).abs().max() < tolerance * expected.abs().max()


def test_construction_with_device_and_dtype():
    attention = PerformerAttention(E, HEADS, device="meta", dtype=torch.bfloat16, add_bias_kv=True)
    assert {p.device.type for p in attention.parameters()} == {"meta"}
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert attention.feature_map.weight.device.type == "meta"
    saved = PerformerAttention(E, HEADS, dtype=torch.bfloat16, add_bias_kv=True)
    attention.to_empty(device="cpu").load_state_dict(saved.state_dict())
    x = torch.randn(5, 2, E, dtype=torch.bfloat16)
    assert torch.equal(attention(x, x, x)[0], saved(x, x, x)[0])


def test_state_dict_round_trip():
    saved, loaded = module(0), module(1)
    stream = io.BytesIO()
    torch.save(saved.state_dict(), stream)
    stream.seek(0)
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    x = inputs()
    assert torch.equal(saved(*x)[0], loaded(*x)[0])
    assert torch.equal(saved(*x)[0], copy.deepcopy(saved)(*x)[0])


def test_eval_and_train_are_the_same_function():
    attention = module()
    x = inputs()
    out = attention(*x)[0]
    assert torch.equal(attention.eval()(*x)[0], out)


def test_all_keys_ignored_gives_the_output_bias():
    attention = module()
    x = inputs()
    ignore = torch.ones(N, S, dtype=torch.bool)
    out, weights = attention(*x, key_padding_mask=ignore, need_weights=True)
    torch.testing.assert_close(out, attention.out_proj.bias.expand_as(out))
    assert (weights == 0).all()


def test_ignored_content_does_not_matter():
    attention = module()
    query, key, value = inputs()
    ignore = padding()
    expected = attention(query, key, value, key_padding_mask=ignore)[0]
    key, value = (x.masked_fill(ignore[..., None], float("nan")) for x in (key, value))
    assert torch.equal(attention(query, key, value, key_padding_mask=ignore)[0], expected)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(sizes):
    attention = module()
    query, key = (torch.randn(N, size, E) for size in sizes)
    out, _ = attention(query, key, key)
    assert out.shape == (N, sizes[0], E)
    assert torch.isfinite(out).all()


def test_a_feature_map_of_the_caller_is_not_redrawn():
    features = SoftmaxFeatures(6, 32)
    before = features.weight.clone()
    assert torch.equal(module(feature_map=features).feature_map.weight, before)


def test_materialised_meta_modules_get_features():
    attention = PerformerAttention(E, HEADS, device="meta").to_empty(device="cpu")
    attention.feature_map.weight.fill_(torch.nan)
    attention.reset_parameters()
    assert attention.feature_map.weight.isfinite().all()
