"""Samplers that the study compares, and the data it reads."""

import pytest
import torch
from torch.nn import functional as F

from studies.catalogue.negatives import CatalogueLoss, FixedLoss, full_loss
from studies.catalogue.quality import (
    chi_squared,
    feature_sampler,
    inverted_index,
    read_dependencies,
)


def test_probabilities_sum_to_one():
    torch.manual_seed(0)
    items, query = (F.normalize(torch.randn(count, 32), dim=-1) for count in (200, 5))
    generator = torch.Generator().manual_seed(0)
    for log_q in (
        inverted_index(items, 3.0, generator),
        feature_sampler(items, 3.0, "positive", 64, generator),
    ):
        torch.testing.assert_close(log_q(query).exp().sum(1).float(), torch.ones(5))
    exact = chi_squared(query, items, 3.0, lambda x: (3.0 * x @ items.T).log_softmax(-1))
    assert bool((exact.abs() < 1e-5).all())


@pytest.mark.parametrize("shared", [False, True])
def test_losses_tend_to_the_full_one(shared):
    torch.manual_seed(0)
    items, query = torch.randn(50, 4), torch.randn(6, 4) / 2
    target = torch.randint(50, (6,))
    wanted = full_loss(query, items, target)
    weight = torch.rand(50) + 0.1
    for loss in (
        FixedLoss(weight, 40_000, shared=shared),
        CatalogueLoss(items, 40_000, shared=shared),
    ):
        found = torch.stack([loss(query, items, target) for _ in range(5)]).mean()
        assert abs(found - wanted) < 0.06


def test_dependencies_are_those_of_the_index():
    index = (
        "Package: a\nDepends: b (>= 2), c | d,\nRecommends: a, nothing\nDescription: x\n Depends: e"
        "\n\nPackage: b\nDepends: c, d\n\nPackage: c\n\nPackage: d\nPre-Depends: a [amd64], b, c"
    )
    rows, count = read_dependencies(index)
    assert count == 4
    assert rows == [[1, 2, 3], [0, 1, 2]]
