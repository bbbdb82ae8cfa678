"""Key masks act on keys, numerator and denominator alike."""

import pytest
import torch

from tests.attention.cases import (
    POSITIVE,
    STREAMED,
    assert_equal,
    check_against_oracle,
    law,
    make_call,
    random_mask,
    stream,
    with_gradients,
)

POISON = (float("nan"), float("inf"), -float("inf"), 1e30, 0.0)


def filled(call, fill):
    """The same call with other masked keys and values."""
    hidden = ~call.options["key_mask"][:, None, :, None]
    key, value = (x.masked_fill(hidden, fill) for x in (call.key, call.value))
    return call.with_inputs(call.query, key, value)


@pytest.mark.parametrize("poison", POISON, ids=str)
@law()
def test_the_content_of_masked_keys_is_never_seen(
    backend, case, configuration, mode, poison, device
):
    call = make_call(case, 130, mode, configuration, seed=3, device=device)
    call.options["key_mask"] = random_mask(*call.key.shape[:3:2], seed=3).to(device)
    call.options["key_mask"][:, :2] = False
    clean = with_gradients(filled(call, 1.0), backend)
    poisoned = with_gradients(filled(call, poison), backend)
    assert_equal(clean, poisoned)
    hidden = ~call.options["key_mask"][:, None, :, None]
    for gradient in poisoned[2:]:
        assert (gradient[hidden.expand_as(gradient)] == 0).all()


@pytest.mark.parametrize("poison", POISON[::2], ids=str)
@law(configurations=STREAMED)
def test_the_content_of_masked_keys_is_never_seen_by_later_calls(backend, configuration, poison):
    call = make_call(POSITIVE, 172, "causal", configuration, seed=6)
    call.options["key_mask"] = random_mask(2, 172, seed=6)
    call.options["key_mask"][0, 20:90] = False
    results = []
    for fill in (1.0, poison):
        leaves = filled(call, fill).leaves()
        out, _ = stream(leaves, [1, 7, 64, 9, 9, 82], backend)
        results.append((out, *torch.autograd.grad(out.sum(), leaves.inputs)))
    assert_equal(*results)


@law()
def test_nothing_to_attend_to_gives_zeros(backend, case, configuration, mode, device):
    """The last batch row has no key, and the first keys are masked in all."""
    call = make_call(case, 130, mode, configuration, batch=3, seed=5, device=device)
    mask = torch.ones(*call.key.shape[:3:2], dtype=torch.bool, device=device)
    mask[:, :70], mask[-1] = False, False
    call.options["key_mask"] = mask
    check_against_oracle(call, backend)
    out, *gradients = with_gradients(call, backend)
    for x in (out, *gradients):
        assert torch.isfinite(x).all()
        assert (x[-1] == 0).all()
    assert mode != "causal" or (out[..., :70, :] == 0).all()


@law()
def test_a_mask_of_one_row_or_of_nothing(backend, configuration, mode):
    """A batch of one that skips its mask is a known defect elsewhere."""
    call = make_call(POSITIVE, 70, mode, configuration, batch=1, seed=7)
    call.options.pop("key_mask", None)
    plain, shape = call.run(backend), call.key.shape[:3:2]
    full = call.run(backend, key_mask=torch.ones(shape, dtype=torch.bool))
    torch.testing.assert_close(full, plain, rtol=1e-6, atol=2e-6)
    mask = random_mask(*shape, seed=6)
    masked = call.run(backend, key_mask=mask)
    assert not torch.allclose(masked, plain, atol=1e-3)
    strided = torch.stack((mask, ~mask), dim=-1)[..., 0]
    assert torch.equal(masked, call.run(backend, key_mask=strided))
