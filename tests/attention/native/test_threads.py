"""Any number of threads gives the same: to the bit when heads fill them, else to rounding."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from performers import FavorState
from tests.attention.cases import (
    CASES,
    MODES,
    POSITIVE,
    SELF,
    assert_close_gradients,
    check_against_oracle,
    law,
    make_call,
    random_mask,
    trained,
    with_gradients,
)
from tests.attention.native.support import NATIVE, threads
from tests.features.cases import generator

pytestmark = NATIVE

# A head is cut into parts of at least this many positions: kSmallestPart in csrc/tasks.h.
SMALLEST_PART = 256
LONG = 4 * SMALLEST_PART + 77
# Of four parts of LONG, the first and the second; keys there may all be masked.
FIRST, SECOND = slice(0, 320), slice(320, 640)


def one_head(name, mode, length=LONG, masked=SECOND, **options):
    sizes = {"heads": 1, "head_dim": 8, "value_dim": 11, "num_features": 21, **options}
    size = length if mode == "cross" else None
    call = make_call(CASES[name], length, mode, size=size, **{"batch": 1, **sizes})
    call.options["key_mask"] = random_mask(call.key.shape[0], length)
    call.options["key_mask"][:, masked] = False
    return call


@pytest.mark.parametrize("length", [1, 70, 600])
@pytest.mark.parametrize("name", ["positive", "relu"])
@law()
def test_heads_that_fill_the_threads_are_not_cut(name, configuration, mode, length):
    sizes = {"batch": 3, "heads": 4, "key_heads": 4, "num_features": 20}
    call = make_call(CASES[name], length, mode, configuration, **sizes)
    with threads(1):
        expected = with_gradients(call, "native")
    for count in (2, 3):
        with threads(count):
            found = with_gradients(call, "native")
        if configuration.grouped:
            # Fewer heads than threads: cut, and the same to rounding.
            torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=2e-6)
            assert_close_gradients(found[1:], expected[1:], 1e-5)
        else:
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("count", [2, 4])
@law(modes=SELF)
def test_trained_projections(configuration, mode, count):
    """However many threads; the same number gives the same bits."""
    call = make_call(POSITIVE, LONG, mode, configuration, batch=1, heads=1, num_features=8)
    call = trained(call).leaves()
    results = []
    for number in (1, count, count):
        with threads(number):
            out = call.run("native")
            leaves = [*call.inputs, *call.feature_map.parameters()]
            weight = torch.randn(out.shape, generator=generator(3))
            results.append((out, *torch.autograd.grad(out, leaves, weight)))
    for wanted, got, again in zip(*results, strict=True):
        assert (got - wanted).abs().max() <= 2e-5 * max(wanted.abs().max(), 0.3)
        assert torch.equal(got, again)


@pytest.mark.parametrize("count", [1, 3])
def test_many_heads_and_sequences(count):
    """More than one batch of sequences is held in memory at a time."""
    with threads(count):
        call = make_call(POSITIVE, 100, batch=7, heads=5, window=20, sinks=1)
        check_against_oracle(call, "native")
        call = make_call(POSITIVE, 300, batch=1, heads=3, window=16)
        call.options["cu_seqlens"] = torch.tensor([*range(0, 281, 7), 300])
        check_against_oracle(call, "native")


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "bias", "relu"])
def test_a_head_that_is_cut(name, mode, count):
    """Partial sums, the scan over them and the rows, forward and backward, masked."""
    with threads(count):
        check_against_oracle(one_head(name, mode, masked=FIRST, num_features=22), "native")
    call = one_head(name, mode, num_features=22)
    with threads(1):
        whole = with_gradients(call, "native")
    with threads(count):
        cut = with_gradients(call, "native")
    # Otherwise nothing was cut, and this test is about nothing.
    assert not all(map(torch.equal, cut, whole))
    torch.testing.assert_close(cut[0], whole[0], rtol=1e-6, atol=2e-6)
    assert_close_gradients(cut[1:], whole[1:], 1e-5)


@pytest.mark.parametrize("mode", SELF)
def test_more_parts_than_blocks_to_fill_them(mode):
    """Parts are whole blocks, so the last of many are empty."""
    call = one_head("positive", mode, 16 * SMALLEST_PART + 4, num_features=5)
    with threads(1):
        expected = with_gradients(call, "native")
    with threads(16):
        found = with_gradients(call, "native")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=2e-6)
    assert_close_gradients(found[1:], expected[1:], 1e-5)


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_a_cut_head_between_two_states(name, scale):
    """The scan starts from a past and ends in a state; gradients pass through both."""
    sizes = {"heads": 2, "key_heads": 1, "input_scale": scale}
    call = one_head(name, "causal", **sizes)
    _, state = one_head(name, "causal", 50, seed=5, **sizes).run("native", return_state=True)
    results = []
    for backend, count, dtype in (
        ("torch", 1, torch.float64),
        ("native", 1, torch.float32),
        ("native", 4, torch.float32),
    ):
        ours = call.leaves(dtype)
        before = FavorState(*(x.to(dtype) for x in state.sums()))
        leaves = [*ours.inputs, before.key_value.requires_grad_(), before.key_sum.requires_grad_()]
        with threads(count):
            out, after = ours.run(backend, state=before, return_state=True)
            loss = out.square().sum() + after.key_value.square().sum() + after.key_sum.sum()
            results.append((out, *after.sums(), *torch.autograd.grad(loss, leaves)))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_a_gigantic_key_in_a_later_part():
    """The scan brings sums to one scale; rows before the key do not see it."""
    call = one_head("positive", "causal")
    with threads(4):
        before = call.run("native")
        call.key = call.key.clone()
        call.key[..., 900, :] *= 1e4
        after = call.run("native")
    torch.testing.assert_close(after[..., :900, :], before[..., :900, :], rtol=1e-6, atol=2e-6)
    assert after.isfinite().all()


def several_calls():
    """Different sizes, modes and dtypes, so that calls that meet use unlike scratch memory."""
    for i, length in enumerate((40, 700, 130, 1, 300, 64, 520, 90)):
        for mode in MODES:
            yield make_call(
                CASES[("positive", "relu", "hyperbolic", "bias")[i % 4]],
                length,
                mode,
                heads=12,
                head_dim=(8, 64, 17)[i % 3],
                value_dim=(5, 64)[i % 2],
                num_features=(20, 130)[i % 2],
                dtype=(torch.float32, torch.bfloat16)[i % 2],
                seed=i,
            )


@pytest.mark.parametrize("inner", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_several_python_threads_at_once(inner):
    """Four callers, each with a pool of its own underneath: as alone, to the bit."""
    calls = list(several_calls())
    with threads(inner):
        expected = [with_gradients(call, "native") for call in calls]

    def work(i):
        # The number of threads belongs to the calling thread, as torch has it.
        with threads(inner):
            return with_gradients(calls[i], "native")

    order = torch.randperm(2 * len(calls), generator=generator(0)).remainder(len(calls)).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, order))
    for i, results in zip(order, found, strict=True):
        assert all(map(torch.equal, results, expected[i]))
