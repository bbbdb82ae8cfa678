"""Windows and sinks in the compiled kernels, against their definition in float64.

``exact_problems.dense`` is that definition. Everything here is put to the kernels directly.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from performers.attention.native.operators import favor_backward, favor_forward
from performers.attention.operators import Inputs
from performers.attention.state import FavorState
from tests.attention.native.exact_problems import Exact, dense, make
from tests.attention.native.support import NATIVE, threads
from tests.features.cases import generator

pytestmark = NATIVE

WINDOWS = (0, 1, 20, 32, 63, 64, 65, 100, 500)
KINDS = {
    "plain": {},
    "masks, sinks and a bias": {"masked": 0.6, "sinks": 3, "bias": True},
    "groups, odd sizes": {"groups": 2, "num_heads": 2, "value_dim": 19, "head_dim": 7},
    "many sinks": {"sinks": 70, "groups": 3, "key_heads": 1},
    "trained": {"bias": True, "num_heads": 2, "trained": True, "masked": 0.8},
    "trained and shared": {"groups": 2, "head_dim": 9, "trained": True, "sinks": 1},
}


def gradients(out, leaves, seed=3):
    weight = torch.randn(out.shape, generator=generator(seed)).to(out.dtype)
    found = torch.autograd.grad(out, leaves, weight, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def assert_gradients(got, wanted, tolerance=1e-5):
    for a, b in zip(got, wanted, strict=True):
        assert a.isfinite().all()
        assert (a - b).abs().max() <= tolerance * max(b.abs().max(), 0.3)


def check(call: Exact, tolerance=4e-6, gradient_tolerance=1e-5):
    """Values and gradients of all leaves."""
    ours, wide = call.to(torch.float32), call.to(torch.float64)
    (out, _), expected = ours.run(), dense(wide)
    assert out.shape == expected.shape
    assert (out - expected).abs().max() <= tolerance
    assert_gradients(
        gradients(out, ours.leaves), gradients(expected, wide.leaves), gradient_tolerance
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_values_and_gradients(window, causal, kind):
    for length in (5, 130):
        check(make(length, window, causal=causal, seed=length, **KINDS[kind]))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 5, 64, 130, 200])
def test_sinks_without_a_window(length, causal):
    check(make(length, None, causal=causal, sinks=4, groups=2))
    check(make(length, None, causal=causal, sinks=70, masked=0.7, bias=True, trained=True))


@pytest.mark.parametrize("sizes", [(10, 200), (200, 10), (130, 70), (70, 130)])
@pytest.mark.parametrize(("window", "sinks"), [*product((0, 30, 64, 100), (0, 2)), (None, 2)])
def test_other_lengths_of_keys(window, sizes, sinks):
    check(make(sizes[0], window, size=sizes[1], causal=False, sinks=sinks, masked=0.8))


@pytest.mark.exhaustive
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("window", "sinks"), [*product((0, 10, 64, 100), (0, 3)), (None, 3)])
def test_packed_sequences(window, causal, sinks):
    """With sequences of no and of one position, and some that end inside blocks."""
    for lengths in ([30, 1, 0, 170, 64], [1] * 5 + [200]):
        options = {"lengths": lengths, "causal": causal, "sinks": sinks}
        check(make(sum(lengths), window, **options))
        check(make(sum(lengths), window, masked=0.7, groups=2, trained=True, **options))


def resumed(length, window, sinks=0, seed=0, **options):
    """A call that begins in the middle: with sums of an earlier past, and tail keys."""
    tail = window or 0
    call = make(length, window, size=length + tail, seed=seed, **options)
    random = generator(seed + 1)
    batch, heads, _, width = call.value.shape
    shape = (batch, heads, call.weight.shape[-2])
    call.state = FavorState(
        torch.randn(*shape, width, generator=random),
        torch.rand(shape, generator=random) + 1,
        torch.randn(shape, generator=random),
    )
    call.offset = tail
    if sinks:
        call.sink_key = torch.randn(batch, heads, sinks, call.key.shape[-1], generator=random)
        call.sink_value = torch.randn(batch, heads, sinks, width, generator=random)
        call.first = torch.randint(0, length, (batch, sinks), generator=random)
        call.first[0, 0] = 0
    return call


@pytest.mark.parametrize(("window", "sinks"), [*product((0, 1, 20, 64, 100), (0, 3)), (None, 3)])
@pytest.mark.parametrize("length", [1, 2, 64, 150])
def test_calls_that_begin_with_a_state(length, window, sinks):
    check(resumed(length, window, sinks))
    check(resumed(length, window, sinks, masked=0.7, groups=2, bias=True, trained=True))


def summed(call: Exact, keep: int):
    """Sums over the first ``keep`` keys and those before them, at scale one, in float64."""
    scale = call.query.shape[-1] ** -0.25
    key, value = call.key[:, :, :keep].double() * scale, call.value[:, :, :keep].double()
    phi = (key @ call.weight.mT - key.square().sum(-1, keepdim=True) / 2).exp()
    if call.mask is not None:
        phi = phi.where(call.mask[:, None, :keep, None], 0)
        value = value.where(call.mask[:, None, :keep, None], 0)
    key_value, key_sum = phi.mT @ value, phi.sum(-2)
    if call.state is not None:
        unit = call.state.log_scale.double().exp()
        key_value = key_value + call.state.key_value.double() * unit.unsqueeze(-1)
        key_sum = key_sum + call.state.key_sum.double() * unit
    return key_value, key_sum


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("window", [0, 1, 30, 64, 100])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_the_sums_that_are_left(length, window, with_state):
    """Over all keys but the last ``window``, with gradients."""
    make_call = resumed if with_state else make
    call = replace(make_call(length, window, masked=0.8, trained=True), return_state=True)
    ours, wide = call.to(torch.float32), call.to(torch.float64)
    out, state = ours.run()
    expected = summed(wide, max(0, call.key.shape[2] - window))
    unit = state.log_scale.double().exp()
    found = (state.key_value * unit.unsqueeze(-1), state.key_sum * unit)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(b.abs().max(), 1e-3)
    if not found[0].requires_grad:
        return
    loss = sum(x.sum() for x in found) + out.double().sum()
    wanted = sum(x.sum() for x in expected) + dense(wide).sum()
    got = torch.autograd.grad(loss, ours.leaves, allow_unused=True)
    assert_gradients(got, torch.autograd.grad(wanted, wide.leaves, allow_unused=True))


def in_chunks(call: Exact, lengths):
    """The call resumed from state to state; keeps tail keys and sinks as a caller would."""
    window, outputs, state, begin = call.window or 0, [], None, 0
    batch, _, size, _ = call.key.shape
    mask = torch.ones(batch, size, dtype=torch.bool) if call.mask is None else call.mask
    for length in lengths:
        tail = 0 if state is None else window
        rows = torch.arange(begin - tail, begin + length)
        there = (rows >= 0) & mask[:, rows.clamp(min=0)]
        part = replace(
            call,
            query=call.query[..., begin : begin + length, :],
            key=call.key[:, :, rows.clamp(min=0)],
            value=call.value[:, :, rows.clamp(min=0)],
            mask=there,
            first=None if call.first is None else (call.first - begin).clamp(0, length),
            state=state,
            offset=tail,
            return_state=True,
        )
        out, state = part.run()
        outputs.append(out)
        begin += length
    return torch.cat(outputs, -2), state


@pytest.mark.parametrize(("window", "sinks"), [*product((0, 1, 30, 64, 100), (0, 3)), (None, 3)])
@pytest.mark.parametrize("lengths", [[30, 100], [64, 64, 2], [1] * 20 + [110], [100] + [1] * 30])
def test_chunks_with_a_state_are_the_whole(lengths, window, sinks):
    call = make(130, window, sinks=sinks, masked=0.8, groups=2)
    ours, chunks = call.to(torch.float32), replace(call.to(torch.float32))
    (out, state), (joined, last) = (
        replace(ours, return_state=True).run(),
        in_chunks(chunks, lengths),
    )
    assert (out - joined).abs().max() <= 4e-6
    torch.testing.assert_close(
        last.key_sum * last.log_scale.exp(), state.key_sum * state.log_scale.exp()
    )
    assert_gradients(gradients(joined, chunks.leaves), gradients(out, ours.leaves))


@pytest.mark.parametrize("window", [0, 10, 63, 64, 100])
@pytest.mark.parametrize("size", [1.0, 1e3, 1e6, 1e12])
def test_later_tokens_move_nothing_earlier(window, size):
    """Neither outputs nor, by so much as rounding would, gradients."""
    for at in (40, 70, 127):
        call = make(190, window, sinks=2, input_scale=1.5)
        before = call.to(torch.float32)
        out = before.run()[0][..., :at, :]
        wanted = torch.autograd.grad(out.square().sum(), before.leaves)
        after = call.to(torch.float32)
        with torch.no_grad():
            for x in (after.query, after.key, after.value):
                x[..., at:, :] *= size
            after.key[..., at + 1 :, :] *= 0
        moved = after.run()[0][..., :at, :]
        assert (moved - out).abs().max() <= 4e-6
        got = torch.autograd.grad(moved.square().sum(), after.leaves)
        assert_gradients(got, wanted, 2e-5)
        assert all((g[..., at:, :] == 0).all() for g in got[:3])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("sinks", [0, 3])
def test_a_window_over_everything_is_exact_attention(causal, sinks):
    for window in (199, 200, 10**6, 2**40):
        call = make(200, window, causal=causal, sinks=sinks, groups=2, input_scale=3.0)
        out, _ = call.run()
        key, value = (x[:, :, None].expand(-1, -1, 2, -1, -1) for x in (call.key, call.value))
        expected = F.scaled_dot_product_attention(call.query, key, value, is_causal=causal)
        assert (out - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 30, 64])
@pytest.mark.parametrize("scale", [4.0, 8.0, 15.0])
def test_long_inputs(scale, window, causal):
    """What is left is the rounding of exponents, which float32 knows to 6e-8 of their size."""
    call = make(200, window, causal=causal, input_scale=scale, sinks=2, masked=0.8)
    size = (call.key.square().sum(-1).max() / 2 / 4 + 5 * call.key.norm(dim=-1).max() / 2).item()
    check(call, 4e-7 * max(size, 20), 4e-6 * max(size, 20))


@pytest.mark.parametrize("window", [0, 20, 63, 64])
@pytest.mark.parametrize("size", [20, 60])
def test_rows_that_a_short_key_would_hide(window, size):
    """Long keys, of which many share a row, but one short key in 64 with by far larger features."""
    call = make(200, window, num_features=16, seed=5)
    along = torch.randn(call.key.shape[-1], generator=generator(9))
    call.key = call.key / 2 + size * along / along.norm()
    call.key[..., 63::64, :] *= 0.1 / size
    exponent = size**2 / 8 + size * 3
    check(call, 4e-7 * exponent, 4e-6 * exponent)


@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_see_nothing(causal):
    for window, sinks in ((10, 0), (70, 0), (10, 3), (None, 3)):
        call = make(150, window, causal=causal, sinks=sinks)
        call.mask = torch.ones(2, 150, dtype=torch.bool) if call.mask is None else call.mask
        call.mask[0] = False
        call.mask[1, :100] = False
        if call.first is not None:
            call.first[0] = 150
        for x in (call.key, call.value):
            x[0] = torch.nan
            x[1, :, :100] = torch.inf
        ours, wide = call.to(torch.float32), call.to(torch.float64)
        out, _ = ours.run()
        assert (out[0] == 0).all()
        assert (out - dense(wide)).abs().max() <= 4e-6
        for got in gradients(out, ours.leaves):
            assert got.isfinite().all()
            assert (got[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [20, 64, None])
def test_half_precision_inputs(window, causal, dtype):
    """Only inputs and gradients are rounded: many passes share a gradient, none a rounding."""
    call = make(150, window, causal=causal, sinks=3, groups=2)
    half = call.to(dtype)
    full = half.to(torch.float32)
    (out, _), (expected, _) = half.run(), full.run()
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    got, wanted = gradients(out, half.leaves), gradients(expected, full.leaves)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b.to(dtype))


@pytest.mark.exhaustive
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 50, 64, 300, None])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_heads_cut_among_threads(count, window, causal):
    options = {"sinks": 3, "num_features": 8, "trained": True, "bias": True}
    call = make(1500, window, causal=causal, batch=1, key_heads=1, **options)
    ours, other = call.to(torch.float32), call.to(torch.float32)
    with threads(1):
        expected, _ = ours.run()
        wanted = gradients(expected, ours.leaves)
    with threads(count):
        out, _ = other.run()
        got = gradients(out, other.leaves)
    assert (out - expected).abs().max() <= 4e-6
    assert_gradients(got, wanted)
    assert (out - dense(call.to(torch.float64))).abs().max() <= 4e-6


@pytest.mark.parametrize("count", [1, 3])
def test_many_heads_and_sequences(count):
    """More than one batch of sequences is held in memory at a time."""
    with threads(count):
        check(make(100, 20, causal=False, batch=7, key_heads=5, groups=1, sinks=1))
        check(make(300, 16, causal=False, lengths=[7] * 40 + [20], key_heads=3, trained=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [20, None])
def test_views_with_any_strides(window, causal):
    call = make(100, window, causal=causal, sinks=3, groups=2)
    out, _ = call.run()
    spread = replace(
        call,
        **{
            name: getattr(call, name)
            .repeat_interleave(2, -1)[..., ::2]
            .transpose(1, -2)
            .contiguous()
            .transpose(1, -2)
            for name in ("query", "key", "value", "sink_key", "sink_value")
        },
    )
    ours, other = call.to(torch.float32), spread
    for x in other.leaves:
        x.requires_grad_()
    again, _ = other.run()
    assert torch.equal(out, again)
    got, wanted = gradients(again, other.leaves), gradients(ours.run()[0], ours.leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


CALLS = {
    "window": {"window": 3},
    "window, bidirectional": {"window": 3, "causal": False},
    "sinks": {"window": None, "sinks": 2},
    "sinks, bidirectional": {"window": None, "sinks": 2, "causal": False},
    "both, packed": {"window": 2, "sinks": 2, "lengths": [3, 0, 4, 5], "masked": 0.8},
    "both, packed, bidirectional": {
        "window": 2,
        "sinks": 2,
        "lengths": [3, 0, 4, 5],
        "causal": False,
    },
}


def operator_arguments(name, state=False):
    options = CALLS[name]
    call = make(12, key_heads=2, groups=2, num_features=10, **options)
    if state:
        call = resumed(12, options["window"], options.get("sinks", 0))
    call = replace(call, return_state=state).to(torch.float32)
    return Inputs.of(call.problem())


@pytest.mark.parametrize(
    ("name", "state"), [*product(CALLS, (False,)), ("window", True), ("sinks", True)]
)
def test_the_contract_of_operators(name, state):
    given = operator_arguments(name, state)
    torch.library.opcheck(favor_forward, given)
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in given]
    results = favor_forward(*given)
    return_state = given[-1]
    random = generator(1)
    grads = [torch.randn(x.shape, generator=random) for x in (results[0], *results[3:5])]
    final = grads[1:] if return_state else (None, None)
    torch.library.opcheck(favor_backward, (grads[0], *final, None, *given, *results, False))


@pytest.mark.parametrize("name", CALLS)
def test_every_result_is_written(name, monkeypatch):
    """New memory is poisoned: what a kernel does not write shows up as NaN."""
    given = operator_arguments(name)
    with torch.no_grad():
        expected = favor_forward(*given)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        results = favor_forward(*given)
        leaves = [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad]
        found = torch.autograd.grad(results[0].sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert all(g.isfinite().all() for g in found)
