"""The oracle itself: against softmax attention where the kernel is exact, and pair by pair."""

import math

import pytest
import torch
from torch.nn import functional as F

from tests.attention import oracle
from tests.attention.cases import EVERY, POSITIVE, SELF, make_call


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_kernel_is_the_sum_over_features_pair_by_pair(case):
    call = make_call(case, 5, "cross", batch=1, heads=2, head_dim=4, num_features=6)
    pairs, absolute, row, column = oracle.log_kernel(
        case, call.feature_map, call.query, call.key, 0.3
    )
    root = math.sqrt(0.3)
    (log_q, base_q), (log_k, base_k) = (
        case.log_phi(call.feature_map, x.double() * root, is_query=x is call.query)
        for x in (call.query, call.key)
    )
    for h in range(2):
        for i in range(5):
            for j in range(call.key.shape[2]):
                terms = [
                    (base_q[0, h, i, f] * base_k[0, h, j, f]).item()
                    * math.exp(log_q[0, h, i, f].item() + log_k[0, h, j, f].item())
                    for f in range(log_q.shape[-1])
                ]
                size = math.exp((row[0, h, i] + column[0, h, :, j]).item())
                assert (pairs[0, h, i, j] * size).item() == pytest.approx(
                    math.fsum(terms), rel=1e-9, abs=1e-12
                )
                assert (absolute[0, h, i, j] * size).item() == pytest.approx(
                    math.fsum(map(abs, terms)), rel=1e-9
                )


def test_exact_pairs_one_by_one():
    """Near, or among the first keys of the sequence that take part; by lists and loops."""
    offsets, window, sinks = [0, 4, 4, 5, 12], 2, 2
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, [0, 5, 6, 8]] = False
    found = oracle.exact(
        12, 12, window=window, sinks=sinks, key_mask=mask, cu_seqlens=torch.tensor(offsets)
    )
    first = [[0, 1, 4, 5, 6], [1, 2, 4, 7, 9]]
    for row in range(2):
        for i in range(12):
            for j in range(12):
                assert found[row, 0, i, j] == (-2 <= i - j <= 2 or j in first[row])


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_exact_pairs_weigh_what_softmax_gives_them(case):
    """Each row: exponentials where exact, sums over features elsewhere, then normalised."""
    call = make_call(case, 7, batch=1, heads=2, head_dim=4, num_features=6)
    options = {"window": 1, "sinks": 2, "is_causal": True}
    found, _ = oracle.weights(case, call.feature_map, call.query, call.key, scale=0.3, **options)
    pairs, _, row, column = oracle.log_kernel(case, call.feature_map, call.query, call.key, 0.3)
    for h in range(2):
        for i in range(7):
            terms = []
            for j in range(i + 1):
                if i - j <= 1 or j < 2:
                    terms.append(
                        math.exp(0.3 * call.query[0, h, i].double() @ call.key[0, h, j].double())
                    )
                else:
                    size = math.exp((row[0, h, i] + column[0, h, :, j]).item())
                    terms.append(pairs[0, h, i, j].item() * size)
            total = math.fsum(terms)
            for j, term in enumerate(terms):
                assert found[0, h, i, j].item() == pytest.approx(term / total, rel=1e-9, abs=1e-12)
            assert (found[0, h, i, i + 1 :] == 0).all()


@pytest.mark.parametrize("mode", SELF)
def test_a_window_over_everything_is_softmax(mode):
    call = make_call(POSITIVE, 20, mode, dtype=torch.float64, input_scale=6.0)
    out, conditioning = oracle.attend(
        call.case, call.feature_map, *call.inputs, window=20, **call.options
    )
    exact = F.scaled_dot_product_attention(*call.inputs, is_causal=mode == "causal")
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-12)
    assert (conditioning == 1).all()
