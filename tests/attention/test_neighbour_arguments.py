"""Arguments of ``favor_attention(neighbours=)`` that do not fit."""

import copy

import pytest
import torch

from performers import GeneralizedFeatures, ListedKeys, SoftmaxFeatures, favor_attention
from tests.attention.neighbour_cases import DIM, edges, features, inputs


def csr(indptr, indices):
    return torch.tensor(indptr), torch.tensor(indices, dtype=torch.int64)


GOOD = ([0, 1, 2, 3], [0, 1, 2])


@pytest.mark.parametrize(
    ("neighbours", "options", "message"),
    [
        (csr([0, 1, 2], [0, 1]), {}, "indptr of shape"),
        (csr([0, 2, 1, 3], [0, 1, 2]), {}, "indptr that rises"),
        (csr([0, 1, 2, 2], [0, 1, 2]), {}, "indptr that rises"),
        (csr([0, 1, 2, 3], [0, 1, 3]), {}, r"indices of keys, 0\.\.2"),
        (csr([0, 1, 2, 3], [0, -1, 2]), {}, r"indices of keys, 0\.\.2"),
        (csr([0, 3, 3, 3], [0, 1, 0]), {}, "each key of a query once"),
        (csr([0, 2, 3, 3], [1, 1, 0]), {}, "each key of a query once"),
        (torch.eye(3), {}, "neighbours must be a pair"),
        ((torch.zeros(4), torch.zeros(0)), {}, "neighbours must be a pair"),
        (csr(*GOOD), {"is_causal": True}, "neighbours cannot be combined with is_causal"),
        (csr(*GOOD), {"window": 1}, "neighbours cannot be combined with window"),
        (csr(*GOOD), {"sinks": 1}, "neighbours cannot be combined with sinks"),
        (
            csr(*GOOD),
            {"listed_keys": ListedKeys(DIM)},
            "neighbours cannot be combined with listed_keys",
        ),
        (
            csr([0, 1, 2, 3], [0, 2, 2]),
            {"cu_seqlens": torch.tensor([0, 2, 3])},
            "an edge joins two",
        ),
        (csr(*GOOD), {"neighbour_bias": torch.zeros(2)}, r"neighbour_bias must have shape \(3,\)"),
        (csr(*GOOD), {"neighbour_bias": torch.zeros(3).long()}, "floating-point"),
        (csr(*GOOD), {"neighbour_bias": 1.0}, r"neighbour_bias must have shape \(3,\)"),
        (None, {"neighbour_bias": torch.zeros(3)}, "neighbour_bias needs neighbours"),
        (csr(*GOOD), {"is_causal": True, "return_state": True}, "cannot be combined with"),
    ],
)
def test_what_does_not_fit_is_refused(neighbours, options, message):
    with pytest.raises(ValueError, match=message):
        favor_attention(*inputs(3), features(), neighbours=neighbours, **options)


@pytest.mark.parametrize(
    "feature_map", [GeneralizedFeatures(DIM), SoftmaxFeatures(DIM, estimator="trigonometric")]
)
def test_other_kernels_are_refused(feature_map):
    with pytest.raises(ValueError, match="neighbours needs positive softmax features"):
        favor_attention(*inputs(3), feature_map, neighbours=csr(*GOOD))


def test_copies_of_a_call_leave_its_tensors_alone():
    neighbours, _ = edges(20)
    before = copy.deepcopy(neighbours)
    favor_attention(*inputs(20), features(), neighbours=neighbours)
    assert all(torch.equal(x, y) for x, y in zip(neighbours, before, strict=True))
