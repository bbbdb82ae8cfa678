"""Windows measured in positions, against the dense oracle."""

import pytest
import torch

from performers import backends, favor_attention_weights
from tests.attention import oracle, test_compile
from tests.attention.cases import (
    POSITIVE,
    Configuration,
    check_against_oracle,
    make_call,
)
from tests.attention.native import support
from tests.features.cases import REPRESENTATIVE, generator

BACKENDS = ("torch", "reference")
IN_FLOAT32 = [name for name in ("native", "torch") if name in backends()]
WINDOWS = (0, 3, 1000)
CONFIGURATIONS = [
    Configuration("plain"),
    Configuration("masked", masked=True, sinks=2),
    Configuration("packed", packed=True, masked=True),
    Configuration("grouped", grouped=True, masked=True),
]


def members(batch, length, most=40, seed=3):
    """Positions of members of different lengths, one after the other."""
    rows = []
    for _ in range(batch):
        row = []
        while len(row) < length:
            size = int(torch.randint(1, most, (), generator=generator(seed + len(row) + len(rows))))
            row += range(size)
        rows.append(row[:length])
    return torch.tensor(rows, dtype=torch.int64)


def positioned(length, configuration, window, dtype=torch.float64, case=POSITIVE, **options):
    call = make_call(case, length, "bidirectional", configuration, dtype=dtype, **options)
    call.options |= {"window": window, "positions": members(call.query.shape[0], length)}
    return call


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients_in_float64(backend, window, configuration):
    call = positioned(150, configuration, window)
    check_against_oracle(call, backend, value_tolerance=1e-10, gradient_tolerance=1e-10)


@pytest.mark.parametrize("case", [case for case in REPRESENTATIVE if case.softmax], ids=str)
def test_every_softmax_estimator(case):
    tolerance = 1e-6 if case.calibrated else 1e-10
    call = positioned(90, CONFIGURATIONS[1], 2, case=case)
    check_against_oracle(call, "torch", value_tolerance=tolerance, gradient_tolerance=tolerance)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("backend", IN_FLOAT32)
def test_outputs_and_gradients_in_float32(backend, window, configuration):
    call = positioned(300, configuration, window, torch.float32)
    check_against_oracle(call, backend)
    assert torch.equal(call.run(), call.run(backends()[0]))


def test_positions_in_any_order():
    call = positioned(130, CONFIGURATIONS[2], 2)
    call.options["positions"] = torch.randint(-9, 9, (1, 130), generator=generator(1)) * 5
    check_against_oracle(call, "torch", value_tolerance=1e-10, gradient_tolerance=1e-10)


@pytest.mark.skipif("native" not in backends(), reason="no native library")
def test_native_calls_compile_whole():
    test_compile.check(positioned(100, Configuration("plain"), 3, torch.float32), "native")


@pytest.mark.skipif("native" not in backends(), reason="no native library")
@pytest.mark.parametrize("threads", [1, 3])
def test_native_rows_of_many_members(threads):
    call = positioned(900, Configuration("packed", packed=True, masked=True), 4, torch.float32)
    call.options["positions"] = torch.arange(900)[None] % 23
    with support.threads(threads):
        check_against_oracle(call, "native")


def test_places_in_the_row_are_the_ordinary_window():
    call = make_call(POSITIVE, 200, configuration=CONFIGURATIONS[1], dtype=torch.float64)
    plain = call.run("torch", window=5)
    found = call.run("torch", window=5, positions=torch.arange(200).expand(2, -1))
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)


def test_the_matrix():
    call = positioned(60, CONFIGURATIONS[1], 2)
    matrix = favor_attention_weights(call.query, call.key, call.feature_map, **call.options)
    expected, _ = oracle.weights(call.case, call.feature_map, call.query, call.key, **call.options)
    torch.testing.assert_close(matrix, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", IN_FLOAT32)
@pytest.mark.parametrize("seen", [True, False])
def test_a_key_of_nan_reaches_the_rows_that_see_it(seen, backend):
    call = positioned(70, CONFIGURATIONS[0], 1, torch.float32)
    call.key[0, 0, 20] = float("nan")
    if not seen:
        call.options["key_mask"] = torch.ones(2, 70, dtype=torch.bool)
        call.options["key_mask"][0, 20] = False
    out = call.run(backend)
    assert out[0, 0].isnan().all() == seen
    assert out[0, 1:].isfinite().all()
    assert out[1].isfinite().all()


def test_no_tokens():
    call = positioned(0, Configuration("plain"), 2)
    assert call.run("torch").shape == (2, 2, 0, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": torch.zeros(2, 9)}, "must be integers"),
        ({"positions": torch.zeros(2, 8, dtype=torch.int64)}, r"shape \(2, 9\)"),
        ({"window": None}, "needs window"),
        ({"is_causal": True}, "needs is_causal=False"),
        ({"neighbours": (torch.zeros(10).long(), torch.zeros(0).long())}, "leave one of the two"),
        ({"positions": torch.tensor([[0] * 8 + [2**60]] * 2)}, "span less"),
        ({"positions": torch.tensor([[-(2**62)] + [2**62] * 8] * 2)}, "span less"),
        ({"window": 2**61}, "span less"),
    ],
)
def test_refusals(options, message):
    call = positioned(9, Configuration("plain"), 2)
    with pytest.raises(ValueError, match=message):
        call.run(**options)
