"""Gradients through windows and sinks."""

import copy

import pytest
import torch
from torch.nn import functional as F

from performers import favor_attention
from tests.attention.cases import (
    BACKENDS,
    EXACT,
    FEW_EXACT,
    TESTED,
    WIDE,
    assert_close_gradients,
    check_against_oracle,
    covered,
    make_call,
    random_mask,
)
from tests.features.cases import by_name, generator

MODES = ("bidirectional", "causal")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_map(backend, case, mode):
    call = make_call(case, 100, mode, heads=4, key_heads=2, seed=1, window=9, sinks=3)
    call.options["key_mask"] = random_mask(2, 100, seed=1)
    check_against_oracle(call, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sinks_in_cross_attention(backend):
    for case in covered(FEW_EXACT, backend):
        check_against_oracle(make_call(case, 100, "cross", sinks=4, seed=2), backend)


@pytest.mark.parametrize("sinks", [0, 70])
@pytest.mark.parametrize("window", [None, 0, 1, 64, 200])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_windows_and_lengths(backend, mode, window, sinks):
    for length in (1, 65, 150):
        call = make_call(
            by_name("positive"), length, mode, batch=1, window=window, sinks=sinks, seed=length
        )
        check_against_oracle(call, backend)


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_more_than_one_block(backend, mode):
    """Blocks whose features are computed again in the backward pass."""
    call = make_call(
        by_name("positive"),
        700,
        mode,
        batch=1,
        heads=4,
        num_features=1024,
        head_dim=8,
        window=70,
        sinks=2,
    )
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_packed(backend, mode):
    offsets = torch.tensor([0, 3, 3, 66, 70, 140])
    call = make_call(by_name("positive"), 140, mode, batch=1, cu_seqlens=offsets)
    call.options |= {"window": 6, "sinks": 2, "key_mask": random_mask(1, 140, seed=3)}
    check_against_oracle(call, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_everything_has_the_gradients_of_softmax(backend, mode):
    call = make_call(by_name("positive"), 130, mode, heads=4, key_heads=2, num_features=4)
    ours, dense = call.leaves(), call.leaves()
    out = ours.run(backend, window=130)
    expected = F.scaled_dot_product_attention(
        *dense.inputs, is_causal=mode == "causal", enable_gqa=True
    )
    weight = torch.randn(out.shape, generator=generator(0))
    assert_close_gradients(
        torch.autograd.grad(out, ours.inputs, weight),
        torch.autograd.grad(expected, dense.inputs, weight),
        2e-5,
    )


@pytest.mark.parametrize("input_scale", [2.0, 4.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_to_scale_four(backend, mode, input_scale):
    call = make_call(
        by_name("positive"),
        130,
        mode,
        batch=1,
        head_dim=64,
        num_features=256,
        input_scale=input_scale,
        window=9,
        sinks=2,
        seed=2,
    )
    check_against_oracle(call, backend, value_tolerance=1e-4, gradient_tolerance=2e-4)


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("bidirectional", {"window": 1}),
        ("bidirectional", {"window": 0, "sinks": 2}),
        ("causal", {"window": 1}),
        ("causal", {"window": 2, "sinks": 2}),
        ("causal", {"sinks": 1}),
        ("cross", {"sinks": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", WIDE)
def test_gradcheck(backend, case, mode, options):
    call = make_call(
        case,
        6,
        mode,
        batch=1,
        heads=2,
        key_heads=1,
        head_dim=3,
        value_dim=2,
        num_features=4,
        dtype=torch.float64,
        seed=7,
        **options,
    ).leaves()
    call.options["key_mask"] = torch.arange(call.key.shape[2])[None] != 1

    def run(query, key, value):
        call.query, call.key, call.value = query, key, value
        return call.run(backend)

    assert torch.autograd.gradcheck(run, call.inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{"window": 3, "sinks": 2}, {"window": 66}], ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", WIDE)
def test_gradcheck_across_a_chunk_boundary(backend, mode, options):
    call = make_call(
        by_name("positive"),
        69,
        mode,
        batch=1,
        heads=1,
        head_dim=2,
        value_dim=1,
        num_features=4,
        dtype=torch.float64,
        seed=8,
        **options,
    ).leaves()

    def run(query, key, value):
        call.query, call.key, call.value = query, key, value
        return call.run(backend)

    assert torch.autograd.gradcheck(run, call.inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision(backend, mode, dtype):
    call = make_call(by_name("positive"), 130, mode, seed=5, window=9, sinks=2)
    call.query, call.key, call.value = (x.to(dtype) for x in call.inputs)
    ours, dense = call.leaves(), call.leaves(torch.float64)
    weight = torch.randn(2, 2, 130, 8, generator=generator(1)).to(dtype)
    got = torch.autograd.grad(ours.run(backend), ours.inputs, weight)
    wanted = torch.autograd.grad(dense.expected()[0], dense.inputs, weight.double())
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 4 * torch.finfo(dtype).eps * b.abs().max()


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("length", [50, 1500])
@pytest.mark.parametrize("backend", TESTED)
def test_a_redraw_between_forward_and_backward_changes_no_gradient(backend, length, is_causal):
    mode = "causal" if is_causal else "bidirectional"
    call = make_call(
        by_name("positive"), length, mode, batch=1, heads=4, num_features=256, window=7, sinks=1
    ).leaves()

    def gradient(redraw):
        feature_map = copy.deepcopy(call.feature_map)
        out = favor_attention(*call.inputs, feature_map, backend=backend, **call.options)
        if redraw:
            feature_map.redraw_()
        return torch.autograd.grad(out.square().sum(), call.query)[0]

    assert torch.equal(gradient(redraw=True), gradient(redraw=False))


@pytest.mark.parametrize("mode", MODES)
def test_torch_func(mode):
    """A short call keeps its features: it works under torch.func, which cannot recompute."""
    call = make_call(by_name("positive"), 100, mode, window=7, sinks=2)

    def loss(query):
        call.query = query
        return call.run("torch").square().sum()

    query = call.query
    found = torch.func.grad(loss)(query)
    query = query.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(loss(query), query)[0])
