"""The closed forms against formulas written out separately."""

import math

import pytest
import torch

from performers import GeneralizedFeatures, SoftmaxFeatures
from performers.features import CALIBRATED, ESTIMATORS, LearnedFeatures, theory
from tests.features.calibrated import sample
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


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("estimator", ["positive", "hyperbolic", "trigonometric"])
def test_a_feature_map_has_the_variance_of_its_estimator(estimator, num_heads):
    feature_map = SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator, num_heads=num_heads)
    query, key = (torch.randn(3, 2, 5, HEAD_DIM, generator=generator(s)) for s in (3, 4))
    for scale, factor in ((None, HEAD_DIM**-0.25), (0.25, 0.5)):
        expected = theory.kernel_variance(
            query.double() * factor, key.double() * factor, 24, estimator=estimator
        )
        variance = theory.feature_variance(feature_map, query, key, scale)
        torch.testing.assert_close(variance, expected)
        relative = theory.log_relative_variance(feature_map, query, key, scale)
        kernel = theory.softmax_kernel(query.double() * factor, key.double() * factor)
        torch.testing.assert_close(relative, (expected / kernel.square()).log())


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_before_calibration_the_variance_is_that_of_positive(estimator):
    query, key = (torch.randn(20, HEAD_DIM, generator=generator(s)) for s in (5, 6))
    variances = [
        theory.feature_variance(SoftmaxFeatures(HEAD_DIM, 24, estimator=name), query, key)
        for name in (estimator, "positive")
    ]
    torch.testing.assert_close(*variances)


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_heads_have_variances_of_their_own(estimator):
    query, key = sample(HEAD_DIM, 3)
    options = {"estimator": estimator}
    together = SoftmaxFeatures(HEAD_DIM, 24, num_heads=3, **options).double()
    together.calibrate_(query, key, scale=1.0)
    logs = theory.log_relative_variance(together, query, key, 1.0)
    assert logs.shape == (2, 3, 24)
    for head in range(3):
        one = slice(head, head + 1)
        alone = SoftmaxFeatures(HEAD_DIM, 24, **options).double()
        alone.calibrate_(query[:, one], key[:, one], scale=1.0)
        expected = theory.log_relative_variance(alone, query[:, head], key[:, head], 1.0)
        torch.testing.assert_close(logs[:, head], expected)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_logarithms_do_not_overflow(estimator):
    """Twice as long vectors, four times the logarithm, however long."""
    feature_map = SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator).double()
    feature_map.calibrate_(*sample(HEAD_DIM), scale=1.0)
    query, key = pairs(HEAD_DIM, [(1.0, 0.5, 0.3), (0.7, 1.2, -0.4)])
    logs = [
        theory.log_relative_variance(feature_map, size * query, size * key, 1.0)
        for size in (1e2, 2e2, 1e4, 2e4)
    ]
    assert all(x.isfinite().all() for x in logs)
    for short, long in (logs[:2], logs[2:]):
        torch.testing.assert_close(long, 4 * short, rtol=0.05, atol=20)


def test_logarithms_of_an_exact_estimate():
    query = torch.randn(3, HEAD_DIM, generator=generator(2), dtype=torch.float64)
    for estimator in ("positive", "hyperbolic"):
        feature_map = SoftmaxFeatures(HEAD_DIM, 8, estimator=estimator)
        assert (theory.log_relative_variance(feature_map, query, -query) == -math.inf).all()
        assert (theory.feature_variance(feature_map, query, -query) == 0).all()


@pytest.mark.parametrize(
    ("feature_map", "match"),
    [
        (GeneralizedFeatures(HEAD_DIM), "feature_map must be SoftmaxFeatures"),
        (LearnedFeatures(SoftmaxFeatures(HEAD_DIM)), "feature_map must be SoftmaxFeatures"),
        (SoftmaxFeatures(HEAD_DIM, regularized=True), "regularized=False"),
    ],
)
def test_maps_without_a_closed_form_are_refused(feature_map, match):
    x = torch.zeros(2, HEAD_DIM)
    for function in (theory.feature_variance, theory.log_relative_variance):
        with pytest.raises(ValueError, match=match):
            function(feature_map, x, x)


@pytest.mark.parametrize(
    ("num_heads", "query", "key", "match"),
    [
        (None, (2, 5), (2, 6), r"query must have shape .*pairs, 6\).*\(2, 5\)"),
        (None, (2, 6), (2, 5), r"key must have shape .*\(2, 5\)"),
        (None, (6,), (6,), r"query must have shape .*\(6,\)"),
        (None, (2, 6), (3, 6), r"key must have as many vectors as query \(2\).*\(3, 6\)"),
        (3, (2, 6), (2, 6), r"query must have shape \(..., 3, pairs, 6\).*\(2, 6\)"),
        (3, (3, 2, 6), (2, 2, 6), r"key must have shape \(..., 3, pairs, 6\).*\(2, 2, 6\)"),
    ],
)
def test_shapes_that_do_not_fit(num_heads, query, key, match):
    feature_map = SoftmaxFeatures(HEAD_DIM, num_heads=num_heads)
    with pytest.raises(ValueError, match=match):
        theory.feature_variance(feature_map, torch.zeros(query), torch.zeros(key))


@pytest.mark.parametrize("estimator", ["cosine", *CALIBRATED])
def test_estimators_without_a_formula_of_the_pair_alone(estimator):
    x = torch.zeros(1, HEAD_DIM)
    with pytest.raises(ValueError, match=rf"estimator must be one of .*{estimator}"):
        theory.kernel_variance(x, x, 8, estimator=estimator)


def test_errors_name_the_argument():
    x = torch.zeros(1, HEAD_DIM)
    with pytest.raises(ValueError, match="num_features"):
        theory.orthogonal_gain(x, x, HEAD_DIM + 1)
