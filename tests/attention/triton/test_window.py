"""Windows and sinks under one normaliser with the features."""

import math

import pytest
import torch
from torch.nn import functional as F

from performers import favor_attention
from tests.attention.cases import exhaustive, random_mask, stream
from tests.attention.triton.support import check, small_call


def exact_call(length, mode="bidirectional", **options):
    return small_call(
        length, mode, **{"head_dim": 16, "value_dim": 8, "num_features": 16, **options}
    )


@pytest.mark.parametrize("window", [65, *map(exhaustive, (0, 1, 63, 64, 300))])
def test_windows(window):
    check(exact_call(100, "causal", window=window, seed=window))


@pytest.mark.parametrize("window", [20, *map(exhaustive, (0, 64))])
def test_windows_both_ways(window):
    check(exact_call(70, window=window, seed=window))


def test_grouped_heads_and_masks():
    for mode in ("causal", "bidirectional"):
        call = exact_call(70, mode, heads=2, key_heads=1, head_dim=24, window=9, sinks=2)
        call.options["key_mask"] = random_mask(1, 70)
        check(call)


@pytest.mark.parametrize("sinks", [18, exhaustive(1)])
@pytest.mark.parametrize("mode", ["bidirectional", "causal", "cross"])
def test_sinks(mode, sinks):
    check(exact_call(100, mode, sinks=sinks))


def test_a_window_that_covers_the_sequence_is_softmax_attention():
    for is_causal in (True, False):
        call = exact_call(100, window=100, is_causal=is_causal)
        exact = F.scaled_dot_product_attention(*call.inputs, is_causal=is_causal)
        assert (call.run("triton") - exact).abs().max() < 5e-6


@pytest.mark.exhaustive
def test_feature_maps():
    for name in ("hyperbolic", "optimal-simplex", "data_aware"):
        check(exact_call(80, "causal", name=name, window=5, sinks=1), tolerance=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 4e-2)])
def test_half_precision(dtype, tolerance):
    check(exact_call(100, "causal", dtype=dtype, window=10, sinks=2), tolerance=tolerance)


@pytest.mark.exhaustive
def test_rows_that_lose_their_pairs():
    """Both with what the window takes and without."""
    for mode in ("causal", "bidirectional"):
        call = exact_call(140, mode, num_features=8, input_scale=5.0, window=3)
        check(call, tolerance=2e-5)


@pytest.mark.parametrize("lengths", [[70, 1, 1, 28], *map(exhaustive, ([5] * 4, [30, 70]))])
def test_streams(lengths):
    call = exact_call(sum(lengths), heads=2, key_heads=1, window=9, sinks=3)
    call.options["key_mask"] = random_mask(1, sum(lengths))
    out, _ = stream(call, lengths, "triton")
    assert (out - call.run("reference", is_causal=True)).abs().max() < 5e-6


@pytest.mark.exhaustive
def test_gradients_through_streams():
    call = exact_call(100, window=9, sinks=3).leaves()
    weight = torch.randn(1, 1, 100, 8)
    ours, theirs = (
        torch.autograd.grad((stream(call, [60, 40], name)[0] * weight).sum(), call.inputs)
        for name in ("triton", "torch")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() < 1e-5 * max(1, b.abs().max())


def test_later_tokens_do_not_matter():
    call = exact_call(140, "causal", dtype=torch.bfloat16, window=9, sinks=2)
    before = call.run("triton")
    for factor in (30.0, 1e4):
        inputs = [x.clone() for x in call.inputs]
        for x in inputs:
            x[..., 90:, :] *= factor
        after = favor_attention(*inputs, call.feature_map, backend="triton", **call.options)
        assert torch.equal(before[..., :90, :], after[..., :90, :])


@pytest.mark.parametrize("mode", ["causal", exhaustive("bidirectional")])
def test_nan_and_infinity(mode):
    for where in ("query", "key", "value"):
        call = exact_call(100, mode, batch=2, window=7, sinks=1)
        getattr(call, where)[0, 0, 70, 3] = math.nan
        getattr(call, where)[1, 0, 0, 3] = math.inf
        out, expected = call.run("triton"), call.run("reference")
        assert torch.equal(out.isnan(), expected.isnan())
        kept = ~expected.isnan()
        assert not kept.any() or (out[kept] - expected[kept]).abs().max() < 5e-6
