"""``performers.scaled_dot_product_attention`` against torch's, where a window covers everything."""

import inspect

import pytest
import torch
import torch.nn.functional as F

import performers
from performers import SoftmaxFeatures, favor_attention
from performers.attention import sdpa

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
L = 20
SHAPES = [(L, 8), (3, L, 8), (2, 4, L, 8), (2, 3, 4, L, 8)]
PADDING = torch.arange(L) < 13
CAUSAL = torch.ones(L, L, dtype=torch.bool).tril()


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def both(inputs, *args, **options):
    ours = performers.scaled_dot_product_attention(*inputs, *args, window=L, **options)
    if (mask := options.get("attn_mask")) is not None and mask.ndim == 1:
        # Some of torch's kernels take no mask of one axis.
        options = {**options, "attn_mask": mask[None]}
    return ours, F.scaled_dot_product_attention(*inputs, *args, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": PADDING},
        {"attn_mask": PADDING.expand(L, L)},
        {"attn_mask": PADDING.expand(L, L).clone()},
        {"attn_mask": CAUSAL},
        {"attn_mask": CAUSAL & PADDING},
        {"attn_mask": PADDING[:, None] & PADDING},
        {"attn_mask": CAUSAL & PADDING[:, None] & PADDING},
        {"attn_mask": torch.ones(L, L, dtype=torch.bool)},
    ],
    ids=range(11),
)
def test_every_call_equals_torch(shape, options):
    inputs = draw(shape, shape, (*shape[:-1], 5))
    ours, torchs = both(inputs, **options)
    torch.testing.assert_close(ours, torchs, **CLOSE)
    if (mask := options.get("attn_mask")) is not None and mask.ndim == 2 and len(shape) > 2:
        options = {"attn_mask": mask.expand(*shape[:-2], *mask.shape).contiguous()}
        torch.testing.assert_close(both(inputs, **options)[0], torchs, **CLOSE)


def test_each_row_of_a_batch_has_its_padding():
    shape = (3, 2, L, 8)
    inputs = draw(shape, shape, shape)
    keys = torch.arange(L) < torch.tensor([[20], [7], [13]])
    for mask in (keys[:, None, None], keys[:, None, None] & CAUSAL):
        torch.testing.assert_close(*both(inputs, mask), **CLOSE)
    out = performers.scaled_dot_product_attention(*inputs, is_causal=True, key_mask=keys, window=L)
    torch.testing.assert_close(out, both(inputs, keys[:, None, None] & CAUSAL)[1], **CLOSE)


@pytest.mark.parametrize("size", [13, 27])
def test_causal_attention_is_aligned_at_the_first_key(size):
    inputs = draw((2, 2, L, 8), (2, 2, size, 8), (2, 2, size, 8))
    torch.testing.assert_close(*both(inputs, is_causal=True), **CLOSE)
    lower = torch.ones(L, size, dtype=torch.bool).tril()
    torch.testing.assert_close(*both(inputs, lower), **CLOSE)
    keys = torch.arange(size) > 3
    out = performers.scaled_dot_product_attention(
        *inputs, is_causal=True, key_mask=keys.expand(2, -1), window=L
    )
    expected = F.scaled_dot_product_attention(*inputs, lower & keys)
    torch.testing.assert_close(out[:, :, 4:], expected[:, :, 4:], **CLOSE)
    assert (out[:, :, :4] == 0).all()


def test_grouped_heads_and_shared_batches():
    inputs = draw((2, 4, L, 8), (2, 2, L, 8), (2, 2, L, 8))
    torch.testing.assert_close(*both(inputs, enable_gqa=True), **CLOSE)
    with pytest.raises(ValueError, match="pass enable_gqa=True"):
        performers.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(*both(draw((2, 4, L, 8), (1, 1, L, 8), (1, 1, L, 8))), **CLOSE)


def test_features_are_kept_and_owe_nothing_to_random_numbers():
    inputs = draw(*[(1, 2, L, 8)] * 3)
    seeded = SoftmaxFeatures(8, generator=torch.Generator().manual_seed(sdpa._SEED))
    expected = favor_attention(*inputs, seeded)
    sdpa._FEATURES.clear()
    with torch.inference_mode(), torch.device("meta"):
        torch.manual_seed(1)
        first = performers.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(first.clone(), expected)
    (kept,) = sdpa._FEATURES.values()
    (leaf, *others) = inputs
    leaf.requires_grad_()
    torch.testing.assert_close(performers.scaled_dot_product_attention(leaf, *others), expected)
    performers.scaled_dot_product_attention(leaf, *others).sum().backward()
    assert list(sdpa._FEATURES.values()) == [kept]
    performers.scaled_dot_product_attention(*(x.double() for x in inputs))
    performers.scaled_dot_product_attention(*draw(*[(1, 2, L, 6)] * 3))
    assert len(sdpa._FEATURES) == 3
    given = SoftmaxFeatures(8, 16)
    out = performers.scaled_dot_product_attention(*inputs, feature_map=given)
    torch.testing.assert_close(out, favor_attention(*inputs, given))


def exported(attend, x):
    class Model(torch.nn.Module):
        def forward(self, x):
            return attend(x, x, x)

    return torch.export.export(Model(), (x,)).module()(x)


def mapped(attend, x):
    return torch.vmap(attend)(*(3 * [x[None]]))[0]


@pytest.mark.parametrize("first_call", [exported, mapped])
def test_features_do_not_depend_on_the_first_call(first_call):
    (x,) = draw((1, 2, L, 8))
    attend = performers.scaled_dot_product_attention
    expected = attend(x, x, x)
    sdpa._FEATURES.clear()
    torch.testing.assert_close(first_call(attend, x), expected)
    assert torch.equal(attend(x, x, x), expected)


def test_the_signature_is_that_of_torch():
    names = list(inspect.signature(performers.scaled_dot_product_attention).parameters)
    documented = inspect.signature(
        lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
        enable_gqa=False: None
    )  # fmt: skip
    assert names[:8] == list(documented.parameters)
    assert all(f"{name}" in F.scaled_dot_product_attention.__doc__ for name in names[:8])


BAND = (torch.arange(L)[:, None] - torch.arange(L)).abs() < 3
PREFIX = CAUSAL | (torch.arange(L) < 5)
HEADS = torch.stack((PADDING, ~PADDING))[None, :, None]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attn_mask": torch.zeros(L, L)}, "attn_mask must be bool .*got torch.float32"),
        ({"attn_mask": BAND}, "attn_mask must be bool and mean padding"),
        ({"attn_mask": PREFIX}, "attn_mask must be bool and mean padding"),
        ({"attn_mask": HEADS}, "attn_mask must be bool and mean padding"),
        ({"attn_mask": PADDING[:-1]}, r"attn_mask must broadcast to \(2, 2, 20, 20\)"),
        ({"attn_mask": PADDING, "is_causal": True}, "attn_mask must be None with is_causal"),
        ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
        ({"scale": -1.0}, "scale must be"),
        ({"key_mask": PADDING}, "key_mask must be a bool tensor of shape"),
    ],
)
def test_refusals(options, words):
    inputs = draw(*[(2, 2, L, 8)] * 3)
    with pytest.raises(ValueError, match=words):
        performers.scaled_dot_product_attention(*inputs, **options)


def test_shapes_that_do_not_fit():
    query, other = draw((2, 2, L, 8), (2, L, 8))
    with pytest.raises(ValueError, match="same number of dimensions"):
        performers.scaled_dot_product_attention(query, other, other)
    inputs = draw((2, 2, L, 8), (2, 2, 9, 8), (2, 2, 9, 8))
    with pytest.raises(ValueError, match="for cross attention pass window=None"):
        performers.scaled_dot_product_attention(*inputs, window=3)


def test_compiled_as_one_graph():
    inputs = draw((2, 4, L, 8), (2, 2, L, 8), (2, 2, L, 8))
    inputs[0].requires_grad_()

    def attend(query, key, value, mask):
        return performers.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)

    sdpa._FEATURES.clear()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    mask = PADDING.expand(2, 1, L, L)
    out, expected = compiled(*inputs, mask), attend(*inputs, mask)
    torch.testing.assert_close(out, expected)
    for each in (out, expected):
        each.square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled(*inputs, mask).dtype == attend(*inputs, mask).dtype == torch.bfloat16
    # Some versions of torch leave the message of the ValueError out.
    with pytest.raises(torch._dynamo.exc.Unsupported, match="ValueError"):
        compiled(*inputs, CAUSAL)
