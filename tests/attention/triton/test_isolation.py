"""Rows do not change with what they may not see: later tokens, other sequences, masks, NaN."""

import math

import pytest
import torch

from tests.attention.cases import exhaustive
from tests.attention.triton.support import TOLERANCE, small_call
from tests.attention.triton.test_values import BOTH, EXACT, FORM, LATE_KEYS, PACKED, lost_rows

NAMES = ("query", "key", "value")


def scaled(call, rows, factor):
    """The call with queries, keys and values multiplied at some positions."""
    inputs = [x.clone() for x in call.inputs]
    for x in inputs:
        x[..., rows, :] *= factor
    return call.with_inputs(*inputs)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {**FORM, "name": "relu"}),
        (torch.bfloat16, {**EXACT, **BOTH}),
        exhaustive(torch.float16, {}),
        exhaustive(torch.float32, {}),
        exhaustive(torch.float32, {**FORM, "name": "relu"}),
        exhaustive(torch.float32, {**FORM, "name": "exp"}),
    ],
    ids=str,
)
def test_later_tokens_do_not_matter(dtype, options):
    """In 16-bit types not one bit, unless a feature grows so much that rows are mended."""
    call = small_call(140, "causal", dtype=dtype, seed=5, **options)
    before = call.run("triton")
    for position, factor in ((64, 1e4), (90, 30.0), (90, 0.0)):
        after = scaled(call, slice(position, None), factor).run("triton")
        a, b = before[..., :position, :], after[..., :position, :]
        if dtype == torch.float32:
            assert (a - b).abs().max() < (2e-6 if options else 1e-6)
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


@pytest.mark.parametrize(
    ("call", "rows"),
    [
        (small_call(75, "causal"), slice(0, 50)),
        (scaled(small_call(75, "causal"), slice(50, None), 100.0), slice(0, 50)),
        exhaustive(small_call(70, **PACKED), slice(32, 65)),
    ],
    ids=["causal", "large", "packed"],
)
def test_gradients_stop_at_what_is_not_seen(call, rows):
    call = call.leaves()
    call.run("triton")[..., rows, :].square().sum().backward()
    others = torch.ones(call.query.shape[-2], dtype=torch.bool)
    others[rows] = False
    for x in call.inputs:
        assert (x.grad[..., others, :] == 0).all()
        assert x.grad.isfinite().all()
    assert (call.value.grad[..., rows, :] != 0).any()


@pytest.mark.parametrize("mode", ["causal", exhaustive("bidirectional")])
def test_sequences_do_not_see_each_other(mode):
    call = small_call(70, mode, **PACKED, dtype=torch.bfloat16)
    before = call.run("triton")[..., 20:65, :]
    others = (torch.arange(70) < 20) | (torch.arange(70) >= 65)
    for factor in (1e4, math.nan):
        after = scaled(call, others, factor).run("triton")[..., 20:65, :]
        if mode == "causal":
            assert torch.equal(before, after)
        else:
            assert (before - after).abs().max() < 2e-2


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_masked_keys_are_not_seen(mode):
    call = small_call(75, mode, heads=2, key_heads=1, key_mask=LATE_KEYS)
    out = call.run("triton")
    hidden = ~LATE_KEYS[:, None, :, None]
    key, value = (x.masked_fill(hidden, math.nan) for x in (call.key, call.value))
    assert torch.equal(call.with_inputs(call.query, key, value).run("triton"), out)
    assert mode != "causal" or (out[:, :, :40] == 0).all()


@pytest.mark.parametrize(
    ("where", "options"),
    [
        *((x, {"heads": 2}) for x in NAMES),
        *((x, {**EXACT, "sinks": 1}) for x in NAMES),
        ("key", {"mode": "causal"}),
        *(exhaustive(x, {"mode": "causal"}) for x in ("query", "value")),
        *((x, {**EXACT, **BOTH, "mode": "causal"}) for x in NAMES),
        *(exhaustive(x, {**EXACT, **BOTH}) for x in NAMES),
        ("query", {**FORM, "name": "relu"}),
        *((x, {**FORM, "name": "relu", "mode": "causal"}) for x in ("query", "key")),
        ("key", {**PACKED, "mode": "causal", "window": 3}),
    ],
    ids=str,
)
def test_nan_and_infinity(where, options):
    """Inside, and at the beginning, where a sink is."""
    batch = 1 if "cu_seqlens" in options else 2
    call = small_call(70, **options, batch=batch)
    for row, (place, bad) in enumerate(((40, math.nan), (0, math.inf))[:batch]):
        getattr(call, where)[row, 0, place, 3] = bad
    leaves = call.leaves()
    out, expected = leaves.run("triton"), call.run("reference")
    assert torch.equal(out.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert not kept.any() or (out[kept] - expected[kept]).abs().max() < TOLERANCE
    if options == {"mode": "causal"}:
        (grad,) = torch.autograd.grad(out[:, :, :40].sum(), leaves.query)
        assert torch.equal(grad.isnan().any(-1), expected.isnan().any(-1))
