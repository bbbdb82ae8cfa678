"""Any number of threads gives the same: to the bit when heads fill them, else to rounding."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from performers import FavorState
from tests.attention.cases import (
    ALL,
    MODES,
    assert_close_gradients,
    check_against_oracle,
    make_call,
    random_mask,
)
from tests.attention.native.support import NATIVE, threads, values_and_gradients
from tests.features.cases import by_name, generator

pytestmark = NATIVE

CASES = {case.name: case for case in ALL}
# A head is cut into parts of at least this many positions: kSmallestPart in csrc/kernels.cpp.
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "relu"])
def test_as_many_heads_as_any_number_of_threads_divides(name, mode):
    call = make_call(CASES[name], 600, mode, batch=1, heads=12, key_heads=12, num_features=20)
    with threads(1):
        expected = values_and_gradients(call)
    for count in (2, 3, 4):
        with threads(count):
            assert all(map(torch.equal, values_and_gradients(call), expected))


@pytest.mark.parametrize("length", [1, 70, 600])
def test_causal_heads_are_not_cut_while_they_fill_the_threads(length):
    call = make_call(by_name("positive"), length, "causal", batch=2, heads=4, key_heads=2)
    with threads(1):
        expected = values_and_gradients(call)
    for count in (2, 3, 4):
        with threads(count):
            assert all(map(torch.equal, values_and_gradients(call), expected))


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_packed_sequences_are_not_cut(mode):
    offsets = torch.tensor([0, 5, 600, 601, 1000])
    call = make_call(
        by_name("positive"), 1000, mode, batch=1, heads=1, num_features=20, cu_seqlens=offsets
    )
    with threads(1):
        expected = values_and_gradients(call)
    with threads(3):
        assert all(map(torch.equal, values_and_gradients(call), expected))


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["positive", "hyperbolic", "bias", "relu"])
def test_a_head_that_is_cut(name, mode, count):
    """Partial sums, the scan over them and the rows, forward and backward, masked."""
    with threads(count):
        check_against_oracle(one_head(name, mode, masked=FIRST, num_features=22), "native")
    call = one_head(name, mode, num_features=22)
    with threads(count):
        check_against_oracle(call, "native")
    with threads(1):
        whole = values_and_gradients(call)
    with threads(count):
        cut = values_and_gradients(call)
    # Otherwise nothing was cut, and this test is about nothing.
    assert not all(map(torch.equal, cut, whole))
    torch.testing.assert_close(cut[0], whole[0], rtol=0, atol=2e-6)
    assert_close_gradients(cut[1:], whole[1:], 1e-5)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize(
    "heads", [{"heads": 3, "key_heads": 1}, {"batch": 3, "heads": 2, "key_heads": 1}]
)
def test_cut_heads_with_groups(heads, mode):
    """One key head of three groups, and three key heads (of two) for four threads."""
    call = one_head("positive", mode, **heads)
    with threads(4):
        check_against_oracle(call, "native")


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_more_parts_than_blocks_to_fill_them(mode):
    """Parts are whole blocks, so the last of many are empty."""
    call = one_head("positive", mode, 16 * SMALLEST_PART + 4, num_features=5)
    with threads(1):
        expected = values_and_gradients(call)
    with threads(16):
        found = values_and_gradients(call)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=2e-6)
    assert_close_gradients(found[1:], expected[1:], 1e-5)


def sums_of(state):
    return state.key_value, state.key_sum, state.log_scale


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
        before = FavorState(*(x.to(dtype) for x in sums_of(state)))
        leaves = [*ours.inputs, before.key_value.requires_grad_(), before.key_sum.requires_grad_()]
        with threads(count):
            out, after = ours.run(backend, state=before, return_state=True)
            loss = out.square().sum() + after.key_value.square().sum() + after.key_sum.sum()
            results.append((out, *sums_of(after), *torch.autograd.grad(loss, leaves)))
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
    torch.testing.assert_close(after[..., :900, :], before[..., :900, :], rtol=0, atol=2e-6)
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


@pytest.mark.parametrize("inner", [1, 2])
def test_several_python_threads_at_once(inner):
    """Four callers, each with a pool of its own underneath: as alone, to the bit."""
    calls = list(several_calls())
    with threads(inner):
        expected = [values_and_gradients(call) for call in calls]

    def work(i):
        # The number of threads belongs to the calling thread, as torch has it.
        with threads(inner):
            return values_and_gradients(calls[i])

    order = torch.randperm(3 * len(calls), generator=generator(0)).remainder(len(calls)).tolist()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, order))
    for i, results in zip(order, found, strict=True):
        assert all(map(torch.equal, results, expected[i]))
