"""Bidirectional calls against the oracle."""

import math

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import random_mask
from tests.attention.triton.support import check, small_call


@pytest.mark.parametrize("length", [1, 63, 65, 150])
def test_lengths(length):
    # The gradient of a single key cancels to zero.
    check(small_call(length, seed=length), tolerance=2e-5 if length == 1 else 5e-6)


def test_fewer_keys_than_queries_and_more():
    check(small_call(70, "cross", size=20))
    check(small_call(20, "cross", size=150))


def test_grouped_heads():
    check(small_call(70, batch=2, heads=6, key_heads=2))


def test_a_projection_for_each_head():
    for num_heads in (2, 4):
        check(small_call(40, heads=4, key_heads=2, num_heads=num_heads))


@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (8, 40), (128, 5), (5, 100)])
def test_head_dims(head_dim, value_dim):
    wide = max(head_dim, value_dim) > 64
    call = small_call(
        70,
        heads=1,
        head_dim=head_dim,
        value_dim=value_dim,
        num_features=64,
        dtype=torch.float16 if wide else torch.float32,
    )
    check(call, tolerance=2e-3 if wide else 5e-6)


@pytest.mark.parametrize("name", ["hyperbolic", "optimal-simplex", "exp-no-epsilon", "data_aware"])
def test_feature_maps(name):
    check(small_call(70, name=name), tolerance=1e-5)


def test_key_masks():
    call = small_call(70, batch=2, heads=2, key_heads=1)
    mask = random_mask(2, 70)
    mask[1] = False
    call.options["key_mask"] = mask
    check(call)
    out = call.run("triton")
    assert (out[1] == 0).all()
    hidden = [x.clone() for x in call.inputs]
    for x in hidden[1:]:
        x.transpose(1, 2)[~mask] = math.nan
    again = favor_attention(*hidden, call.feature_map, backend="triton", **call.options)
    assert torch.equal(again, out)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_large_inputs(scale):
    # Exponents themselves are rounded, to 6e-8 of their size.
    check(
        small_call(100, heads=2, input_scale=scale),
        tolerance=1e-7 * scale**2,
        gradients=scale < 100,
    )


def test_keys_of_one_size_far_from_the_rest():
    call = small_call(100)
    call.key[:, :, 50] *= 30
    call.key[:, :, 60:] *= 1e-3
    check(call, tolerance=2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(dtype, tolerance):
    """The interpreter truncates to bfloat16, which triples the error of rounding."""
    call = small_call(150, dtype=dtype, seed=3)
    assert call.run("triton").dtype == dtype
    check(call, tolerance=tolerance)


@pytest.mark.parametrize("where", ["query", "key", "value"])
def test_nan_and_infinity(where):
    call = small_call(75, batch=2, heads=2)
    for row, bad in enumerate((math.nan, math.inf)):
        getattr(call, where)[row, 0, 70, 3] = bad
    out = call.run("triton")
    expected = call.run("reference")
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert (out[kept] - expected[kept]).abs().max() < 5e-6


def test_keys_whose_norm_overflows():
    call = small_call(70)
    call.key[:, :, 3] = 1e25
    out = call.run("triton")
    left = torch.arange(70) != 3
    inputs = (call.query, call.key[:, :, left], call.value[:, :, left])
    without = favor_attention(*inputs, call.feature_map, backend="triton")
    assert (out - without).abs().max() < 5e-6
    leaves = call.leaves()
    grads = torch.autograd.grad(leaves.run("triton").sum(), leaves.inputs)
    assert all(x.isfinite().all() for x in grads)


def test_two_softmax_attentions():
    """FAVOR is keys against the features, then queries against the features."""
    call = small_call(100)
    query, key, value = (x.double() for x in call.inputs)
    weight = call.feature_map.weight.double() * 24**-0.25
    logits = weight @ key.mT - key.square().sum(-1).unsqueeze(-2) * 24**-0.5 / 2
    sums = logits.softmax(-1) @ value
    rows = query @ weight.mT + logits.logsumexp(-1).unsqueeze(-2)
    assert (call.run("triton") - rows.softmax(-1) @ sums).abs().max() < 5e-6


def test_layouts():
    """Strides of any order, also of gradients, and results in the order of the query."""
    call = small_call(20, batch=2, heads=2)
    expected = call.run("triton")
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in call.inputs]
    out = favor_attention(*inputs, call.feature_map, backend="triton")
    assert torch.equal(out, expected)
    assert out.stride() == inputs[0].new_empty(2, 20, 2, 16).transpose(1, 2).stride()
    leaves = call.leaves()
    wanted = torch.autograd.grad(leaves.run("triton").sum(), leaves.inputs)
    got = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    columns = [x.mT.contiguous().mT.requires_grad_() for x in call.inputs]
    out = favor_attention(*columns, call.feature_map, backend="triton")
    assert torch.equal(out, expected)
    got = torch.autograd.grad(out.sum(), columns)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_two_runs_are_equal():
    call = small_call(150).leaves()
    first, second = (
        torch.autograd.grad(call.run("triton").square().sum(), call.inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_to_attend_to():
    for sizes in ({"batch": 0}, {"size": 0, "mode": "cross"}, {"value_dim": 0}):
        call = small_call(10, **sizes)
        assert torch.equal(call.run("triton"), call.run("torch"))
