"""The closed forms against formulas written out separately."""

import math

import pytest
import torch

from performers.features import theory
from tests.features.cases import generator, pairs

HEAD_DIM = 6


def moment(z):
    """``E[exp(w . z)]`` for ``w ~ N(0, I)``."""
    return math.exp(sum(x * x for x in z) / 2)


def variances_by_moments(q, k, num_features):
    """From first principles: every product of exponentials has a Gaussian moment."""
    z = [a + b for a, b in zip(q, k, strict=True)]
    damping = math.exp(-sum(x * x for x in (*q, *k)) / 2)
    mean = moment(z) * damping
    positive = moment([2 * x for x in z]) * damping**2 - mean**2
    # cosh(w . z): its square is (1 + cosh(2 w . z)) / 2.
    hyperbolic = (1 + moment([2 * x for x in z])) / 2 * damping**2 - mean**2
    # cos(w . (q - k)): its square is (1 + cos(2 w . (q - k))) / 2, E[cos(w . x)] = e^{-|x|^2/2}.
    squared = sum((a - b) ** 2 for a, b in zip(q, k, strict=True))
    growth = 1 / damping
    trigonometric = (1 + math.exp(-2 * squared)) / 2 - math.exp(-squared)
    return {
        "positive": positive / num_features,
        "hyperbolic": hyperbolic / (num_features / 2),
        "trigonometric": growth**2 * trigonometric / (num_features / 2),
    }


@pytest.mark.parametrize("estimator", ["positive", "hyperbolic", "trigonometric"])
def test_variance_from_moments(estimator):
    query, key = (
        0.7 * torch.randn(20, HEAD_DIM, generator=generator(s), dtype=torch.float64) for s in (0, 1)
    )
    for num_features in (2, 64):
        variance = theory.kernel_variance(query, key, num_features, estimator=estimator)
        expected = [
            variances_by_moments(q, k, num_features)[estimator]
            for q, k in zip(query.tolist(), key.tolist(), strict=True)
        ]
        torch.testing.assert_close(
            variance, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-14
        )


def test_variance_vanishes_where_the_estimate_is_exact():
    query = torch.randn(3, HEAD_DIM, generator=generator(2), dtype=torch.float64)
    for estimator in ("positive", "hyperbolic"):
        assert (theory.kernel_variance(query, -query, 8, estimator=estimator) == 0).all()
    assert (theory.kernel_variance(query, query, 8, estimator="trigonometric") == 0).all()


def test_kernel_is_the_exponential_of_the_inner_product():
    query, key = pairs(HEAD_DIM, [(1.0, 2.0, 0.25), (3.0, 1.0, -1.0)])
    expected = torch.tensor([math.exp(0.5), math.exp(-3.0)], dtype=torch.float64)
    torch.testing.assert_close(theory.softmax_kernel(query, key), expected)


@pytest.mark.parametrize("num_features", [1, 2, HEAD_DIM])
def test_orthogonal_gain_formula(num_features):
    query, key = pairs(HEAD_DIM, [(1.0, 0.5, 0.3), (0.7, 1.2, -0.4)])
    gain = theory.orthogonal_gain(query, key, num_features).tolist()
    for value, (a, b, cosine) in zip(gain, [(1.0, 0.5, 0.3), (0.7, 1.2, -0.4)], strict=True):
        gap = math.exp(a * b * cosine) - math.exp(-(a * a + b * b) / 2)
        expected = 2 * (num_features - 1) / (num_features * (HEAD_DIM + 2)) * gap**2
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-15)


def test_errors_name_the_argument():
    x = torch.zeros(1, HEAD_DIM)
    with pytest.raises(ValueError, match="num_features"):
        theory.orthogonal_gain(x, x, HEAD_DIM + 1)
    with pytest.raises(ValueError, match="estimator"):
        theory.kernel_variance(x, x, 8, estimator="cosine")
