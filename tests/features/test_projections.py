"""Projections: exact marginals, the geometry of blocks, and what it does to the variance."""

import math

import pytest
import torch

from performers.features import PROJECTIONS, draw_projection, theory
from performers.features.couplings import (
    antithetic_rows,
    hadamard_directions,
    orthogonal_directions,
    simplex_directions,
)
from tests.features.cases import generator

DRAWS = 4000
COUPLED = [name for name in PROJECTIONS if name != "gaussian"]


def block_rows(projection, head_dim):
    """Rows of a full block."""
    if projection == "antithetic":
        return 2 * head_dim
    return 1 << (head_dim - 1).bit_length() if projection == "hadamard" else head_dim


def draw_blocks(projection, head_dim, draws=DRAWS, seed=0, **options):
    """Independent full blocks, ``(draws, rows of a block, head_dim)``."""
    rows = block_rows(projection, head_dim)
    options |= {"projection": projection, "generator": generator(seed)}
    return draw_projection(draws * rows, head_dim, **options).view(draws, rows, head_dim)


def haar(head_dim, draws=DRAWS, seed=0):
    """Independent orthogonal matrices, ``(draws, head_dim, head_dim)``."""
    return draw_blocks("orthogonal", head_dim, draws, seed, regularized=True) / math.sqrt(head_dim)


def assert_mean(samples, expected, bound=4.5):
    """Within ``bound`` standard errors; independent samples on the first dimension.

    Where couplings leave nothing to chance the error is that of rounding.
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


def normal(*shape):
    return torch.randn(*shape, generator=generator(20), dtype=torch.float64)


def directions(head_dim, seed=0):
    """Unit vectors, sparse and dense, ``(4, head_dim)``; structure shows along the first ones."""
    vectors = torch.zeros(4, head_dim, dtype=torch.float64)
    vectors[0, 0] = 1
    vectors[1] = 1
    vectors[2, : (head_dim + 1) // 2] = 1
    vectors[3] = torch.randn(head_dim, generator=generator(seed), dtype=torch.float64)
    return vectors / vectors.norm(dim=-1, keepdim=True)


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


@pytest.mark.parametrize("head_dim", [1, 2, 12, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
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


@pytest.mark.parametrize("head_dim", [1, 12, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_distributions_of_lengths_and_entries(projection, head_dim):
    rows = draw_blocks(projection, head_dim, 10_000, seed=2)
    half = torch.tensor(head_dim / 2, dtype=torch.float64)
    # One row of each block: rows of a block depend on one another.
    for place in (0, rows.shape[1] // 2, rows.shape[1] - 1):
        lengths = rows[:, place].norm(dim=-1)
        assert_distribution(lengths, lambda x: torch.special.gammainc(half, x.square() / 2))
        for direction in directions(head_dim):
            assert_distribution(rows[:, place] @ direction, torch.special.ndtr)


@pytest.mark.parametrize("projection", ["orthogonal", "simplex", "hadamard"])
def test_lengths_in_a_block_are_independent(projection):
    lengths = draw_blocks(projection, 16, seed=3).norm(dim=-1)
    centred = lengths - lengths.mean()
    assert_mean((centred[:, :1] * centred[:, 1:]), 0.0)
    half = torch.tensor(8.0, dtype=torch.float64)
    assert_distribution(lengths.flatten(), lambda x: torch.special.gammainc(half, x.square() / 2))


@pytest.mark.parametrize("projection", COUPLED)
def test_directions_have_the_fourth_moments_of_the_sphere(projection):
    """Products of Walsh-Hadamard matrices and signs alone are off by 1 % along an axis."""
    rows = draw_blocks(projection, 16, 12_000, seed=4, regularized=True)
    along = rows @ directions(16).T
    assert_mean(along.pow(4).mean(1), 3 * 16 / 18)
    assert_mean(along.pow(6).mean(1), 15 * 16**2 / (18 * 20))


@pytest.mark.parametrize("projection", ["orthogonal", "hadamard"])
@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "head_dim"), [(64, 16), (40, 16), (5, 16), (3, 1), (3, 2), (16, 16), (128, 128)]
)
def test_rows_are_orthogonal_within_a_block(num_rows, head_dim, regularized, projection):
    rows = draw_projection(
        num_rows,
        head_dim,
        projection=projection,
        regularized=regularized,
        generator=generator(1),
    )
    assert rows.shape == (num_rows, head_dim)
    assert rows.dtype == torch.float64
    for block in rows.split(head_dim):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-10 * head_dim


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize(
    ("num_rows", "head_dim"),
    [(16, 16), (40, 16), (17, 16), (18, 16), (5, 16), (2, 16), (1, 16), (6, 2), (3, 1), (7, 5)],
)
def test_rows_of_a_simplex_have_one_angle(num_rows, head_dim, regularized):
    rows = draw_projection(
        num_rows, head_dim, projection="simplex", regularized=regularized, generator=generator(5)
    )
    assert rows.shape == (num_rows, head_dim)
    for block in rows.split(head_dim):
        count = block.shape[0]
        unit = block / block.norm(dim=-1, keepdim=True)
        expected = torch.full((count, count), -1 / max(count - 1, 1), dtype=torch.float64)
        torch.testing.assert_close(unit @ unit.T, expected.fill_diagonal_(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 32, 33, 50, 64])
def test_antithetic_rows_come_with_their_opposites(num_rows, regularized):
    rows = draw_projection(
        num_rows, 16, projection="antithetic", regularized=regularized, generator=generator(21)
    )
    assert rows.shape == (num_rows, 16)
    assert torch.equal(rows[: num_rows // 2 * 2 : 2], -rows[1::2])
    for block in rows[::2].split(16):
        gram = block @ block.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-9
        lengths = gram.diagonal()
        assert len(lengths) == 1 or regularized == (lengths.std() < 1e-9)


def test_opposites_are_cut_at_an_odd_number_of_rows():
    rows = torch.arange(6.0).view(3, 2)
    expected = [rows[0], -rows[0], rows[1], -rows[1], rows[2]]
    assert torch.equal(antithetic_rows(rows, 5), torch.stack(expected))


@pytest.mark.parametrize("draw", [orthogonal_directions, simplex_directions, hadamard_directions])
@pytest.mark.parametrize("num_rows", [1, 5, 16, 18, 37])
def test_directions_have_unit_length(draw, num_rows):
    lengths = draw(num_rows, 16, normal).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.ones(num_rows).double(), rtol=0, atol=1e-12)


def test_padded_hadamard_blocks_have_orthogonal_columns():
    """What is cut from a block with the last columns leaves the others orthonormal."""
    columns = hadamard_directions(16, 16, normal)[:, :11]
    expected = torch.eye(11, dtype=torch.float64)
    torch.testing.assert_close(columns.T @ columns, expected, rtol=0, atol=1e-12)
    rows = draw_projection(16, 11, projection="hadamard", generator=generator(6))
    assert rows.shape == (16, 11)


@pytest.mark.parametrize("head_dim", [1, 11, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_regularized_rows_have_one_length(projection, head_dim):
    rows = draw_projection(
        50, head_dim, projection=projection, regularized=True, generator=generator(3)
    )
    expected = torch.full((50,), math.sqrt(head_dim), dtype=torch.float64)
    torch.testing.assert_close(rows.norm(dim=-1), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("projection", COUPLED)
def test_blocks_are_independent(projection):
    blocks = draw_blocks(projection, 8, 2 * DRAWS, seed=4, regularized=True)
    first, second = blocks.unflatten(0, (DRAWS, 2)).unbind(1)
    assert_mean((first * second).sum(-1).flatten(1), 0.0)
    assert_mean((first * second).sum(-1).square().flatten(1), 8.0)


@pytest.mark.parametrize("head_dim", [1, 5, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_exponentials_are_unbiased(projection, head_dim):
    """``E exp(w . z) = exp(|z|^2 / 2)``, 1.6e5 rows or more in every direction."""
    rows = draw_blocks(projection, head_dim, 160_000 // head_dim, seed=7)
    for length in (0.5, 1.0, 2.0):
        ratio = (length * (rows @ directions(head_dim).T) - length**2 / 2).exp()
        assert_mean(ratio.mean(1), 1.0, bound=4)


def coupled_error(projection, num_rows, head_dim, sum_norm):
    """``MSE * m / SM^2`` of positive features by the closed form."""
    query = torch.zeros(head_dim, dtype=torch.float64)
    query[0] = math.sqrt(sum_norm)
    key = torch.zeros_like(query)
    return num_rows * theory.coupled_variance(query, key, num_rows, projection=projection).item()


def measured_error(projection, num_rows, head_dim, sum_norm, draws, seed=8):
    """The same from draws, over orthogonal directions of ``z``; with its standard error."""
    blocks = draw_blocks(projection, head_dim, draws, seed=seed)[:, :num_rows]
    z = math.sqrt(sum_norm) * haar(head_dim, 1, seed + 1)[0]
    ratio = (blocks @ z - sum_norm / 2).exp().mean(1)
    squared = num_rows * (ratio - 1).square().mean(1)
    return squared.mean().item(), squared.std().item() / math.sqrt(draws)


@pytest.mark.parametrize(
    ("projection", "amount"),
    [("gaussian", 2.78), ("orthogonal", 1.92), ("simplex", 0.89), ("hadamard", 1.92)],
)
def test_errors_at_sixteen_rows(projection, amount):
    """``d = m = 16``, unit vectors: the known amounts to 10 %, the exact ones to 4 errors.

    ``|z|^2 = 1.27`` is where all known amounts, the two-sided estimators' too, agree best.
    """
    exact = coupled_error(projection, 16, 16, 1.27)
    error, uncertainty = measured_error(projection, 16, 16, 1.27, 20_000)
    assert error == pytest.approx(amount, rel=0.1)
    assert abs(error - exact) < 4 * uncertainty + (0.05 * exact if projection == "hadamard" else 0)
    assert uncertainty < 0.02 * exact


@pytest.mark.parametrize("projection", ["orthogonal", "antithetic"])
def test_errors_of_two_blocks(projection):
    """32 rows: two blocks of orthogonal ones, one of opposites."""
    exact = coupled_error(projection, 32, 16, 1.27)
    rows = draw_projection(10_000 * 32, 16, projection=projection, generator=generator(22))
    z = math.sqrt(1.27) * haar(16, 1, 9)[0]
    ratio = (rows.view(10_000, 32, 16) @ z.T - 1.27 / 2).exp().mean(1)
    squared = 32 * (ratio - 1).square().mean(1)
    assert_mean(squared, exact, bound=4)
    assert squared.std(0) / 100 < 0.03 * exact
    assert exact < {"orthogonal": 2.0, "antithetic": 1.1}[projection]


def test_partial_blocks_gain_too():
    for projection in ("orthogonal", "simplex", "antithetic"):
        rows = torch.stack(
            [
                draw_projection(5, 16, projection=projection, generator=generator(seed))
                for seed in range(DRAWS)
            ]
        )
        z = haar(16, 1, 9)[0] * math.sqrt(0.8)
        squared = 5 * ((rows @ z - 0.4).exp().mean(1) - 1).square().mean(1)
        exact = coupled_error(projection, 5, 16, 0.8)
        assert_mean(squared, exact, bound=4)
        assert exact < 0.95 * coupled_error("gaussian", 5, 16, 0.8)


@pytest.mark.parametrize("head_dim", [12, 24])
def test_padded_hadamard_lowers_the_error(head_dim):
    """A full block at a dimension that is no power of two does no worse than orthogonal rows."""
    rows = block_rows("hadamard", head_dim)
    error, uncertainty = measured_error("hadamard", rows, head_dim, 1.0, 12_000)
    assert error < coupled_error("orthogonal", head_dim, head_dim, 1.0) + 4 * uncertainty
    assert uncertainty < 0.03 * math.expm1(1.0)


@pytest.mark.parametrize("head_dim", [5, 16])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_the_generator_decides(projection, head_dim):
    def draw(seed):
        return draw_projection(40, head_dim, projection=projection, generator=generator(seed))

    assert torch.equal(draw(10), draw(10))
    assert not torch.equal(draw(10), draw(11))
    shared = generator(10)
    first, second = (
        draw_projection(40, head_dim, projection=projection, generator=shared) for _ in range(2)
    )
    assert torch.equal(first, draw(10))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_without_a_generator_the_default_one_is_used(projection):
    torch.manual_seed(5)
    first = draw_projection(8, 4, projection=projection)
    second = draw_projection(8, 4, projection=projection)
    torch.manual_seed(5)
    assert torch.equal(first, draw_projection(8, 4, projection=projection))
    assert not torch.equal(first, second)


def test_unknown_projection():
    with pytest.raises(ValueError, match=r"projection must be one of .*orthogonal.*'sobol'"):
        draw_projection(8, 4, projection="sobol")
