"""``sinks``: the first keys that take part are exact for every query."""

import pytest
import torch
from torch.nn import functional as F

from performers import favor_attention
from tests.attention import oracle
from tests.attention.cases import (
    BACKENDS,
    EXACT,
    FEW_EXACT,
    MODES,
    TESTED,
    check_against_oracle,
    covered,
    make_call,
    random_mask,
)
from tests.features.cases import by_name


def check_values(call, backend, tolerance=2e-5):
    check_against_oracle(call, backend, value_tolerance=tolerance, gradients=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map(backend, case, mode):
    check_values(make_call(case, 131, mode, sinks=4), backend)


@pytest.mark.parametrize("sinks", [1, 2, 64, 65, 300])
@pytest.mark.parametrize("length", [1, 2, 64, 150])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_awkward_lengths(backend, mode, length, sinks):
    for case in covered(FEW_EXACT, backend):
        check_values(make_call(case, length, mode, seed=length, sinks=sinks), backend)


@pytest.mark.parametrize(("length", "size"), [(1, 300), (300, 1), (65, 64), (3, 129)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_attention_sizes(backend, length, size):
    """As many queries as there are keys is no condition, unlike for a window."""
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, length, "cross", size=size, heads=4, key_heads=2, sinks=3)
        check_values(call, backend)
        call.options["key_mask"] = random_mask(2, size, seed=1)
        call.options["key_mask"][0, :5] = False
        check_values(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_one_block(backend, mode):
    call = make_call(
        by_name("positive"), 700, mode, batch=1, heads=4, num_features=1024, head_dim=8, sinks=5
    )
    check_values(call, backend)


@pytest.mark.parametrize("sinks", [130, 131, 1000])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_over_everything_are_softmax(backend, mode, sinks):
    call = make_call(
        by_name("positive"), 130, mode, heads=4, key_heads=2, num_features=4, sinks=sinks
    )
    exact = F.scaled_dot_product_attention(
        *call.inputs, enable_gqa=True, is_causal=mode == "causal"
    )
    torch.testing.assert_close(call.run(backend), exact, rtol=0, atol=1e-5)
    mask = random_mask(2, call.key.shape[-2])
    mask[:, 0] = True
    seen = oracle.visible(130, call.key.shape[-2], is_causal=mode == "causal", key_mask=mask)
    exact = F.scaled_dot_product_attention(*call.inputs, enable_gqa=True, attn_mask=seen)
    torch.testing.assert_close(call.run(backend, key_mask=mask), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "window", "sinks"),
    [("causal", 14, 20), ("causal", 29, 30), ("bidirectional", 29, 30), ("bidirectional", 29, 1)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_is_a_sink_and_near_counts_once(backend, mode, window, sinks):
    """Together they cover everything: softmax."""
    call = make_call(by_name("positive"), 30, mode, num_features=4, window=window, sinks=sinks)
    exact = F.scaled_dot_product_attention(*call.inputs, is_causal=mode == "causal")
    torch.testing.assert_close(call.run(backend), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 0, 4])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_are_the_first_keys_that_take_part(backend, mode, window):
    """Rows of one batch have theirs at different places, some fewer than asked for."""
    mask = torch.ones(5, 140, dtype=torch.bool)
    mask[1, :70] = False
    mask[2, :138] = False
    mask[3] = random_mask(1, 140, seed=1, share=0.1)[0]
    mask[4] = False
    for case in covered(FEW_EXACT, backend):
        call = make_call(case, 140, mode, batch=5, sinks=3, window=window, key_mask=mask)
        check_values(call, backend)
        assert (call.run(backend)[4] == 0).all()


@pytest.mark.parametrize("padding", [1, 64, 100])
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_left_padding_changes_nothing(backend, mode, padding):
    call = make_call(by_name("positive"), 80, mode, batch=1, sinks=4, window=3)
    padded = [F.pad(x, (0, 0, padding, 0), value=7.0) for x in call.inputs]
    mask = torch.arange(80 + padding)[None] >= padding
    out = favor_attention(*padded, call.feature_map, key_mask=mask, backend=backend, **call.options)
    torch.testing.assert_close(out[..., padding:, :], call.run(backend), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_that_outweighs_everything(backend, mode):
    """Most of the attention on the first key, as in pretrained decoders, and tiny values there."""
    call = make_call(by_name("positive"), 150, mode, batch=1, heads=1, sinks=1)
    direction = call.key[:, :, :1].clone()
    call.query = call.query + 3 * direction / direction.norm()
    call.key[:, :, :1] = 6 * direction / direction.norm() * 4
    call.value[:, :, :1] *= 1e-3
    check_values(call, backend, 1e-4)
    call.options["window"] = 5 if mode != "cross" else None
    check_values(call, backend, 1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sink_that_weighs_nothing(backend, mode):
    """Its weight underflows next to the others': the far field must not be lost with it."""
    call = make_call(by_name("positive"), 150, mode, batch=1, heads=1, sinks=1)
    call.query = call.query.abs()
    call.key = call.key.abs()
    call.key[:, :, :1] *= -40
    check_values(call, backend, 1e-4)
