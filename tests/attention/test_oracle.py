"""The pairs that the oracle calls exact, one by one."""

import torch

from tests.attention import oracle


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
