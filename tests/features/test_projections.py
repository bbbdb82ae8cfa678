"""Projections: Haar directions, chi lengths, orthogonal blocks."""

import math

import pytest
import torch

from performers.features import draw_projection
from tests.features.cases import generator

DRAWS = 4000


def haar(head_dim, draws=DRAWS, seed=0):
    """Independent orthogonal matrices, ``(draws, head_dim, head_dim)``."""
    rows = draw_projection(draws * head_dim, head_dim, regularized=True, generator=generator(seed))
    return rows.view(draws, head_dim, head_dim) / math.sqrt(head_dim)


def assert_mean(samples, expected):
    """Within four standard errors; independent samples on the first dimension."""
    error = samples.std(0) / math.sqrt(samples.shape[0])
    scores = (samples.mean(0) - expected) / error
    assert scores.abs().max() < 4.5, scores


@pytest.mark.parametrize("head_dim", [2, 5, 16])
def test_directions_have_the_moments_of_haar(head_dim):
    """Without the sign fix the mean of the diagonal is strongly negative."""
    q = haar(head_dim)
    trace = q.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert_mean(q.diagonal(dim1=-2, dim2=-1).mean(-1), 0.0)
    assert_mean(q.flatten(1), 0.0)
    assert_mean(trace.square(), 1.0)
    assert_mean(q.square().flatten(1), 1 / head_dim)
    assert_mean(q[:, 0, 0] ** 4, 3 / (head_dim * (head_dim + 2)))
    assert_mean(torch.linalg.det(q), 0.0)


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize(("num_rows", "head_dim"), [(64, 16), (40, 16), (5, 16), (3, 1), (16, 16)])
def test_rows_are_orthogonal_within_a_block(num_rows, head_dim, regularized):
    rows = draw_projection(num_rows, head_dim, regularized=regularized, generator=generator(1))
    assert rows.shape == (num_rows, head_dim)
    assert rows.dtype == torch.float64
    for block in rows.split(head_dim):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-10 * head_dim


@pytest.mark.parametrize("projection", ["orthogonal", "gaussian"])
def test_rows_have_chi_lengths(projection):
    head_dim = 16
    rows = draw_projection(50_000, head_dim, projection=projection, generator=generator(2))
    squared = rows.square().sum(-1)
    assert_mean(squared[:, None], head_dim)
    assert_mean((squared[:, None] - head_dim).square(), 2 * head_dim)
    mean = math.sqrt(2) * math.exp(math.lgamma((head_dim + 1) / 2) - math.lgamma(head_dim / 2))
    assert_mean(squared.sqrt()[:, None], mean)
    # Each entry is N(0, 1) on its own, whatever the coupling of the rows.
    for power, expected in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert_mean(rows[::head_dim] ** power, expected)


@pytest.mark.parametrize("projection", ["orthogonal", "gaussian"])
def test_regularized_rows_have_one_length(projection):
    rows = draw_projection(50, 16, projection=projection, regularized=True, generator=generator(3))
    torch.testing.assert_close(rows.norm(dim=-1), torch.full((50,), 4.0, dtype=torch.float64))


def test_blocks_are_independent():
    first, second = haar(8, draws=2 * DRAWS, seed=4).unflatten(0, (DRAWS, 2)).unbind(1)
    assert_mean((first * second).sum(-1).flatten(1), 0.0)


def test_without_a_generator_the_default_one_is_used():
    torch.manual_seed(5)
    first = draw_projection(8, 4)
    second = draw_projection(8, 4)
    torch.manual_seed(5)
    assert torch.equal(first, draw_projection(8, 4))
    assert not torch.equal(first, second)


def test_unknown_projection():
    with pytest.raises(ValueError, match=r"projection must be one of .*orthogonal.*'sobol'"):
        draw_projection(8, 4, projection="sobol")
