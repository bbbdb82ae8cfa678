"""The arguments, call and masks of ``nn.MultiheadAttention``, tested against the module itself.

With quadrature nodes for features both compute softmax attention.
"""

import pytest
import torch
from torch import nn

from performers import PerformerAttention, SoftmaxFeatures
from tests.features.cases import generator
from tests.features.maps import QuadratureFeatures

N, L, S, E, HEADS = 3, 8, 11, 8, 4
TOLERANCE = 1e-4


def pair(**options):
    """torch's module and ours with the same weights."""
    torch.manual_seed(0)
    exact = nn.MultiheadAttention(E, HEADS, **options)
    for name, parameter in exact.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.5)
        elif "bias" in name:
            nn.init.normal_(parameter)
    ours = PerformerAttention(
        E,
        HEADS,
        feature_map=QuadratureFeatures(),
        **options,
    )
    result = ours.load_state_dict(exact.state_dict(), strict=False)
    assert all(name.startswith("feature_map.") for name in result.missing_keys)
    assert result.unexpected_keys == []
    return exact, ours


def inputs(kdim=E, vdim=E, length=L, size=S, batch=N):
    random = generator(1)
    return [
        torch.randn(batch, n, width, generator=random)
        for n, width in ((length, E), (size, kdim), (size, vdim))
    ]


def assert_agree(exact, ours, x, **options):
    wanted, wanted_weights = exact(*x, **{"need_weights": False, **options})
    out, weights = ours(*x, **options)
    assert out.shape == wanted.shape
    assert (out - wanted).abs().max() < TOLERANCE, (out - wanted).abs().max()
    assert (weights is None) == (wanted_weights is None)
    if weights is not None:
        assert weights.shape == wanted_weights.shape
        assert (weights - wanted_weights).abs().max() < TOLERANCE


def padding(size=S):
    ignore = torch.zeros(N, size, dtype=torch.bool)
    ignore[1, size // 2 :] = True
    ignore[2, :3] = True
    return ignore


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"kdim": 5, "vdim": 6},
        {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    ],
)
def test_weights_of_multihead_attention_load(options):
    exact = nn.MultiheadAttention(E, HEADS, **options)
    ours = PerformerAttention(E, HEADS, **options)
    result = ours.load_state_dict(exact.state_dict(), strict=False)
    assert result.missing_keys == ["feature_map.weight"]
    assert result.unexpected_keys == []
    for name, parameter in exact.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [{}, {"kdim": 5}, {"vdim": 6}, {"kdim": 5, "vdim": 6}])
def test_layout_and_widths(widths, bias, batch_first):
    exact, ours = pair(batch_first=batch_first, bias=bias, **widths)
    x = inputs(widths.get("kdim", E), widths.get("vdim", E))
    if not batch_first:
        x = [t.transpose(0, 1) for t in x]
    assert_agree(exact, ours, x)


@pytest.mark.parametrize("average", [False, True])
def test_weights(average):
    exact, ours = pair(batch_first=True)
    assert_agree(exact, ours, inputs(), need_weights=True, average_attn_weights=average)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_without_a_batch(batch_first, average):
    exact, ours = pair(batch_first=batch_first)
    x = [t[0] for t in inputs()]
    assert_agree(exact, ours, x, need_weights=True, average_attn_weights=average)
    assert_agree(exact, ours, x, key_padding_mask=padding()[1])


@pytest.mark.parametrize("floating", [False, True])
def test_true_in_key_padding_mask_means_ignore(floating):
    exact, ours = pair(batch_first=True)
    ignore = padding()
    mask = torch.zeros(N, S).masked_fill(ignore, -torch.inf) if floating else ignore
    assert_agree(exact, ours, inputs(), key_padding_mask=mask, need_weights=True)
    _, weights = ours(*inputs(), key_padding_mask=mask, need_weights=True)
    assert (weights[ignore[:, None].expand_as(weights)] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "extra",
    [{"add_bias_kv": True}, {"add_zero_attn": True}, {"add_bias_kv": True, "add_zero_attn": True}],
)
def test_extra_keys(extra, masked):
    exact, ours = pair(batch_first=True, **extra)
    options = {"key_padding_mask": padding()} if masked else {}
    assert_agree(exact, ours, inputs(), need_weights=True, **options)
    assert_agree(exact, ours, inputs(), **options)


def causal_masks():
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    floating = nn.Transformer.generate_square_subsequent_mask(L)
    return {
        "bool": hidden,
        "float": floating,
        "expanded": hidden.expand(N * HEADS, L, L),
        "double": floating.double(),
    }


@pytest.mark.parametrize("name", ["bool", "float", "expanded"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "extra", [{}, {"add_bias_kv": True}, {"add_bias_kv": True, "add_zero_attn": True}]
)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_a_causal_mask_is_recognised(extra, masked, name):
    exact, ours = pair(batch_first=True, **extra)
    x = inputs(size=L)
    options = {"attn_mask": causal_masks()[name]}
    if masked:
        ignore = torch.zeros(N, L, dtype=torch.bool)
        ignore[1, L // 2 :] = True
        options["key_padding_mask"] = ignore
    assert_agree(exact, ours, x, **options)


@pytest.mark.parametrize("name", causal_masks())
def test_is_causal_and_the_mask_are_the_same_call(name):
    _, ours = pair(batch_first=True)
    x = inputs(size=L)
    expected, weights = ours(*x, is_causal=True, need_weights=True)
    for is_causal in (False, True):
        out, implied = ours(
            *x, attn_mask=causal_masks()[name], is_causal=is_causal, need_weights=True
        )
        assert torch.equal(out, expected)
        assert torch.equal(implied, weights)
    assert (weights.triu(1) == 0).all()
    assert torch.equal(ours(*x, is_causal=True)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_that_hides_nothing_is_no_mask(dtype):
    _, ours = pair(batch_first=True)
    x = inputs()
    mask = torch.zeros(L, S, dtype=dtype)
    assert torch.equal(ours(*x, attn_mask=mask)[0], ours(*x)[0])


def arbitrary_masks():
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)
    missing, shifted, diagonal = hidden.clone(), hidden.clone().triu(2), torch.eye(L).bool()
    missing[0, 1] = False
    bias = torch.zeros(L, L)
    bias[2, 1] = -1.5
    return {
        "almost causal": missing,
        "shifted": shifted,
        "diagonal": diagonal,
        "bias": bias,
        "reversed": hidden.T.clone(),
        "everything": torch.ones(L, L, dtype=torch.bool),
        "one head": torch.stack((hidden, missing)).repeat(N, 1, 1),
    }


@pytest.mark.parametrize("name", arbitrary_masks())
def test_an_arbitrary_mask_is_refused_with_a_reason(name):
    _, ours = pair(batch_first=True)
    with pytest.raises(ValueError, match=r"attn_mask .*causal.*never form.*key_padding_mask"):
        ours(*inputs(size=L), attn_mask=arbitrary_masks()[name])


def test_the_signature_is_that_of_multihead_attention():
    import inspect

    for method in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, method)).parameters
        ours = inspect.signature(getattr(PerformerAttention, method)).parameters
        assert [n for n in ours if n in theirs] == list(theirs)
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


@pytest.mark.parametrize(
    ("shapes", "options", "match"),
    [
        (((L, E), (N, S, E), (N, S, E)), {}, r"query, key and value must all have 3 dim"),
        (((1, N, L, E),) * 3, {}, r"query, key and value must all have 3 dim"),
        (((N, L, E + 1), (N, S, E), (N, S, E)), {}, r"query must have width 8"),
        (((N, L, E), (N, S, E + 1), (N, S, E)), {}, r"key must have width 8"),
        (((N, L, E), (N, S, E), (N, S, E - 1)), {}, r"value must have width 8"),
        (((N, L, E), (N + 1, S, E), (N, S, E)), {}, r"key must have .*batch size"),
        (((N, L, E), (N, S, E), (N, S - 1, E)), {}, r"value must have"),
        (
            ((N, L, E), (N, S, E), (N, S, E)),
            {"key_padding_mask": torch.zeros(N, S + 1, dtype=torch.bool)},
            r"key_padding_mask must have shape \(3, 11\), got \(3, 12\)",
        ),
        (
            ((N, L, E), (N, S, E), (N, S, E)),
            {"key_padding_mask": torch.full((N, S), -1.0)},
            r"key_padding_mask must be bool",
        ),
        (
            ((N, L, E), (N, S, E), (N, S, E)),
            {"key_padding_mask": torch.zeros(N, S, dtype=torch.int64)},
            r"key_padding_mask must be bool",
        ),
        (
            ((N, L, E), (N, S, E), (N, S, E)),
            {"attn_mask": torch.zeros(L, L, dtype=torch.bool)},
            r"attn_mask must end in shape \(8, 11\), got \(8, 8\)",
        ),
        (((N, L, E), (N, S, E), (N, S, E)), {"is_causal": True}, r"is_causal needs"),
    ],
)
def test_refused_calls(shapes, options, match):
    attention = PerformerAttention(E, HEADS, batch_first=True)
    with pytest.raises(ValueError, match=match):
        attention(*(torch.zeros(shape) for shape in shapes), **options)


def test_weights_of_causal_attention_with_extra_keys_are_refused():
    attention = PerformerAttention(E, HEADS, batch_first=True, add_zero_attn=True)
    x = torch.zeros(N, L, E)
    with pytest.raises(ValueError, match="need_weights"):
        attention(x, x, x, is_causal=True, need_weights=True)
