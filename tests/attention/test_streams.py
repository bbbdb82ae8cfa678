"""Long streams through a state: nothing drifts, overflows or is forgotten."""

import pytest
import torch

from performers import favor_attention
from tests.attention import oracle
from tests.attention.cases import TESTED, assert_close_rows, make_call, stream
from tests.features.cases import by_name


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [by_name("positive"), by_name("relu")], ids=str)
@pytest.mark.parametrize("backend", TESTED)
def test_five_thousand_single_steps_stay_accurate(backend, case):
    steps, tail = 5000, 20
    call = make_call(case, steps + tail, "causal", batch=1, heads=1, num_features=32, seed=10)
    with torch.no_grad():
        _, state = stream(
            type(call)(case, call.feature_map, *(x[..., :steps, :] for x in call.inputs), {}),
            [1] * steps,
            backend,
        )
        last = [x[..., steps:, :] for x in call.inputs]
        out = favor_attention(*last, call.feature_map, is_causal=True, state=state, backend=backend)
    for row in (0, tail - 1):
        stop = steps + row + 1
        expected, conditioning = oracle.attend(
            case,
            call.feature_map,
            call.query[..., stop - 1 : stop, :],
            call.key[..., :stop, :],
            call.value[..., :stop, :],
        )
        assert_close_rows(out[..., row : row + 1, :], expected, conditioning, 2e-5)


def assert_stream_is_finite_and_accurate(backend, tokens, piece, dtype):
    """Only the state lives on; the last row is compared with dense attention over all keys."""
    case = by_name("positive")
    call = make_call(case, tokens, "causal", batch=1, heads=1, dtype=dtype, seed=11)
    state = None
    with torch.no_grad():
        for start in range(0, tokens, piece):
            rows = slice(start, start + piece)
            out, state = favor_attention(
                *(x[..., rows, :] for x in call.inputs),
                call.feature_map,
                is_causal=True,
                state=state,
                return_state=True,
                backend=backend,
            )
            assert torch.isfinite(out).all()
        expected, _ = oracle.attend(
            case, call.feature_map, call.query[..., -1:, :], call.key, call.value
        )
    error = (out[..., -1:, :].double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * expected.abs() + 2e-5).all(), error.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", TESTED)
def test_half_precision_over_many_tokens(backend, dtype):
    assert_stream_is_finite_and_accurate(backend, 6_000, 500, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("piece", [1, 1024, 50_000])
@pytest.mark.parametrize("backend", TESTED)
def test_half_precision_over_fifty_thousand_tokens(backend, piece):
    assert_stream_is_finite_and_accurate(backend, 50_000, piece, torch.bfloat16)


@pytest.mark.parametrize("backend", TESTED)
def test_keys_that_grow_and_shrink_along_the_stream(backend):
    """The running scale rises with the longest feature and never loses the past to it."""
    call = make_call(by_name("positive"), 200, "causal", batch=1, seed=12)
    call.key = call.key * torch.linspace(0, 12.6, 200).sin().abs()[:, None] * 3
    expected, conditioning = call.expected()
    for split in ([200], [1] * 200, [37] * 5 + [15]):
        out, _ = stream(call, split, backend)
        assert_close_rows(out, expected, conditioning, 1e-4)
