"""Packed sequences, each attending to itself."""

import math

import pytest
import torch

from performers import favor_attention
from performers.attention.triton import launcher
from tests.attention.cases import exhaustive, random_mask
from tests.attention.triton.support import check, small_call

OFFSETS = torch.tensor([0, 1, 20, 20, 32, 65, 70], dtype=torch.int32)
MODES = ("causal", exhaustive("bidirectional"))


def packed_call(mode, offsets=OFFSETS, **options):
    sizes = {"head_dim": 16, "value_dim": 8, "num_features": 16, "cu_seqlens": offsets}
    return small_call(int(offsets[-1]), mode, **{**sizes, **options})


@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(mode):
    check(packed_call(mode, heads=2, key_heads=1))


@pytest.mark.parametrize("mode", MODES)
def test_masks_windows_and_sinks(mode):
    call = packed_call(mode, heads=2, key_heads=1, window=6, sinks=2)
    call.options["key_mask"] = random_mask(1, 70)
    check(call)


def test_one_long_sequence_among_short_ones(monkeypatch):
    """Sums that go on through a split, and that end in one."""
    monkeypatch.setattr(launcher, "LEAST_SPAN", 64)
    check(packed_call("causal", torch.tensor([0, 60, 140, 150])))


@pytest.mark.exhaustive
def test_rows_that_lose_their_pairs():
    check(packed_call("causal", num_features=8, input_scale=8.0), tolerance=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_sequences_do_not_see_each_other(mode):
    call = packed_call(mode, dtype=torch.bfloat16)
    before = call.run("triton")
    for factor in (1e4, math.nan):
        inputs = [x.clone() for x in call.inputs]
        for x in inputs:
            x[..., :20, :] *= factor
            x[..., 65:, :] *= factor
        after = favor_attention(*inputs, call.feature_map, backend="triton", **call.options)
        rows = slice(20, 65)
        if mode == "causal":
            assert torch.equal(before[..., rows, :], after[..., rows, :])
        else:
            assert (before - after)[..., rows, :].abs().max() < 2e-2


def test_nan_within_the_window():
    call = packed_call("causal", torch.tensor([0, 20, 34], dtype=torch.int32), window=3)
    call.key[..., 8, 3] = math.nan
    out = call.run("triton").isnan().all(-1)
    assert torch.equal(out, call.run("reference").isnan().all(-1))
    assert out[..., 8:20].all()


@pytest.mark.exhaustive
def test_gradients_stop_at_other_sequences():
    call = packed_call("bidirectional").leaves()
    call.run("triton")[..., 32:65, :].square().sum().backward()
    for x in call.inputs:
        assert (x.grad[..., :32, :] == 0).all()
        assert (x.grad[..., 65:, :] == 0).all()
    assert (call.value.grad[..., 32:65, :] != 0).any()
