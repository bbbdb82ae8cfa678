"""Kernel estimates: what they are, their means and their spread."""

import math

import pytest
import torch

from performers import SoftmaxFeatures
from performers.features import theory
from tests.features.cases import CASES, GENERALIZED, SOFTMAX, by_name, generator, pairs

PAIRS = [(0.5, 0.5, 0.0), (1.0, 0.6, 0.5), (1.0, 1.0, -0.5), (0.8, 0.8, 1.0), (0.0, 1.0, 0.0)]


def diagonal_estimates(case, query, key, *, num_features, num_heads, seed):
    """Independent estimates of ``K(q_p, k_p)``, shape ``(num_heads, P)``, one for each head."""
    feature_map = case.build(
        query.shape[-1], num_features, num_heads=num_heads, generator=generator(seed)
    ).double()
    expanded = (x.expand(num_heads, *x.shape) for x in (query, key))
    kernel = feature_map.estimate_kernel(*expanded, scale=1.0)
    return kernel.diagonal(dim1=-2, dim2=-1)


def z_scores(estimates, expected):
    error = estimates.std(0) / math.sqrt(estimates.shape[0])
    return (estimates.mean(0) - expected) / error.clamp_min(1e-12)


def gaussian_expectation(function, epsilon, query, key):
    """``E[(f(w.q) + eps)(f(w.k) + eps)]`` by a midpoint rule over the plane of q and k."""
    nodes = torch.linspace(-8, 8, 801, dtype=torch.float64)[:-1] + 0.01
    mass = (-nodes.square() / 2).exp()
    mass = mass / mass.sum()
    values = []
    for q, k in zip(query, key, strict=True):
        along = (q @ k) / q.norm().clamp_min(1e-300)
        across = (k.square().sum() - along.square()).clamp_min(0).sqrt()
        left = function(q.norm() * nodes) + epsilon
        right = function(along * nodes[:, None] + across * nodes) + epsilon
        values.append(mass @ (left[:, None] * right) @ mass)
    return torch.stack(values)


@pytest.mark.parametrize(
    ("case", "num_heads"),
    [(c, n) for c in CASES for n in ((None, 3) if c.projected else (None,))],
    ids=str,
)
def test_features_are_the_formula(case, num_heads):
    feature_map = case.build(12, 32, num_heads=num_heads, generator=generator(1)).double()
    x = torch.randn(2, 3, 7, 12, generator=generator(2), dtype=torch.float64)
    y = torch.randn(2, 3, 5, 12, generator=generator(3), dtype=torch.float64)
    for scale, factor in ((None, 12**-0.25), (1.0, 1.0), (0.09, 0.3), (0.0, 0.0)):
        log_x, base_x = case.log_phi(feature_map, x * factor, is_query=True)
        log_y, base_y = case.log_phi(feature_map, y * factor)
        phi_x, phi_y = base_x * log_x.exp(), base_y * log_y.exp()
        for got, phi in (
            (feature_map(x, scale=scale, is_query=True), phi_x),
            (feature_map(y, scale=scale), phi_y),
        ):
            torch.testing.assert_close(got, phi, rtol=1e-10, atol=1e-12)
        kernel = feature_map.estimate_kernel(x, y, scale=scale)
        torch.testing.assert_close(kernel, phi_x @ phi_y.mT, rtol=1e-10, atol=1e-12)
    assert feature_map(x).shape[-1] == feature_map.num_features


@pytest.mark.parametrize("case", [c for c in SOFTMAX if not c.biased], ids=str)
def test_softmax_estimates_are_unbiased(case):
    query, key = pairs(16, PAIRS)
    estimates = diagonal_estimates(case, query, key, num_features=128, num_heads=1024, seed=0)
    scores = z_scores(estimates, (query * key).sum(-1).exp())
    assert scores.abs().max() < 4, scores


@pytest.mark.parametrize("case", [c for c in GENERALIZED if c.projected], ids=str)
def test_generalized_estimates_are_unbiased(case):
    query, key = pairs(16, PAIRS)
    estimates = diagonal_estimates(case, query, key, num_features=128, num_heads=1024, seed=1)
    expected = gaussian_expectation(case.function, case.epsilon, query, key)
    scores = z_scores(estimates, expected)
    assert scores.abs().max() < 4, scores


@pytest.mark.parametrize("case", [c for c in SOFTMAX if not c.signed], ids=str)
def test_estimates_of_long_vectors_do_not_overflow(case):
    """Trigonometric estimates are as large as ``exp(+|x|^2)`` in truth."""
    feature_map = case.build(16, 64, generator=generator(0))
    query = torch.tensor([[100.0] + 15 * [0.0]])
    estimate = feature_map.estimate_kernel(query, -query, scale=1.0)
    assert torch.isfinite(estimate).all()


@pytest.mark.parametrize("head_dim", [16, 64])
def test_estimates_keep_their_mean_at_length_two(head_dim):
    """QR without the sign fix gives 0.70 at head_dim 16 and 0.88 at 64."""
    query, key = pairs(head_dim, [(1.0, 1.0, 1.0)] * 4, seed=3)
    case = by_name("positive")
    estimates = diagonal_estimates(
        case, query, key, num_features=4 * head_dim, num_heads=200_000 // (4 * head_dim), seed=2
    )
    ratio = estimates / (query * key).sum(-1).exp()
    assert z_scores(ratio, 1.0).abs().max() < 4
    assert (ratio.mean(0) - 1).abs().max() < 0.06, ratio.mean(0)


def test_regularized_is_biased_low_by_little():
    """Against the mean of ``exp(w . z)`` over the sphere: ``sum_n (d |z|^2/4)^n/(n! (d/2)_n)``."""
    head_dim = 64
    query, key = pairs(head_dim, [(1.0, 1.0, 1.0), (0.8, 0.8, 0.2), (0.5, 1.0, 0.0)], seed=4)
    squared = (query + key).square().sum(-1)
    term = torch.ones_like(squared)
    mean = term.clone()
    for n in range(1, 60):
        term = term * (head_dim * squared / 4) / (n * (head_dim / 2 + n - 1))
        mean = mean + term
    ratio = mean / (squared / 2).exp()
    assert ((ratio > 0.9) & (ratio < 1)).all(), ratio
    estimates = diagonal_estimates(
        by_name("regularized"), query, key, num_features=256, num_heads=800, seed=5
    )
    estimates = estimates / (query * key).sum(-1).exp()
    assert z_scores(estimates, ratio).abs().max() < 4
    assert (estimates.mean(0) < 1).all()


@pytest.mark.parametrize("estimator", ["positive", "hyperbolic", "trigonometric"])
def test_variance_of_independent_rows_is_the_closed_form(estimator):
    query, key = pairs(16, [(0.5, 0.5, 0.5), (0.6, 0.6, 0.0), (0.7, 0.4, -0.8)], seed=6)
    case = by_name(f"{estimator}-gaussian")
    estimates = diagonal_estimates(case, query, key, num_features=32, num_heads=12_000, seed=7)
    expected = theory.kernel_variance(query, key, 32, estimator=estimator)
    assert (estimates.var(0) / expected - 1).abs().max() < 0.1, estimates.var(0) / expected


@pytest.mark.parametrize("estimator", ["positive", "hyperbolic", "trigonometric"])
def test_orthogonal_rows_lower_the_error(estimator):
    query, key = pairs(16, [(0.7, 0.7, 0.5), (0.8, 0.8, 0.0), (0.6, 0.6, 0.9)], seed=8)
    errors = [
        diagonal_estimates(by_name(name), query, key, num_features=32, num_heads=8000, seed=9)
        .sub((query * key).sum(-1, keepdim=True).T.exp())
        .square()
        .mean(0)
        for name in (estimator, f"{estimator}-gaussian")
    ]
    assert (errors[0] < 0.95 * errors[1]).all(), errors


def test_orthogonal_gain_is_at_least_that_of_theorem_two():
    query, key = pairs(16, [(0.7, 0.7, 0.5), (0.8, 0.8, 0.0), (0.6, 0.6, 0.9)], seed=10)
    expected = (query * key).sum(-1).exp()
    squares = (
        diagonal_estimates(
            by_name("positive"), query, key, num_features=16, num_heads=12_000, seed=11
        )
        - expected
    ).square()
    bound = theory.kernel_variance(query, key, 16) - theory.orthogonal_gain(query, key, 16)
    error = squares.std(0) / math.sqrt(squares.shape[0])
    assert (squares.mean(0) < bound + 4 * error).all()


def test_error_falls_as_one_over_the_number_of_features():
    query, key = pairs(16, [(1.0, 1.0, 0.3)] * 4, seed=12)
    expected = (query * key).sum(-1).exp()
    case = by_name("positive")
    small, large = (
        (diagonal_estimates(case, query, key, num_features=m, num_heads=2000, seed=13) - expected)
        .square()
        .mean()
        for m in (32, 256)
    )
    assert 5 < small / large < 12


def test_estimates_of_half_precision_inputs_are_summed_in_float32():
    feature_map = SoftmaxFeatures(16, 4096, generator=generator(14))
    query, key = (torch.randn(5, 16, generator=generator(s)).bfloat16() for s in (15, 16))
    estimate = feature_map.estimate_kernel(query, key)
    exact = feature_map.double().estimate_kernel(query.double(), key.double())
    assert estimate.dtype == torch.bfloat16
    torch.testing.assert_close(estimate.double(), exact, rtol=2**-8, atol=0)


def test_estimates_ignore_autocast():
    feature_map = SoftmaxFeatures(16, 64, generator=generator(17))
    query, key = (torch.randn(20, 16, generator=generator(s)) for s in (18, 19))
    with torch.autocast("cpu", torch.bfloat16):
        estimate, phi = feature_map.estimate_kernel(query, key), feature_map(query)
    assert torch.equal(estimate, feature_map.estimate_kernel(query, key))
    assert torch.equal(phi, feature_map(query))
