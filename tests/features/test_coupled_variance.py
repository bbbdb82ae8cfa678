"""The closed form of the error of coupled rows: against another series, and against draws."""

import math
from functools import cache

import pytest
import torch

from performers.features import PROJECTIONS, draw_projection, theory
from performers.features.coupling_theory import log_pair_mean
from tests.features.cases import generator, pairs

LENGTHS = [(1.0, 1.0, 0.3), (0.5, 0.8, -0.6), (0.7, 0.7, 1.0), (0.0, 1.0, 0.0)]


@cache
def pair_mean(cosine, head_dim, sum_norm):
    """``E exp((w_i + w_j) . z)`` with independent chi lengths ``a, b`` at one cosine.

    ``sum_k (|z|^2 / 2)^k / k! * E (a^2 + b^2 + 2 cosine a b)^k / (d (d + 2) ... (d + 2 k - 2))``,
    every power of the sum multiplied out.
    """

    def chi(power):
        return 2 ** (power / 2) * math.gamma((head_dim + power) / 2) / math.gamma(head_dim / 2)

    total = 0.0
    for k in range(40):
        moment = sum(
            math.factorial(k)
            / (math.factorial(i) * math.factorial(j) * math.factorial(k - i - j))
            * (2 * cosine) ** (k - i - j)
            * chi(k + i - j)
            * chi(k - i + j)
            for i in range(k + 1)
            for j in range(k + 1 - i)
        )
        total += (sum_norm / 2) ** k / math.factorial(k) * moment / chi(2 * k)
    return total


def block_error(projection, rows, head_dim, sum_norm):
    """``MSE * m / SM^2`` of one block of positive features."""
    cosine = {"simplex": -1 / max(rows - 1, 1)}.get(projection, 0.0)
    error = math.expm1(sum_norm)
    if projection == "gaussian":
        return error
    for i in range(rows):
        for j in range(rows):
            mean = pair_mean(cosine, head_dim, sum_norm) if i != j else None
            if projection == "antithetic" and i // 2 == j // 2:
                mean = 1.0
            if i != j:
                error += (mean * math.exp(-sum_norm) - 1) / rows
    return error


@pytest.mark.parametrize("head_dim", [2, 3, 7, 16, 64])
@pytest.mark.parametrize("cosine", [0.0, -1.0, -0.5, -1 / 15, 0.3, 1.0])
def test_means_over_pairs_are_the_series(head_dim, cosine):
    norms = torch.tensor([0.0, 1e-8, 0.01, 0.5, 1.27, 3.0], dtype=torch.float64)
    expected = [math.log(pair_mean(cosine, head_dim, u)) for u in norms.tolist()]
    torch.testing.assert_close(
        log_pair_mean(norms, head_dim, cosine),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
    )


@pytest.mark.parametrize("head_dim", [2, 5, 16, 64])
def test_means_over_pairs_of_long_vectors(head_dim):
    """``1F1(d; d/2; x) = e^x`` times a polynomial where ``d`` is even, by Kummer's formula."""
    norms = torch.tensor([10.0, 100.0, 1000.0], dtype=torch.float64)
    logs = log_pair_mean(norms, head_dim, 0.0)
    assert (logs < norms).all()
    if head_dim % 2 == 0:
        x, half = norms / 2, head_dim // 2
        terms = torch.stack(
            [
                k * x.log()
                + math.log(math.comb(half, k))
                + math.lgamma(half)
                - math.lgamma(half + k)
                for k in range(half + 1)
            ]
        )
        torch.testing.assert_close(logs, x + torch.logsumexp(terms, 0))


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 6, 11, 12, 17, 30])
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_blocks_are_averaged_by_their_size(projection, num_rows):
    head_dim = 5
    query, key = pairs(head_dim, LENGTHS, seed=1)
    block = 10 if projection == "antithetic" else 5
    sizes = [block] * (num_rows // block) + [num_rows % block] * (num_rows % block > 0)
    kernel = theory.softmax_kernel(query, key)
    norms = (query + key).square().sum(-1).tolist()
    expected = [
        sum(size * block_error(projection, size, head_dim, u) for size in sizes) / num_rows**2
        for u in norms
    ]
    variance = theory.coupled_variance(query, key, num_rows, projection=projection)
    torch.testing.assert_close(
        variance, torch.tensor(expected, dtype=torch.float64) * kernel.square()
    )
    independent = theory.kernel_variance(query, key, num_rows)
    assert (variance <= independent * (1 + 1e-12)).all()
    if projection == "gaussian" or num_rows == 1:
        torch.testing.assert_close(variance, independent)


def test_orthogonal_rows_gain_more_than_theorem_two_says():
    query, key = pairs(16, [*LENGTHS, (2.0, 1.0, 0.0), (3.0, 3.0, 0.5)], seed=2)
    for rows in (2, 7, 16):
        gain = theory.kernel_variance(query, key, rows) - theory.coupled_variance(query, key, rows)
        assert (gain >= theory.orthogonal_gain(query, key, rows)).all()


def test_couplings_in_order():
    """Opposites help more than a right angle does, and so do the wider angles of a simplex."""
    query, key = pairs(16, [(1.0, 1.0, 0.3), (1.5, 1.0, 0.0)], seed=3)
    value = {name: theory.coupled_variance(query, key, 32, projection=name) for name in PROJECTIONS}
    assert (value["orthogonal"] < 0.9 * value["gaussian"]).all()
    assert (value["simplex"] < value["orthogonal"]).all()
    assert (value["antithetic"] < value["orthogonal"]).all()
    assert torch.equal(value["hadamard"], value["orthogonal"])


def test_independent_rows_of_any_width():
    """The proposal ``N(0, t^2 I)``: ``(2 - t^{-2})^{-d/2} t^d e^{2 u / (2 - t^{-2}) - u} - 1``."""
    query, key = pairs(6, LENGTHS, seed=4)
    norm = (query + key).square().sum(-1)
    for width in (1.0, 1.2, 2.0):
        ratio = 2 - width**-2
        second = ratio**-3 * width**6 * (2 * norm / ratio - norm).exp()
        expected = theory.softmax_kernel(query, key).square() * (second - 1) / 10
        variance = theory.coupled_variance(query, key, 10, projection="gaussian", width=width)
        torch.testing.assert_close(variance, expected)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_measured_variance_of_coupled_rows(projection):
    """21 rows ``1.25 e`` of length 8: a full block or two, and a part of one."""
    head_dim, rows, draws, width = 8, 21, 5000, 1.25
    query, key = pairs(head_dim, [(0.4, 0.5, 0.3), (0.4, 0.6, 0.0)], seed=5)
    total = query + key
    random = generator(6)
    draw = torch.stack(
        [
            draw_projection(rows, head_dim, projection=projection, generator=random)
            for _ in range(draws)
        ]
    )
    logs = width * (draw @ total.T) + (1 - width**2) / 2 * draw.square().sum(-1, keepdim=True)
    ratio = (logs + head_dim * math.log(width) - total.square().sum(-1) / 2).exp().mean(1)
    squared = (ratio - 1).square()
    variance = theory.coupled_variance(query, key, rows, projection=projection, width=width)
    expected = variance / theory.softmax_kernel(query, key).square()
    error = squared.std(0) / math.sqrt(draws)
    slack = 0.05 * expected if projection == "hadamard" else 0
    assert ((squared.mean(0) - expected).abs() < 4 * error + slack).all()
    assert (error < 0.05 * expected).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"projection": "sobol"}, r"projection must be one of .*'sobol'"),
        ({"num_features": 0}, r"num_features must be .*got 0"),
        ({"width": 0.5}, r"width must be .*got 0.5"),
        ({"width": math.nan}, r"width must be .*got nan"),
    ],
)
def test_refused_arguments(options, match):
    x = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=match):
        theory.coupled_variance(x, x, **{"num_features": 8, **options})
