"""``window``: exact softmax for near keys, features for the rest, one normaliser."""

import pytest
import torch
from torch.nn import functional as F

from performers import favor_attention
from tests.attention import oracle
from tests.attention.cases import (
    BACKENDS,
    EXACT,
    FEW_EXACT,
    TESTED,
    WIDE,
    check_against_oracle,
    covered,
    make_call,
    random_mask,
)
from tests.features.cases import by_name, generator
from tests.features.maps import QuadratureFeatures

MODES = ("bidirectional", "causal")
WINDOWS = (0, 1, 5, 63, 64, 65, 130)
POISON = (float("nan"), float("inf"), 1e30)


def dense(call, **options):
    """Softmax attention of the same tensors."""
    return F.scaled_dot_product_attention(*call.inputs, enable_gqa=True, **options)


def check_values(call, backend, tolerance=2e-5):
    check_against_oracle(call, backend, value_tolerance=tolerance, gradients=False)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map(backend, case, mode, sinks):
    check_values(make_call(case, 131, mode, window=7, sinks=sinks), backend)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("length", [1, 2, 64, 65, 200])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_awkward_lengths(backend, mode, length, window):
    for case in covered(FEW_EXACT, backend):
        check_values(make_call(case, length, mode, seed=length, window=window), backend)


@pytest.mark.exhaustive
@pytest.mark.parametrize("window", [0, 20, 100])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_more_than_one_block(backend, mode, window):
    """Long enough, with enough features, that no backend can hold all features at once."""
    call = make_call(
        by_name("positive"),
        700,
        mode,
        batch=1,
        heads=4,
        num_features=1024,
        head_dim=8,
        window=window,
        sinks=2,
    )
    call.options["key_mask"] = random_mask(1, 700, share=0.9)
    check_values(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_none_is_none(backend, mode):
    call = make_call(by_name("positive"), 90, mode)
    assert torch.equal(call.run(backend), call.run(backend, window=None, sinks=0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_of_zero_is_the_own_key(backend, mode):
    """The own key alone is exact: one row of weights, written out."""
    call = make_call(by_name("positive"), 9, mode, batch=1, heads=1, window=0)
    estimate = call.feature_map.estimate_kernel(call.query, call.key)
    truth = (call.query @ call.key.mT / 4).exp()
    weights = estimate.diagonal_scatter(truth.diagonal(dim1=-2, dim2=-1), dim1=-2, dim2=-1)
    weights = weights.tril() if mode == "causal" else weights
    expected = weights @ call.value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(call.run(backend), expected, rtol=0, atol=1e-5)
    assert (call.run(backend) - call.run(backend, window=None)).abs().max() > 1e-3


@pytest.mark.parametrize("window", [129, 130, 200, 10**6])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_everything_is_softmax(backend, mode, key_heads, window):
    """Whatever the features: also ones far too few."""
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, 130, mode, heads=4, key_heads=key_heads, num_features=4)
        expected = dense(call, is_causal=mode == "causal")
        out = call.run(backend, window=window)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
        out = call.run(backend, window=window, sinks=5, scale=0.9)
        expected = dense(call, is_causal=mode == "causal", scale=0.9)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_everything_is_masked_softmax(backend, mode):
    call = make_call(by_name("positive"), 130, mode, num_features=4)
    mask = random_mask(2, 130)
    mask[:, 0] = True
    seen = oracle.visible(130, 130, is_causal=mode == "causal", key_mask=mask)
    out = call.run(backend, window=130, key_mask=mask)
    torch.testing.assert_close(out, dense(call, attn_mask=seen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [75, 200])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_every_packed_sequence_is_softmax(backend, mode, window):
    """The window need only cover the longest sequence, not all of them."""
    offsets = torch.tensor([0, 75, 75, 76, 140])
    call = make_call(by_name("positive"), 140, mode, batch=1, num_features=4)
    seen = oracle.visible(140, 140, is_causal=mode == "causal", cu_seqlens=offsets)
    out = call.run(backend, window=window, cu_seqlens=offsets)
    torch.testing.assert_close(out, dense(call, attn_mask=seen), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", WIDE)
def test_a_window_over_everything_at_large_inputs(backend, mode):
    """Logits of hundreds, which estimates from a handful of features would miss by far."""
    call = make_call(by_name("positive"), 130, mode, num_features=4, dtype=torch.float64)
    call.query, call.key = call.query * 12, call.key * 12
    expected = dense(call, is_causal=mode == "causal")
    torch.testing.assert_close(call.run(backend, window=130), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"window": 0}, {"window": 9, "sinks": 2}, {"sinks": 3}])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_estimates_without_error_meet_exact_pairs_seamlessly(backend, mode, options):
    """Features that leave no visible error: softmax, wherever exact pairs end."""
    random = generator(0)
    x = [torch.randn(2, 4, 140, n, generator=random) for n in (2, 2, 3)]
    mask = random_mask(2, 140)
    mask[:, 0] = True
    is_causal = mode == "causal"
    seen = oracle.visible(140, 140, is_causal=is_causal, key_mask=mask)
    exact = F.scaled_dot_product_attention(*x, attn_mask=seen, scale=0.6)
    options = {**options, "is_causal": is_causal, "key_mask": mask, "scale": 0.6}
    out = favor_attention(*x, QuadratureFeatures(), backend=backend, **options)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("input_scale", [0.0, 1e-3, 2.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accurate_to_scale_four(backend, mode, input_scale):
    """Near keys outweigh far ones by powers of e: nothing may be taken from a sum again."""
    call = make_call(
        by_name("positive"),
        200,
        mode,
        batch=1,
        head_dim=64,
        num_features=256,
        input_scale=input_scale,
        window=16,
        sinks=2,
        seed=1,
    )
    check_values(call, backend, 1e-4)


@pytest.mark.parametrize("which", ["near", "far"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_side_far_larger_than_the_other(backend, mode, which):
    """Weights of near and far keys e^30 apart, either way; every tenth key is long."""
    call = make_call(by_name("positive"), 150, mode, batch=1, seed=2, window=4)
    long = (torch.arange(150) % 10 == 0)[:, None]
    sign = torch.ones_like(call.key)
    if which == "near":
        call.key = torch.where(long, 6 * call.query, call.key)
    else:
        call.query = call.query.abs() * 3
        call.key = torch.where(long, call.key.abs() * 4, -call.key.abs() * 2 * sign)
    check_values(call, backend, 1e-4)


@pytest.mark.parametrize("input_scale", [30.0, 1000.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_averages_at_any_scale(backend, mode, input_scale):
    for name in ("positive", "hyperbolic", "regularized"):
        call = make_call(
            by_name(name), 130, mode, input_scale=input_scale, seed=3, window=9, sinks=2
        )
        call.value = torch.ones_like(call.value)
        torch.testing.assert_close(call.run(backend), call.value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("input_scale", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_finite_forward_and_backward(backend, mode, input_scale):
    for case in covered(EXACT, backend):
        call = make_call(
            case, 130, mode, batch=1, input_scale=input_scale, window=9, sinks=2
        ).leaves()
        out = call.run(backend)
        assert torch.isfinite(out).all(), case
        gradients = torch.autograd.grad(out.square().sum(), call.inputs)
        assert all(torch.isfinite(g).all() for g in gradients), case


@pytest.mark.parametrize("window", [0, 6, 70])
@pytest.mark.parametrize("share", [0.05, 0.7])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend, mode, share, window):
    """Positions count, not keys that take part: a hole in a window is a hole."""
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, 140, mode, heads=4, key_heads=2, seed=4, window=window)
        call.options["key_mask"] = random_mask(2, 140, seed=4, share=share)
        check_values(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to_gives_zeros(backend, mode):
    call = make_call(by_name("positive"), 130, mode, batch=3, seed=5, window=3)
    mask = torch.ones(3, 130, dtype=torch.bool)
    mask[1] = False
    mask[2, :70] = False
    out = call.run(backend, key_mask=mask)
    assert (out[1] == 0).all()
    assert mode == "bidirectional" or (out[2, :, :70] == 0).all()
    call.options["key_mask"] = mask
    check_values(call, backend)


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_masked_keys_and_values_hold_does_not_matter(backend, mode, poison):
    results = []
    for fill in (1.0, poison):
        call = make_call(by_name("positive"), 130, mode, batch=1, seed=6, window=5, sinks=2)
        mask = random_mask(1, 130, seed=6)
        mask[0, :2] = False
        hidden = ~mask[:, None, :, None]
        call.options["key_mask"] = mask
        call.key = call.key.masked_fill(hidden, fill)
        call.value = call.value.masked_fill(hidden, fill)
        call = call.leaves()
        out = call.run(backend)
        results.append((out, *torch.autograd.grad(out.sum(), call.inputs)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
    for gradient in results[1][2:]:
        assert (gradient[hidden.expand_as(gradient)] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_equals_the_unpadded_run(backend, mode, side):
    real, padded = 75, 141
    call = make_call(by_name("positive"), real, mode, batch=1, seed=7, window=6, sinks=3)
    start = padded - real if side == "left" else 0
    rows = slice(start, start + real)
    mask = torch.zeros(1, padded, dtype=torch.bool)
    mask[:, rows] = True
    wide = []
    for x, fill in zip(call.inputs, (3.0, float("nan"), float("nan")), strict=True):
        wide.append(torch.full((1, 2, padded, x.shape[-1]), fill))
        wide[-1][..., rows, :] = x
    out = favor_attention(*wide, call.feature_map, key_mask=mask, backend=backend, **call.options)
    torch.testing.assert_close(out[..., rows, :], call.run(backend), rtol=0, atol=1e-5)
