"""Causal calls: against the oracle, strict causality, rows that lose their pairs."""

import math

import pytest
import torch

from performers import favor_attention
from performers.attention.triton import causal, launcher, passes
from tests.attention.cases import exhaustive, random_mask
from tests.attention.triton.support import check, small_call


def hostile_call(length=140, scale=8.0, **options):
    """Entries so large that rows of a chunk underflow at the chunk's scale."""
    sizes = {"head_dim": 16, "num_features": 8, "input_scale": scale}
    return small_call(length, "causal", **{**sizes, **options})


def lost_rows(call):
    from performers.attention.call import AttentionCall
    from performers.attention.operators import Inputs

    checked = AttentionCall(*call.inputs, call.feature_map, **call.options).checked()
    return int(passes.forward(Inputs.of(checked)).lost.count_nonzero())


@pytest.mark.parametrize("length", [1, 32, 33, 75])
def test_lengths(length):
    check(small_call(length, "causal", seed=length), tolerance=2e-5 if length == 1 else 5e-6)


def test_grouped_heads_and_masks():
    call = small_call(75, "causal", heads=2, key_heads=1)
    call.options["key_mask"] = random_mask(1, 75)
    call.options["key_mask"][:, :40] = False
    check(call)
    assert (call.run("triton")[:, :, :40] == 0).all()
    assert lost_rows(call) == 0


def test_one_head_of_many_splits_equals_one_split(monkeypatch):
    call = small_call(100, "causal").leaves()
    results = []
    for span in (64, 1000):
        monkeypatch.setattr(launcher, "LEAST_SPAN", span)
        out = call.run("triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), call.inputs)))
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 2e-6 * max(1, b.abs().max())


def test_query_heads_beyond_2_to_the_31():
    """The third of those that share a key head; of its memory only what it touches is real."""
    call = small_call(5, "causal", heads=3, key_heads=1, dtype=torch.float16).leaves()
    query = torch.empty_strided((1, 3, 5, 24), (0, 2**30, 24, 1), dtype=torch.float16)
    query.copy_(call.query.detach()).requires_grad_()
    results = []
    for case in (call, call.with_inputs(query, call.key, call.value)):
        out = case.run("triton")
        results.append((out, *torch.autograd.grad(out.sum(), case.inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.exhaustive
def test_heads_in_groups(monkeypatch):
    """The size of a group of heads does not change a bit."""
    call = small_call(70, "causal", heads=4, key_heads=2).leaves()
    results = []
    for size in (1 << 29, 1):
        monkeypatch.setattr(causal, "STATE_BYTES", size)
        out = call.run("triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), call.inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "name", ["data_aware", *map(exhaustive, ("hyperbolic", "optimal-simplex"))]
)
def test_feature_maps(name):
    check(small_call(70, "causal", name=name), tolerance=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(dtype, tolerance):
    check(small_call(70, "causal", dtype=dtype, seed=3), tolerance=tolerance)


def test_rows_that_lose_their_pairs():
    call = hostile_call(heads=2, key_heads=1)
    assert lost_rows(call) > 10
    check(call, tolerance=2e-5)


@pytest.mark.exhaustive
def test_lost_rows_with_masks_and_a_past():
    call = hostile_call(100, batch=2)
    call.options["key_mask"] = random_mask(2, 100)
    assert lost_rows(call) > 5
    check(call, tolerance=2e-5)


def test_lost_rows_of_bfloat16():
    call = hostile_call(100, dtype=torch.bfloat16)
    assert lost_rows(call) > 5
    check(call, tolerance=5e-2)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *map(exhaustive, (torch.float16, torch.float32))]
)
def test_later_tokens_do_not_matter(dtype):
    """In 16-bit types not one bit."""
    call = small_call(100, "causal", dtype=dtype, seed=5)
    before = call.run("triton")
    for position, factor in ((64, 1e4), (90, 30.0), (90, 0.0)):
        inputs = [x.clone() for x in call.inputs]
        for x in inputs:
            x[..., position:, :] *= factor
        after = favor_attention(*inputs, call.feature_map, backend="triton", is_causal=True)
        a, b = before[..., :position, :], after[..., :position, :]
        if dtype == torch.float32:
            assert (a - b).abs().max() < 1e-6
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("positive", torch.bfloat16),
        ("exp-no-epsilon", torch.bfloat16),
        exhaustive("positive", torch.float16),
    ],
)
def test_later_keys_that_raise_the_scales_do_not_matter(name, dtype):
    """Not one bit, in rows that lose their pairs at the scale of these keys too."""
    sizes = {"head_dim": 64, "num_features": 64, "dtype": dtype}
    call = small_call(24, "causal", name=name, **sizes)
    before = call.run("triton")[..., :16, :]
    # The key that a feature is largest for.
    call.key[..., 16:, :] = call.feature_map.form().weight[0, :8] * 64**0.25
    assert lost_rows(call) > 5
    assert torch.equal(call.run("triton")[..., :16, :], before)


def test_gradients_stop_at_later_tokens():
    for factor in (1.0, 100.0):
        call = small_call(75, "causal")
        for x in call.inputs:
            x[..., 50:, :] *= factor
        call = call.leaves()
        call.run("triton")[..., :50, :].square().sum().backward()
        for x in call.inputs:
            assert (x.grad[..., 50:, :] == 0).all()
            assert x.grad.isfinite().all()
        assert (call.value.grad[..., :50, :] != 0).any()


@pytest.mark.parametrize("where", ["key", *map(exhaustive, ("query", "value"))])
def test_nan_and_infinity(where):
    call = small_call(75, "causal", batch=2)
    for row, bad in enumerate((math.nan, math.inf)):
        getattr(call, where)[row, 0, 40, 3] = bad
    leaves = call.leaves()
    out = leaves.run("triton")
    expected = call.run("reference")
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert (out[kept] - expected[kept]).abs().max() < 5e-6
    (grad,) = torch.autograd.grad(out[:, :, :40].sum(), leaves.query)
    assert torch.equal(grad.isnan().any(-1), expected.isnan().any(-1))


@pytest.mark.exhaustive
def test_two_runs_are_equal():
    call = hostile_call(100).leaves()
    first, second = (
        torch.autograd.grad(call.run("triton").square().sum(), call.inputs) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
