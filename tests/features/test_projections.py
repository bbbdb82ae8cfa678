"""Projections: the distribution of each row, the geometry of blocks, and the error they leave."""

import math

import pytest
import torch

from performers.features import PROJECTIONS, draw_projection
from performers.features.projections import hadamard_directions
from tests.features.cases import generator, normal
from tests.features.theory import coupled_error

DRAWS = 4000
COUPLED = [name for name in PROJECTIONS if name != "gaussian"]


def draw(projection, num_rows, head_dim, seed=0, **options):
    options |= {"projection": projection, "generator": generator(seed)}
    return draw_projection(num_rows, head_dim, **options)


def draw_blocks(projection, head_dim, draws=DRAWS, seed=0, **options):
    """Independent full blocks, ``(draws, rows of a block, head_dim)``."""
    rows = {"antithetic": 2 * head_dim, "hadamard": 1 << (head_dim - 1).bit_length()}
    rows = rows.get(projection, head_dim)
    blocks = draw(projection, draws * rows, head_dim, seed, **options)
    return blocks.view(draws, rows, head_dim)


def haar(head_dim, draws=DRAWS, seed=0):
    """Independent orthogonal matrices, ``(draws, head_dim, head_dim)``."""
    return draw_blocks("orthogonal", head_dim, draws, seed, regularized=True) / math.sqrt(head_dim)


def assert_mean(samples, expected, bound=4.5):
    """Within ``bound`` standard errors; independent samples on the first dimension.

    Where couplings make the mean exact the error is that of rounding.
    """
    error = samples.std(0) / math.sqrt(samples.shape[0])
    scores = (samples.mean(0) - expected) / error.clamp_min(1e-12)
    assert scores.abs().max() < bound, scores


def assert_distribution(samples, cumulative):
    """Kolmogorov-Smirnov at the level 1e-4, for independent samples."""
    count = samples.numel()
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    values = cumulative(samples.sort().values)
    distance = max((steps[1:] - values).max(), (values - steps[:-1]).max())
    assert distance < math.sqrt(math.log(2 / 1e-4) / (2 * count)), distance


def chi(head_dim):
    """The distribution of the length of a standard normal vector."""
    half = torch.tensor(head_dim / 2, dtype=torch.float64)
    return lambda x: torch.special.gammainc(half, x.square() / 2)


def directions(head_dim):
    """Unit vectors, sparse and dense, ``(4, head_dim)``; structure shows along the first ones."""
    vectors = torch.zeros(4, head_dim, dtype=torch.float64)
    vectors[0, 0] = 1
    vectors[1] = 1
    vectors[2, : (head_dim + 1) // 2] = 1
    vectors[3] = normal(head_dim)
    return vectors / vectors.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("head_dim", [2, 5, 16])
def test_directions_have_the_moments_of_haar(head_dim):
    """Without the sign fix the mean of the diagonal is strongly negative."""
    q = haar(head_dim)
    diagonal = q.diagonal(dim1=-2, dim2=-1)
    assert_mean(diagonal.mean(-1), 0.0)
    assert_mean(q.flatten(1), 0.0)
    assert_mean(diagonal.sum(-1).square(), 1.0)
    assert_mean(q.square().flatten(1), 1 / head_dim)
    assert_mean(q[:, 0, 0] ** 4, 3 / (head_dim * (head_dim + 2)))
    assert_mean(torch.linalg.det(q), 0.0)


# Of these only Hadamard matrices have sizes of their own, and are cut where a row is shorter.
ROWS = [
    *((name, 16) for name in PROJECTIONS),
    *((name, 1) for name in PROJECTIONS),
    ("hadamard", 12),
]


@pytest.mark.parametrize(("projection", "head_dim"), [*ROWS, *((x, 2) for x in PROJECTIONS)])
def test_every_row_is_standard_normal(projection, head_dim):
    """Mean and covariance of each row, third and fourth moments over places and over entries."""
    rows = draw_blocks(projection, head_dim, seed=1)
    eye = torch.eye(head_dim, dtype=torch.float64)
    outer = rows.unsqueeze(-1) * rows.unsqueeze(-2)
    assert_mean(rows.flatten(1), 0.0)
    assert_mean(outer.flatten(1), eye.expand(outer.shape[1:]).flatten(), bound=5)
    # Means of few heavy-tailed samples are far from normal: these are pooled.
    assert_mean(rows.pow(3).mean(1), 0.0)
    assert_mean(rows.pow(3).mean(2), 0.0)
    assert_mean(outer.square().mean(1).flatten(1), (1 + 2 * eye).flatten())
    assert_mean(outer.square().mean((2, 3)), 1 + 2 / head_dim)


@pytest.mark.parametrize(("projection", "head_dim"), ROWS)
def test_distributions_of_lengths_and_entries(projection, head_dim):
    rows = draw_blocks(projection, head_dim, 10_000, seed=2)
    # One row of each block: rows of a block depend on one another.
    for place in (0, rows.shape[1] // 2, rows.shape[1] - 1):
        assert_distribution(rows[:, place].norm(dim=-1), chi(head_dim))
        for direction in directions(head_dim):
            assert_distribution(rows[:, place] @ direction, torch.special.ndtr)


@pytest.mark.parametrize("projection", ["orthogonal", "simplex", "hadamard"])
def test_lengths_in_a_block_are_independent(projection):
    lengths = draw_blocks(projection, 16, seed=3).norm(dim=-1)
    centred = lengths - lengths.mean()
    assert_mean(centred[:, :1] * centred[:, 1:], 0.0)
    assert_distribution(lengths.flatten(), chi(16))


@pytest.mark.parametrize("projection", COUPLED)
def test_directions_have_the_higher_moments_of_the_sphere(projection):
    """Products of Walsh-Hadamard matrices and signs alone are off by 1 % along an axis."""
    rows = draw_blocks(projection, 16, 12_000, seed=4, regularized=True)
    along = rows @ directions(16).T
    assert_mean(along.pow(4).mean(1), 3 * 16 / 18)
    assert_mean(along.pow(6).mean(1), 15 * 16**2 / (18 * 20))


@pytest.mark.parametrize("projection", COUPLED)
def test_blocks_are_independent(projection):
    blocks = draw_blocks(projection, 8, 2 * DRAWS, seed=4, regularized=True)
    first, second = blocks.unflatten(0, (DRAWS, 2)).unbind(1)
    products = (first * second).sum(-1)
    assert_mean(products.flatten(1), 0.0)
    assert_mean(products.square().flatten(1), 8.0)


SIZES = [(64, 16), (40, 16), (17, 16), (18, 16), (5, 16), (1, 16), (3, 1), (3, 2), (7, 5)]


@pytest.mark.parametrize("projection", ["orthogonal", "simplex", "antithetic", "hadamard"])
@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize(("num_rows", "head_dim"), [*SIZES, (128, 128)])
def test_angles_and_lengths_in_a_block(num_rows, head_dim, regularized, projection):
    rows = draw(projection, num_rows, head_dim, seed=1, regularized=regularized)
    assert rows.shape == (num_rows, head_dim)
    assert rows.dtype == torch.float64
    lengths = rows.norm(dim=-1, keepdim=True)
    if regularized:
        expected = torch.full_like(lengths, math.sqrt(head_dim))
        torch.testing.assert_close(lengths, expected, rtol=1e-13, atol=0)
    else:
        assert len(lengths) == 1 or lengths.std() > 1e-3
    if projection == "hadamard" and head_dim not in (1, 2, 16, 128):
        return
    if projection == "antithetic":
        assert torch.equal(rows[: num_rows // 2 * 2 : 2], -rows[1::2])
        rows, lengths = rows[::2], lengths[::2]
    for block in (rows / lengths).split(head_dim):
        cosine = -1 / max(len(block) - 1, 1) if projection == "simplex" else 0.0
        expected = torch.full((len(block), len(block)), cosine, dtype=torch.float64)
        torch.testing.assert_close(block @ block.T, expected.fill_diagonal_(1), rtol=0, atol=1e-11)


def test_padded_hadamard_blocks():
    """The columns that are not cut stay orthonormal, and the error is that of orthogonal rows."""
    columns = hadamard_directions(16, 16, normal)[:, :11]
    expected = torch.eye(11, dtype=torch.float64)
    torch.testing.assert_close(columns.T @ columns, expected, rtol=0, atol=1e-12)
    ratio = (draw_blocks("hadamard", 12, 12_000) @ haar(12, 1, 9)[0] - 0.5).exp().mean(1)
    error = 16 * (ratio - 1).square().mean(1)
    assert error.mean() < coupled_error("orthogonal", 12, 12, 1.0) + 4 * error.std() / 12_000**0.5


@pytest.mark.parametrize("head_dim", [5, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_draws_follow_the_generator(projection, head_dim):
    assert torch.equal(draw(projection, 40, head_dim, 10), draw(projection, 40, head_dim, 10))
    assert not torch.equal(draw(projection, 40, head_dim, 10), draw(projection, 40, head_dim, 11))
    torch.manual_seed(10)
    first, second = (draw_projection(40, head_dim, projection=projection) for _ in range(2))
    assert torch.equal(first, draw(projection, 40, head_dim, 10))
    assert not torch.equal(first, second)
