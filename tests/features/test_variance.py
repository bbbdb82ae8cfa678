"""Measured variances of every estimator against the closed forms, and the bias of SMREG."""

import math

import pytest
import torch

from performers import SoftmaxFeatures
from performers.features import ESTIMATORS, theory
from tests.features.calibrated import calibrate, sample
from tests.features.cases import TWO_SIDED, generator

HEAD_DIM, ROWS = 6, 400_000


def estimates_of_rows(feature_map, query, key):
    """What each draw says of each pair, ``(..., pairs, draws)``; their mean is the estimate."""
    parts = feature_map(query, 1.0, is_query=True) * feature_map(key, 1.0)
    parts = parts * feature_map.num_features
    if feature_map.estimator in TWO_SIDED:
        # Rows come with their opposites, and sines with their cosines.
        parts = parts.unflatten(-1, (2, -1)).mean(-2)
    return parts


def light_tailed(variances, count=4, among=30, least=0.05):
    """Places of pairs with little relative variance, for which 400,000 rows are many."""
    order = variances.argsort(stable=True)
    kept = order[variances[order] > least][:among]
    return kept[torch.linspace(0, among - 1, count).long()]


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_measured_variance_is_the_closed_form(estimator, num_heads):
    num_features = ROWS * (2 if estimator in TWO_SIDED else 1)
    feature_map = calibrate(
        SoftmaxFeatures(
            HEAD_DIM,
            num_features,
            estimator=estimator,
            projection="gaussian",
            num_heads=num_heads,
            generator=generator(0),
        ).double()
    )
    heads = num_heads or 1
    query, key = (x[0] for x in sample(HEAD_DIM, heads, batch=1, length=200, seed=5))
    draws = feature_map.num_features // (2 if estimator in TWO_SIDED else 1)
    logs = theory.log_relative_variance(feature_map, query, key, 1.0) + math.log(draws)
    chosen = torch.stack([light_tailed(x) for x in logs.exp()])
    query, key = (
        torch.stack([x[head, places] for head, places in enumerate(chosen)]) for x in (query, key)
    )
    rows = estimates_of_rows(feature_map, query, key)
    kernel = theory.softmax_kernel(query, key)
    error = rows.std(-1) / math.sqrt(draws)
    assert ((rows.mean(-1) - kernel).abs() < 4 * error).all()
    variance = rows.var(-1) / draws
    ratio = variance / theory.feature_variance(feature_map, query, key, 1.0)
    assert ((ratio > 0.9) & (ratio < 1.1)).all(), ratio
    torch.testing.assert_close(
        theory.feature_variance(feature_map, query, key, 1.0),
        kernel.square() * logs.gather(-1, chosen).exp() / draws,
    )


def smreg_over_softmax(sum_norm, head_dim):
    """The mean of ``exp(w . z - |z|^2 / 2)`` over rows on the sphere of radius ``sqrt(d)``.

    ``e^{-u / 2} sum_n (d u / 4)^n / (n! (d / 2)_n)``, ``u = |z|^2``.
    """
    logs = [
        n * math.log(head_dim * sum_norm / 4)
        - math.lgamma(n + 1)
        - math.lgamma(head_dim / 2 + n)
        + math.lgamma(head_dim / 2)
        for n in range(2000)
    ]
    return math.fsum(math.exp(x - sum_norm / 2) for x in logs)


@pytest.mark.parametrize("head_dim", [2, 4, 8, 16, 64, 256, 1024])
def test_the_bias_of_smreg_is_inside_its_bound(head_dim):
    """Theorem 1 of Choromanski et al. 2021: ``1 - 2 d^{-1/3} + o(d^{-1/3}) <= ratio <= 1``.

    The upper bound for all vectors, from ``d = 2``; the lower one where entries of the attention
    matrix are bounded, here for ``|z|^2 <= 4`` (queries and keys of length one), where the
    remainder is not needed.
    """
    for sum_norm in (0.01, 0.3, 1.0, 2.0, 4.0, 10.0, 100.0):
        ratio = smreg_over_softmax(sum_norm, head_dim)
        assert ratio < 1
        if sum_norm <= 4:
            assert ratio >= 1 - 2 * head_dim ** (-1 / 3)


def test_the_bias_of_smreg_vanishes_as_one_over_the_dimension():
    """``-u^2 / (4 d)`` in the limit."""
    for sum_norm in (1.0, 4.0):
        lack = (1 - smreg_over_softmax(sum_norm, 4096)) * 4096
        assert lack == pytest.approx(sum_norm**2 / 4, rel=0.01)


@pytest.mark.exhaustive
@pytest.mark.parametrize("projection", ["gaussian", "orthogonal", "simplex", "hadamard"])
@pytest.mark.parametrize("head_dim", [4, 16, 64])
def test_the_measured_bias_of_smreg(head_dim, projection):
    """1e5 rows at ``|z|^2 = 4``: the mean of the series, inside the bound."""
    random = generator(head_dim)
    feature_map = SoftmaxFeatures(
        head_dim, 102_400, projection=projection, regularized=True, generator=random
    ).double()
    direction = torch.randn(1, head_dim, generator=random, dtype=torch.float64)
    query = direction / direction.norm()
    parts = feature_map(query, 1.0) ** 2 * feature_map.num_features / math.e
    means = parts.view(-1, 1024).mean(-1)
    error = means.std() / math.sqrt(len(means))
    ratio = means.mean()
    assert abs(ratio - smreg_over_softmax(4.0, head_dim)) < 4 * error
    assert 1 - 2 * head_dim ** (-1 / 3) <= ratio
    assert ratio < 1
    assert error < 0.02
