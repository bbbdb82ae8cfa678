"""Kernel estimates: their formula, mean, variance, and the bias of SMREG."""

import math

import pytest
import torch

from performers import SoftmaxFeatures
from performers.features import CALIBRATED, ESTIMATORS, PROJECTIONS, draw_projection
from performers.features.theory import log_relative_variance
from tests.features import theory
from tests.features.cases import (
    CASES,
    GENERALIZED,
    SOFTMAX,
    TWO_SIDED,
    by_name,
    calibrate,
    generator,
    marked,
    normal,
    pairs,
    sample,
)

PAIRS = [(0.5, 0.5, 0.0), (1.0, 0.6, 0.5), (1.0, 1.0, -0.5), (0.8, 0.8, 1.0), (0.0, 1.0, 0.0)]


def diagonal_estimates(case, query, key, *, num_features, num_heads, seed):
    """Independent estimates of ``K(q_p, k_p)``, shape ``(num_heads, P)``, one for each head."""
    feature_map = case.build(
        query.shape[-1], num_features, num_heads=num_heads, generator=generator(seed)
    ).double()
    expanded = (x.expand(num_heads, *x.shape) for x in (query, key))
    return feature_map.estimate_kernel(*expanded, scale=1.0).diagonal(dim1=-2, dim2=-1)


def z_scores(estimates, expected):
    error = estimates.std(0) / math.sqrt(estimates.shape[0])
    return (estimates.mean(0) - expected) / error.clamp_min(1e-12)


def kernel(query, key):
    return (query * key).sum(-1).exp()


@pytest.mark.parametrize("num_heads", [None, 3])
@pytest.mark.parametrize("case", marked(CASES), ids=str)
def test_features_are_the_formula(case, num_heads):
    num_heads = num_heads if case.projected else None
    feature_map = case.build(12, 32, num_heads=num_heads, generator=generator(1)).double()
    x, y = normal(2, 3, 7, 12, seed=2), normal(2, 3, 5, 12, seed=3)
    for scale, factor in ((None, 12**-0.25), (1.0, 1.0), (0.09, 0.3), (0.0, 0.0)):
        log_x, base_x = case.log_phi(feature_map, x * factor, is_query=True)
        log_y, base_y = case.log_phi(feature_map, y * factor)
        phi_x, phi_y = base_x * log_x.exp(), base_y * log_y.exp()
        for features, phi in (
            (feature_map(x, scale=scale, is_query=True), phi_x),
            (feature_map(y, scale=scale), phi_y),
        ):
            torch.testing.assert_close(features, phi, rtol=1e-10, atol=1e-12)
            assert features.shape[-1] == feature_map.num_features
        estimate = feature_map.estimate_kernel(x, y, scale=scale)
        torch.testing.assert_close(estimate, phi_x @ phi_y.mT, rtol=1e-10, atol=1e-12)


# Means follow from the formula of the features and the distribution of the rows, which have tests
# of their own: together, in one of each kind.
TOGETHER = ["positive", "hyperbolic", "trigonometric", "optimal", "data_aware", "relu", "cos"]
UNBIASED = [case for case in (*SOFTMAX, *GENERALIZED) if case.projected and not case.biased]


@pytest.mark.parametrize("case", marked(UNBIASED, [*map(by_name, TOGETHER)]), ids=str)
def test_estimates_are_unbiased(case):
    query, key = pairs(16, PAIRS)
    estimates = diagonal_estimates(case, query, key, num_features=128, num_heads=512, seed=0)
    expected = kernel(query, key)
    if not case.softmax:
        expected = theory.gaussian_expectation(case.function, case.epsilon, query, key)
    assert z_scores(estimates, expected).abs().max() < 4


@pytest.mark.parametrize("head_dim", [16, 64])
def test_estimates_keep_their_mean_at_length_two(head_dim):
    """QR without the sign fix gives 0.70 at head_dim 16 and 0.88 at 64."""
    query, key = pairs(head_dim, [(1.0, 1.0, 1.0)] * 4, seed=3)
    m = 4 * head_dim
    estimates = diagonal_estimates(
        by_name("positive"), query, key, num_features=m, num_heads=100_000 // m, seed=2
    )
    ratio = estimates / kernel(query, key)
    assert z_scores(ratio, 1.0).abs().max() < 4
    assert (ratio.mean(0) - 1).abs().max() < 0.06, ratio.mean(0)


@pytest.mark.parametrize("case", [c for c in SOFTMAX if not c.signed], ids=str)
def test_estimates_of_long_vectors_do_not_overflow(case):
    """Trigonometric estimates are as large as ``exp(+|x|^2)`` in truth."""
    feature_map = case.build(16, 64, generator=generator(0))
    query = torch.tensor([[100.0] + 15 * [0.0]])
    assert feature_map.estimate_kernel(query, -query, scale=1.0).isfinite().all()


def light_tailed(variances, count=4, among=30, least=0.05):
    """Pairs with little relative variance, for which 400,000 rows are many."""
    order = variances.argsort(stable=True)
    kept = order[variances[order] > least][:among]
    return kept[torch.linspace(0, among - 1, count).long()]


# The closed forms of those that are not calibrated have the next test.
MEASURED = ("saderf", "data_aware")


@pytest.mark.parametrize("num_heads", [pytest.param(None, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize(
    "estimator",
    [x if x in MEASURED else pytest.param(x, marks=pytest.mark.exhaustive) for x in ESTIMATORS],
)
def test_measured_variance_is_the_closed_form(estimator, num_heads):
    """Of independent rows; an estimate is the mean over rows."""
    rows, per_row = 400_000, 2 if estimator in TWO_SIDED else 1
    feature_map = calibrate(
        SoftmaxFeatures(
            6,
            rows * per_row,
            estimator=estimator,
            projection="gaussian",
            num_heads=num_heads,
            generator=generator(0),
        ).double()
    )
    query, key = (x[0] for x in sample(6, num_heads or 1, batch=1, length=200, seed=5))
    variances = log_relative_variance(feature_map, query, key, 1.0).exp() * rows
    chosen = torch.stack([light_tailed(x) for x in variances])
    query, key = (
        torch.stack([x[head, places] for head, places in enumerate(chosen)]) for x in (query, key)
    )
    estimates = feature_map(query, 1.0, is_query=True) * feature_map(key, 1.0)
    estimates = rows * estimates.unflatten(-1, (per_row, -1)).sum(-2)
    estimates /= kernel(query, key).unsqueeze(-1)
    assert ((estimates.mean(-1) - 1).abs() < 4 * estimates.std(-1) / math.sqrt(rows)).all()
    ratio = estimates.var(-1) / variances.gather(-1, chosen)
    assert ((ratio > 0.9) & (ratio < 1.1)).all(), ratio


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_closed_form_follows_from_gaussian_moments(estimator, num_heads):
    """Before calibration all others are ``positive``."""
    feature_map = SoftmaxFeatures(6, 24, estimator=estimator, num_heads=num_heads)
    query, key = normal(3, 2, 5, 6, seed=3), normal(3, 2, 5, 6, seed=4)
    for scale, factor in ((None, 6**-0.25), (0.25, 0.5)):
        scaled = query * factor, key * factor
        variance = theory.kernel_variance(
            *scaled, 24, estimator="positive" if estimator in CALIBRATED else estimator
        )
        logs = log_relative_variance(feature_map, query, key, scale)
        torch.testing.assert_close(logs, (variance / kernel(*scaled).square()).log())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_log_variances_do_not_overflow(estimator):
    """Twice as long vectors, four times the logarithm, however long."""
    feature_map = calibrate(SoftmaxFeatures(6, 24, estimator=estimator).double())
    query, key = pairs(6, [(1.0, 0.5, 0.3), (0.7, 1.2, -0.4)])
    for size in (1e2, 1e4):
        short, long = (
            log_relative_variance(feature_map, x * query, x * key, 1.0) for x in (size, 2 * size)
        )
        assert short.isfinite().all()
        torch.testing.assert_close(long, 4 * short, rtol=0.05, atol=20)


@pytest.mark.parametrize(
    ("estimator", "sign"), [("positive", -1), ("hyperbolic", -1), ("trigonometric", 1)]
)
def test_the_variance_vanishes_where_the_estimate_is_exact(estimator, sign):
    query, feature_map = normal(3, 6), SoftmaxFeatures(6, 8, estimator=estimator).double()
    estimate = feature_map.estimate_kernel(query, sign * query, 1.0).diagonal()
    torch.testing.assert_close(estimate, kernel(query, sign * query))
    assert (log_relative_variance(feature_map, query, sign * query) == -math.inf).all()


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_measured_variance_of_coupled_rows(projection):
    """21 rows ``1.25 e`` of length 8: a full block or two, and a part of one."""
    head_dim, rows, draws, width = 8, 21, 5000, 1.25
    # But for the simplex, whose last block is another, rows are the first of whole blocks.
    most = rows if projection == "simplex" else 4 * head_dim
    count = draws if projection == "simplex" else 1
    options = {"projection": projection, "generator": generator(6)}
    blocks = [draw_projection(draws // count * most, head_dim, **options) for _ in range(count)]
    weight = torch.cat(blocks).view(draws, most, head_dim)[:, :rows]
    query, key = pairs(head_dim, [(0.4, 0.5, 0.3), (0.4, 0.6, 0.0)], seed=5)
    norms = (query + key).square().sum(-1)
    logs = width * weight @ (query + key).T + head_dim * math.log(width) - norms / 2
    logs = logs + (1 - width**2) / 2 * weight.square().sum(-1, keepdim=True)
    squared = (logs.exp().mean(1) - 1).square()
    expected = [theory.coupled_error(projection, rows, head_dim, u, width) for u in norms.tolist()]
    expected = torch.tensor(expected, dtype=torch.float64) / rows
    error = squared.std(0) / math.sqrt(draws)
    slack = 0.05 * expected if projection == "hadamard" else 0
    assert ((squared.mean(0) - expected).abs() < 4 * error + slack).all()
    assert (error < 0.05 * expected).all()


def test_regularized_is_biased_low_by_little():
    query, key = pairs(64, [(1.0, 1.0, 1.0), (0.8, 0.8, 0.2), (0.5, 1.0, 0.0)], seed=4)
    norms = (query + key).square().sum(-1).tolist()
    ratio = torch.tensor([theory.smreg_ratio(u, 64) for u in norms], dtype=torch.float64)
    assert ((ratio > 0.9) & (ratio < 1)).all(), ratio
    estimates = diagonal_estimates(
        by_name("regularized"), query, key, num_features=256, num_heads=400, seed=5
    )
    estimates = estimates / kernel(query, key)
    assert z_scores(estimates, ratio).abs().max() < 4
    assert (estimates.mean(0) < 1).all()


def test_estimates_of_half_precision_are_summed_in_float32_and_ignore_autocast():
    feature_map = SoftmaxFeatures(16, 4096, generator=generator(14))
    query, key = (torch.randn(5, 16, generator=generator(s)).bfloat16() for s in (15, 16))
    estimate, phi = feature_map.estimate_kernel(query, key), feature_map(query)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(estimate, feature_map.estimate_kernel(query, key))
        assert torch.equal(phi, feature_map(query))
    exact = feature_map.double().estimate_kernel(query.double(), key.double())
    assert estimate.dtype == torch.bfloat16
    torch.testing.assert_close(estimate.double(), exact, rtol=2**-8, atol=0)
