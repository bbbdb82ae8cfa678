"""``PerformerAttention``: the arguments, call and masks of ``nn.MultiheadAttention``.

Against torch's module itself, with quadrature nodes for features, which make both softmax
attention; and against the projections by hand around ``favor_attention_weights``.
"""

import copy
import inspect
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from performers import (
    GeneralizedFeatures,
    PerformerAttention,
    SoftmaxFeatures,
    favor_attention_weights,
)
from performers.nn import FavorAttention
from tests.features.cases import generator
from tests.features.maps import QuadratureFeatures

N, L, S, E, HEADS = 3, 8, 11, 24, 4
EXTRA = {"add_bias_kv": True, "add_zero_attn": True}
IGNORED = torch.zeros(N, S, dtype=torch.bool)
IGNORED[1, S // 2 :] = True
IGNORED[2, :3] = True


def module(seed=0, **options):
    """With random biases: they begin at zero, where a missing one would not be noticed."""
    torch.manual_seed(seed)
    made = PerformerAttention(E, HEADS, batch_first=True, **options)
    for name, parameter in made.named_parameters():
        if parameter.ndim == 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.5)
    return made


def inputs(width=E, kdim=None, vdim=None, size=S):
    random, widths = generator(1), ((L, width), (size, kdim or width), (size, vdim or width))
    return [torch.randn(N, length, each, generator=random) for length, each in widths]


def pair(**options):
    """torch's module and ours, of heads of two entries, with the same weights."""
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(8, HEADS, **options)
    for name, parameter in exact.named_parameters():
        if parameter.ndim == 1 or "bias" in name:
            nn.init.normal_(parameter, std=0.5)
    ours = PerformerAttention(8, HEADS, feature_map=QuadratureFeatures(), **options)
    result = ours.load_state_dict(exact.state_dict(), strict=False)
    assert all(name.startswith("feature_map.") for name in result.missing_keys)
    assert result.unexpected_keys == []
    return exact, ours


def assert_agree(exact, ours, x, **options):
    wanted, wanted_weights = exact(*x, **{"need_weights": False, **options})
    out, weights = ours(*x, **options)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-4)
    assert (weights is None) == (wanted_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, wanted_weights, rtol=0, atol=1e-4)


@pytest.mark.parametrize("masked", [None, "bool", "float"])
@pytest.mark.parametrize("weights", [None, "averaged", "of each head"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, EXTRA])
@pytest.mark.parametrize(("batch_first", "batched"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5}, {"kdim": 5, "vdim": 6}])
def test_it_agrees_with_multihead_attention(widths, batch_first, batched, extra, weights, masked):
    # Biases of the projections, or none, with either layout.
    exact, ours = pair(batch_first=batch_first, bias=batch_first == batched, **widths, **extra)
    x, options = inputs(8, **widths), {}
    if masked is not None:
        # True means ignore.
        mask = IGNORED if batched else IGNORED[1]
        minus = torch.zeros(mask.shape).masked_fill(mask, -torch.inf)
        options["key_padding_mask"] = minus if masked == "float" else mask
    if weights is not None:
        options |= {"need_weights": True, "average_attn_weights": weights == "averaged"}
    if not batched:
        x = [each[1] for each in x]
    elif not batch_first:
        x = [each.transpose(0, 1) for each in x]
    assert_agree(exact, ours, x, **options)


HIDDEN = torch.ones(L, L, dtype=torch.bool).triu(1)
CAUSAL = {
    "bool": HIDDEN,
    "float": nn.Transformer.generate_square_subsequent_mask(L),
    "expanded": HIDDEN.expand(N * HEADS, L, L),
    "double": nn.Transformer.generate_square_subsequent_mask(L).double(),
}


# Torch's own module warns of a float mask beside a bool one.
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")
@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, EXTRA])
def test_a_causal_mask_is_recognised(extra, masked, name):
    exact, ours = pair(batch_first=True, **extra)
    x, options = inputs(8, size=L), {}
    if masked:
        # The first key takes part: no query of torch's module sees nothing.
        options["key_padding_mask"] = torch.arange(L) >= torch.tensor([[L], [L // 2], [L - 1]])
    mask = CAUSAL[name]
    if mask.dtype != torch.float64:
        assert_agree(exact, ours, x, attn_mask=mask, **options)
    expected = ours(*x, is_causal=True, **options)[0]
    for is_causal in (False, True):
        out, _ = ours(*x, attn_mask=mask, is_causal=is_causal, **options)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_hides_nothing_is_no_mask(dtype):
    ours, x = module(), inputs()
    assert torch.equal(ours(*x, attn_mask=torch.zeros(L, S, dtype=dtype))[0], ours(*x)[0])


BIAS = torch.zeros(L, L)
BIAS[2, 1] = -1.5
ALMOST = HIDDEN.clone()
ALMOST[0, 1] = False
ARBITRARY = {
    "almost causal": ALMOST,
    "shifted": HIDDEN.triu(2),
    "diagonal": torch.eye(L).bool(),
    "bias": BIAS,
    "reversed": HIDDEN.T,
    "everything": torch.ones(L, L, dtype=torch.bool),
    "one head": torch.stack((HIDDEN, ALMOST)).repeat(N * HEADS // 2, 1, 1),
}


@pytest.mark.parametrize("name", ARBITRARY)
def test_an_arbitrary_mask_is_refused_with_a_reason(name):
    with pytest.raises(ValueError, match=r"attn_mask .*causal.*never form.*key_padding_mask"):
        module()(*inputs(size=L), attn_mask=ARBITRARY[name])


def test_the_signature_is_that_of_multihead_attention():
    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
        ours = inspect.signature(getattr(PerformerAttention, method)).parameters
        assert [name for name in ours if name in theirs] == list(theirs)
        for name, parameter in theirs.items():
            assert ours[name].kind == parameter.kind, name
            if name != "need_weights":
                assert ours[name].default == parameter.default, name


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((8, 3), {}, r"embed_dim must be .*num_heads.*8 and 3"),
        ((0, 1), {}, r"embed_dim must be .*0 and 1"),
        ((8, 0), {}, r"embed_dim must be .*num_heads.*8 and 0"),
        ((8, 2), {"dropout": 0.1}, r"dropout must be 0, got 0.1"),
        ((8, 2), {"feature_map": SoftmaxFeatures(8)}, r"feature_map must have head_dim=4.*got 8"),
    ],
)
def test_refused_construction(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        PerformerAttention(*arguments, **options)


Q, K = (N, L, E), (N, S, E)
WELL = (Q, K, K)


@pytest.mark.parametrize(
    ("shapes", "options", "match"),
    [
        (((L, E), K, K), {}, r"query, key and value must all have 3 dim"),
        (((1, N, L, E),) * 3, {}, r"query, key and value must all have 3 dim"),
        (((N, L, E + 1), K, K), {}, r"query must have width 24"),
        ((Q, (N, S, E + 1), K), {}, r"key must have width 24"),
        ((Q, K, (N, S, E - 1)), {}, r"value must have width 24"),
        ((Q, (N + 1, S, E), K), {}, r"key must have .*batch size"),
        ((Q, K, (N, S - 1, E)), {}, r"value must have"),
        (
            WELL,
            {"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)},
            r"key_padding_mask must have shape \(3, 11\), got \(3, 12\)",
        ),
        (WELL, {"key_padding_mask": torch.full((N, S), -1.0)}, r"key_padding_mask must be bool"),
        (WELL, {"key_padding_mask": torch.zeros(N, S).long()}, r"key_padding_mask must be bool"),
        (WELL, {"attn_mask": HIDDEN}, r"attn_mask must end in shape \(8, 11\), got \(8, 8\)"),
        (WELL, {"is_causal": True}, r"is_causal needs"),
    ],
)
def test_refused_calls(shapes, options, match):
    with pytest.raises(ValueError, match=match):
        module()(*(torch.zeros(shape) for shape in shapes), **options)


def test_weights_of_causal_attention_with_extra_keys_are_refused():
    with pytest.raises(ValueError, match="need_weights"):
        module(add_zero_attn=True)(*inputs(size=L), is_causal=True, need_weights=True)


# ------------------------------------------------------------------------------------- by hand


def dense(attention, query, key, value, *, ignored=None, is_causal=False):
    """Output and weights of each head, in float64."""
    double = copy.deepcopy(attention).double()
    if hasattr(double, "in_proj_weight"):
        matrices = double.in_proj_weight.chunk(3)
    else:
        matrices = [getattr(double, f"{name}_proj_weight") for name in "qkv"]
    biases = [None] * 3 if double.in_proj_bias is None else double.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(x.double(), matrix, bias).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for x, matrix, bias in zip((query, key, value), matrices, biases, strict=True)
    )
    mask = None if ignored is None else ~ignored
    weights = favor_attention_weights(q, k, double.feature_map, key_mask=mask, is_causal=is_causal)
    return double.out_proj((weights @ v).transpose(1, 2).flatten(2)), weights


FEATURES = {
    "hyperbolic": lambda: SoftmaxFeatures(6, 40, estimator="hyperbolic", num_heads=HEADS),
    "relu": lambda: GeneralizedFeatures(6, 40),
    "deterministic": lambda: GeneralizedFeatures(6, fn="elu+1", projection=None),
    "default": lambda: None,
}


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 10}, {"kdim": 10, "vdim": 7}])
def test_it_is_projections_around_favor_attention(options, masked, is_causal, features):
    feature_map = FEATURES[features]()
    attention = module(feature_map=feature_map, **options)
    assert feature_map in (None, attention.feature_map)
    widths = {name: options[name] for name in ("kdim", "vdim") if name in options}
    x = inputs(**widths, size=L if is_causal else S)
    ignored = IGNORED[:, : x[1].shape[1]] if masked else None
    expected, weights = dense(attention, *x, ignored=ignored, is_causal=is_causal)
    options = {"key_padding_mask": ignored, "is_causal": is_causal, "need_weights": True}
    out, implied = attention(*x, **options, average_attn_weights=False)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(implied.double(), weights, rtol=0, atol=1e-5)
    # What is ignored makes no difference, nor does the mode.
    if masked:
        x[1:] = (y.masked_fill(ignored[..., None], torch.nan) for y in x[1:])
    again = attention.eval()(*x, key_padding_mask=ignored, is_causal=is_causal)[0]
    assert torch.equal(again, attention.train()(*x, **options)[0])


def test_default_feature_map():
    """Drawn at construction; one of the caller is taken as it is."""
    given = SoftmaxFeatures(6, 32)
    before = given.weight.clone()
    assert torch.equal(module(feature_map=given).feature_map.weight, before)
    feature_map = PerformerAttention(128, 2).feature_map
    assert isinstance(feature_map, SoftmaxFeatures)
    assert isinstance(PerformerAttention(16, 2), FavorAttention)
    assert (feature_map.head_dim, feature_map.num_features) == (64, 256)


def test_one_tensor_given_three_times_equals_three_tensors():
    attention, x = module(), inputs()[0]
    out = attention(x, x, x)[0]
    for key, value in ((x.clone(), x.clone()), (x, x.clone())):
        torch.testing.assert_close(attention(x, key, value)[0], out, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_reach_every_parameter_and_input(is_causal):
    attention = module().double()
    x = [each.double().requires_grad_() for each in inputs(size=L)]
    tensors = [*x, *attention.parameters()]

    def loss():
        return attention(*x, is_causal=is_causal)[0].square().sum()

    gradients = torch.autograd.grad(loss(), tensors)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    # One directional derivative over everything at once.
    step, losses = 1e-6, []
    directions = [torch.randn(x.shape, generator=generator(3)).double() for x in gradients]
    with torch.no_grad():
        for sign in (1, -2):
            for tensor, direction in zip(tensors, directions, strict=True):
                tensor.add_(direction, alpha=sign * step)
            losses.append(loss().item())
    slope = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "way"),
    [(torch.float64, "module")]
    + [(x, way) for x in (torch.bfloat16, torch.float16) for way in ("module", "autocast")],
)
@pytest.mark.parametrize("extra", [{}, EXTRA])
@pytest.mark.parametrize("is_causal", [False, True])
def test_other_precisions(is_causal, extra, dtype, way):
    attention, x = module(**extra), inputs(size=L)
    expected, _ = attention(*x, is_causal=is_causal)
    if way == "module":
        attention, x = attention.to(dtype), [each.to(dtype) for each in x]
    lowered = dtype if way == "autocast" else torch.bfloat16
    with torch.autocast("cpu", lowered, enabled=way == "autocast"):
        out, _ = attention(*x, is_causal=is_causal)
    assert out.dtype == dtype
    tolerance = max(10 * torch.finfo(dtype).eps, 1e-5)
    assert (out.float() - expected).abs().max() < tolerance * expected.abs().max()
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


def test_construction_with_device_and_dtype_and_state_dicts():
    options = {"dtype": torch.bfloat16, "add_bias_kv": True}
    attention = PerformerAttention(E, HEADS, device="meta", **options)
    assert {p.device.type for p in attention.parameters()} == {"meta"}
    assert {p.dtype for p in attention.parameters()} == {torch.bfloat16}
    assert attention.feature_map.weight.device.type == "meta"
    saved, stream = PerformerAttention(E, HEADS, **options), io.BytesIO()
    torch.save(saved.state_dict(), stream)
    stream.seek(0)
    attention.to_empty(device="cpu").load_state_dict(torch.load(stream, weights_only=True))
    x = torch.randn(5, 2, E, dtype=torch.bfloat16)
    for other in (attention, copy.deepcopy(saved)):
        assert torch.equal(other(x, x, x)[0], saved(x, x, x)[0])


def test_all_keys_ignored_gives_the_output_bias():
    attention, ignored = module(), torch.ones(N, S, dtype=torch.bool)
    out, weights = attention(*inputs(), key_padding_mask=ignored, need_weights=True)
    torch.testing.assert_close(out, attention.out_proj.bias.expand_as(out))
    assert (weights == 0).all()


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_empty_lengths(sizes):
    query, key = (torch.randn(N, size, E) for size in sizes)
    out, _ = module()(query, key, key)
    assert out.shape == (N, sizes[0], E)
    assert out.isfinite().all()
