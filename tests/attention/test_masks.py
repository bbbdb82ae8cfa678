"""Key masks act on keys, numerator and denominator alike."""

import pytest
import torch

from performers import favor_attention
from tests.attention.cases import (
    ALL,
    BACKENDS,
    FEW,
    MODES,
    TESTED,
    assert_close_rows,
    check_against_oracle,
    make_call,
    random_mask,
)
from tests.features.cases import by_name, generator

POISON = (float("nan"), float("inf"), -float("inf"), 1e30, 0.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_values_and_gradients(backend, case, mode):
    call = make_call(case, 70, mode, seed=1)
    call.options["key_mask"] = random_mask(2, call.key.shape[2], seed=1)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("share", [0.02, 0.98])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "relu"])
@pytest.mark.parametrize("backend", TESTED)
def test_sparse_and_dense_masks(backend, name, mode, share):
    call = make_call(by_name(name), 200, mode, heads=4, key_heads=2, seed=2)
    call.options["key_mask"] = random_mask(2, call.key.shape[2], seed=2, share=share)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("poison", POISON, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_what_masked_keys_and_values_hold_does_not_matter(backend, case, mode, poison):
    results = []
    for fill in (1.0, poison):
        call = make_call(case, 70, mode, batch=1, seed=3)
        mask = random_mask(1, call.key.shape[2], seed=3)
        hidden = ~mask[:, None, :, None]
        call.options["key_mask"] = mask
        call.key = call.key.masked_fill(hidden, fill)
        call.value = call.value.masked_fill(hidden, fill)
        call = call.leaves()
        out = call.run(backend)
        results.append((out, *torch.autograd.grad(out.sum(), call.inputs)))
    for clean, poisoned in zip(*results, strict=True):
        assert torch.isfinite(poisoned).all()
        assert torch.equal(clean, poisoned)
    for gradient in results[1][2:]:
        assert (gradient[hidden.expand_as(gradient)] == 0).all()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_reference_ignores_masked_content_too(case):
    for mode in MODES:
        outputs = []
        for fill in (1.0, *POISON):
            call = make_call(case, 20, mode, batch=1)
            call.options["key_mask"] = random_mask(1, call.key.shape[2], seed=4)
            hidden = ~call.options["key_mask"][:, None, :, None]
            call.key = call.key.masked_fill(hidden, fill)
            call.value = call.value.masked_fill(hidden, fill)
            outputs.append(call.run("reference"))
        assert all(torch.equal(outputs[0], out) for out in outputs[1:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_attend_to_gives_zeros(backend, case, mode):
    """A batch row without any key, and one whose first keys are masked."""
    call = make_call(case, 70, mode, batch=3, seed=5).leaves()
    mask = torch.ones(3, call.key.shape[2], dtype=torch.bool)
    mask[1] = False
    mask[2, :3] = False
    call.options["key_mask"] = mask
    out = call.run(backend)
    assert (out[1] == 0).all()
    if mode == "causal":
        assert (out[2, :, :3] == 0).all()
    expected, conditioning = call.expected()
    assert_close_rows(out, expected, conditioning, 2e-5)
    for gradient in torch.autograd.grad(out.square().sum(), call.inputs):
        assert torch.isfinite(gradient).all()
        assert (gradient[1] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_of_one_is_masked(backend, mode):
    """A batch of one that skips its mask is a known defect elsewhere."""
    call = make_call(by_name("positive"), 70, mode, batch=1, seed=6)
    unmasked = call.run(backend)
    call.options["key_mask"] = random_mask(1, call.key.shape[2], seed=6)
    assert not torch.allclose(call.run(backend), unmasked, atol=1e-3)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_hides_nothing_changes_nothing(backend, mode):
    call = make_call(by_name("positive"), 70, mode, seed=7)
    mask = torch.ones(2, call.key.shape[2], dtype=torch.bool)
    torch.testing.assert_close(
        call.run(backend), call.run(backend, key_mask=mask), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_strided_or_expanded_mask(backend):
    call = make_call(by_name("positive"), 70, seed=8)
    mask = random_mask(1, 70, seed=8)
    strided = torch.stack((mask, ~mask), dim=-1)[..., 0].expand(2, -1)
    plain = call.run(backend, key_mask=mask.repeat(2, 1))
    assert torch.equal(plain, call.run(backend, key_mask=strided))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "relu", "exp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_equals_the_unpadded_run(backend, name, mode, side):
    real, padded = 75, 131
    call = make_call(by_name(name), real, mode, batch=1, seed=9)
    start = padded - real if side == "left" else 0
    rows = slice(start, start + real)

    def pad(x, fill):
        wide = torch.full((1, 2, padded, x.shape[-1]), fill)
        wide[..., rows, :] = x
        return wide

    mask = torch.zeros(1, padded, dtype=torch.bool)
    mask[:, rows] = True
    expected = call.leaves()
    weight = torch.randn(1, 2, real, 8, generator=generator(0))
    wanted_out = expected.run(backend)
    wanted = torch.autograd.grad(wanted_out, expected.inputs, weight)
    inputs = [
        pad(x, fill).requires_grad_()
        for x, fill in zip(call.inputs, (3.0, float("nan"), float("nan")), strict=True)
    ]
    out = favor_attention(*inputs, call.feature_map, key_mask=mask, backend=backend, **call.options)
    torch.testing.assert_close(out[..., rows, :], wanted_out, rtol=0, atol=1e-5)
    for a, b in zip(torch.autograd.grad(out, inputs, pad(weight, 0.0)), wanted, strict=True):
        torch.testing.assert_close(a[..., rows, :], b, rtol=0, atol=2e-5)
        outside = torch.ones(padded, dtype=torch.bool)
        outside[rows] = False
        assert (a[..., outside, :] == 0).all()
