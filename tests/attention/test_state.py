"""Full sequence = chunks resumed with a state = one step at a time."""

import pytest
import torch

from performers import FavorState, favor_attention
from tests.attention import oracle
from tests.attention.cases import (
    ALL,
    BACKENDS,
    FEW,
    TESTED,
    assert_close_gradients,
    assert_close_rows,
    covers,
    make_call,
    random_mask,
    stream,
    upstream,
)
from tests.features.cases import by_name, generator

LENGTH = 150
SPLITS = {
    "awkward": [1, 62, 1, 1, 20, 65],
    "halves": [75, 75],
    "chunks": [64, 64, 22],
    "empty": [0, 70, 0, 80, 0],
    "steps": [1] * LENGTH,
}


def assert_same_state(first, second, tolerance=1e-5):
    """Equal sums, whatever scale each is kept at."""
    scale = torch.maximum(first.log_scale, second.log_scale).double()
    scale = scale.where(scale > -float("inf"), 0.0)
    sums = [
        [
            state.key_value.double() * (state.log_scale.double() - scale).exp().unsqueeze(-1),
            state.key_sum.double() * (state.log_scale.double() - scale).exp(),
        ]
        for state in (first, second)
    ]
    for a, b in zip(*sums, strict=True):
        size = max(1.0, b.abs().max().item())
        assert (a - b).abs().max() <= tolerance * size


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("case", "split"), [(c, s) for c in ALL for s in SPLITS if s != "steps" or c in FEW], ids=str
)
@pytest.mark.parametrize("backend", TESTED)
def test_pieces_equal_the_whole(backend, case, masked, split):
    """Values; masked tokens in between count for nothing and cost nothing."""
    call = make_call(case, LENGTH, "causal", batch=2, seed=1)
    if masked:
        call.options["key_mask"] = random_mask(2, LENGTH, seed=1)
        call.options["key_mask"][0, :70] = False
    expected, conditioning = call.expected()
    out, state = stream(call, SPLITS[split], backend)
    assert_close_rows(out, expected, conditioning, 2e-5)
    whole, whole_state = call.run(backend, return_state=True)
    assert_close_rows(whole, expected, conditioning, 2e-5)
    assert_same_state(state, whole_state)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_gradients_flow_through_the_state(backend, case, split):
    call = make_call(case, LENGTH, "causal", batch=1, heads=4, key_heads=2, seed=2)
    ours, dense = call.leaves(), call.leaves(torch.float64)
    expected, conditioning = dense.expected()
    out, _ = stream(ours, SPLITS[split], backend)
    weighting = upstream(expected, conditioning)
    assert_close_gradients(
        torch.autograd.grad(out, ours.inputs, weighting.float()),
        torch.autograd.grad(expected, dense.inputs, weighting),
    )


@pytest.mark.parametrize("case", FEW, ids=str)
def test_the_reference_resumes_too(case):
    call = make_call(case, 40, "causal", batch=1, seed=3)
    ours, dense = call.leaves(), call.leaves(torch.float64)
    expected, conditioning = dense.expected()
    out, state = stream(ours, [1, 15, 24], "reference")
    assert_close_rows(out.detach(), expected.detach(), conditioning, 2e-5)
    weighting = upstream(expected, conditioning)
    assert_close_gradients(
        torch.autograd.grad(out, ours.inputs, weighting.float()),
        torch.autograd.grad(expected, dense.inputs, weighting),
    )
    for backend in [name for name in TESTED if covers(name, case)]:
        assert_same_state(state, call.run(backend, return_state=True)[1])


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_backends_read_each_others_states(backend, case):
    call = make_call(case, 40, "causal", batch=1, seed=4)
    expected, conditioning = call.expected()
    for first, second in ((backend, "reference"), ("reference", backend)):
        halves = list(zip(*(x.split(20, dim=-2) for x in call.inputs), strict=True))
        _, state = favor_attention(
            *halves[0], call.feature_map, is_causal=True, return_state=True, backend=first
        )
        out = favor_attention(
            *halves[1], call.feature_map, is_causal=True, state=state, backend=second
        )
        assert_close_rows(out, expected[..., 20:, :], conditioning[..., 20:, :], 2e-5)


@pytest.mark.parametrize("num_heads", [None, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads(backend, num_heads):
    call = make_call(
        by_name("positive"), 80, "causal", heads=4, key_heads=2, num_heads=num_heads, seed=5
    )
    expected, conditioning = call.expected()
    out, state = stream(call, [30, 1, 49], backend)
    assert_close_rows(out, expected, conditioning, 2e-5)
    heads = 4 if num_heads == 4 else 2
    assert state.key_value.shape == (2, heads, call.feature_map.num_features, 8)
    assert state.key_sum.shape == state.log_scale.shape == state.key_value.shape[:3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes_and_size(backend, dtype):
    """Float32 at least, and as large after a thousand tokens as after one."""
    sizes = []
    for length in (1, 1000):
        call = make_call(by_name("positive"), length, "causal", batch=1, dtype=dtype)
        out, state = call.run(backend, return_state=True)
        assert out.dtype == dtype
        wide = torch.promote_types(dtype, torch.float32)
        assert {state.key_value.dtype, state.key_sum.dtype, state.log_scale.dtype} == {wide}
        sizes.append(state.nbytes)
    assert sizes[0] == sizes[1] == 2 * 48 * (8 + 2) * wide.itemsize


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_state_in_float32(backend):
    call = make_call(by_name("positive"), 70, "causal")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = stream(call, [40, 1, 29], backend)
    assert out.dtype == torch.bfloat16
    assert state.key_value.dtype == torch.float32
    plain, _ = stream(call, [40, 1, 29], backend)
    assert torch.equal(out, plain.bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_reorder_as_beam_search_does(backend):
    call = make_call(by_name("positive"), 60, "causal", batch=3, seed=6)
    index = torch.tensor([2, 0, 0, 1])
    _, state = call.run(backend, return_state=True)
    assert state.reorder_(index) is state
    later = make_call(by_name("positive"), 20, "causal", batch=4, seed=7)
    out = favor_attention(
        *later.inputs, call.feature_map, is_causal=True, state=state, backend=backend
    )
    joined = [
        torch.cat((x[index], y), dim=-2) for x, y in zip(call.inputs, later.inputs, strict=True)
    ]
    expected, conditioning = oracle.attend(call.case, call.feature_map, *joined, is_causal=True)
    assert_close_rows(out, expected[..., 60:, :], conditioning[..., 60:, :], 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_call_leaves_the_state_it_was_given_alone(backend):
    call = make_call(by_name("positive"), 60, "causal")
    _, state = call.run(backend, return_state=True)
    before = state.clone()
    for length in (1, 60):
        rows = [x[..., :length, :] for x in call.inputs]
        favor_attention(
            *rows,
            call.feature_map,
            is_causal=True,
            state=state,
            return_state=True,
            backend=backend,
        )
    for name in ("key_value", "key_sum", "log_scale"):
        assert torch.equal(getattr(state, name), getattr(before, name))


@pytest.mark.parametrize("backend", TESTED)
def test_detach_cuts_the_graph_and_clone_keeps_it(backend):
    call = make_call(by_name("positive"), 80, "causal", batch=1, seed=8).leaves()
    expected = call.run(backend).detach()
    out, _ = stream(call, [40, 40], backend, between=FavorState.detach)
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(out[..., 40:, :].sum(), call.inputs)
    assert all((g[..., :40, :] == 0).all() for g in gradients)
    out, _ = stream(call, [40, 40], backend, between=FavorState.clone)
    gradient = torch.autograd.grad(out[..., 40:, :].square().sum(), call.value)[0]
    assert (gradient[..., :40, :] != 0).any()


def test_clone_shares_no_memory_and_to_keeps_the_numbers():
    call = make_call(by_name("positive"), 10, "causal")
    _, state = call.run(return_state=True)
    cloned, moved = state.clone(), state.to("cpu")
    kept = moved.key_value.clone()
    cloned.key_value.zero_()
    assert torch.equal(state.key_value, kept)
    assert moved.nbytes == state.nbytes
    assert state.to("meta").key_sum.device.type == "meta"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_that_has_seen_nothing(backend):
    """A first chunk of masked tokens: zeros, and the next chunk is as if it were the first."""
    call = make_call(by_name("positive"), 70, "causal", batch=1, seed=9)
    out, state = call.run(backend, key_mask=torch.zeros(1, 70, dtype=torch.bool), return_state=True)
    assert (out == 0).all()
    resumed, resumed_state = call.run(backend, state=state, return_state=True)
    plain, plain_state = call.run(backend, return_state=True)
    torch.testing.assert_close(resumed, plain, rtol=0, atol=2e-6)
    assert_same_state(resumed_state, plain_state)
    empty, empty_state = make_call(by_name("positive"), 0, "causal", batch=1).run(return_state=True)
    assert empty.shape[-2] == 0
    torch.testing.assert_close(call.run(backend, state=empty_state), plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_returned_state(backend):
    """A loss on the state reaches keys and values."""
    call = make_call(by_name("positive"), 70, "causal", batch=1).leaves()
    _, state = call.run(backend, return_state=True)
    weight = torch.randn(state.key_value.shape, generator=generator(0))
    (state.key_value * weight).sum().backward()
    assert call.key.grad.abs().max() > 0
    assert call.value.grad.abs().max() > 0
