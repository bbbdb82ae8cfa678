"""Fits are optimal where samples are plenty, and sensible where they are few or degenerate."""

import math

import pytest
import torch

from performers import SoftmaxFeatures
from performers.features import CALIBRATED
from performers.features.moments import PairMoments
from performers.features.proposal import fit_proposal, log_second_moment, standard_proposal
from performers.features.theory import log_relative_variance
from tests.features.cases import generator, normal, sample

HEAD_DIM = 4
EYE = torch.eye(HEAD_DIM, dtype=torch.float64)


def plenty(heads=2, *, weighted=False):
    """Queries, keys, weights of their pairs and moments; too many for a prior to matter.

    Weights of attention make queries and keys dependent on one another.
    """
    query, key = (x.squeeze(0) for x in sample(HEAD_DIM, heads, batch=1, length=300))
    logits = 2 * query @ key.mT
    weights = logits.softmax(-1) if weighted else torch.ones_like(logits)
    moments = PairMoments.empty(heads, HEAD_DIM)
    moments.add(query.unsqueeze(1), key, weights.unsqueeze(1))
    moments.samples = 10**12
    return query, key, weights / weights.sum((-2, -1), keepdim=True), moments


def objective(proposal, query, key, weights):
    """Mean ``log E[estimate^2] / SM^2`` over the pairs, for each head."""
    query = query @ proposal.query_transform.mT
    key = key @ proposal.key_transform.mT
    total = query.unsqueeze(-2) + key.unsqueeze(-3)
    logs = log_second_moment(total.flatten(-3, -2), proposal)
    return (logs * weights.flatten(-2, -1)).sum(-1)


def mean_log_variance(query, key, *, num_features=64, estimator="data_aware", samples=None):
    """Over pairs, after a fit to ``samples``."""
    features = SoftmaxFeatures(query.shape[-1], num_features, estimator=estimator).double()
    if samples is not None:
        features.calibrate_(*samples, scale=1.0)
    return log_relative_variance(features, query, key, 1.0).mean().item()


def published_variance(power):
    """``1 - 4 A``, ``A = (1 - 2 p - sqrt((2 p + 1)^2 + 8 p)) / 16``."""
    a = (1 - 2 * power - torch.sqrt((2 * power + 1) ** 2 + 8 * power)) / 16
    return 1 - 4 * a


def test_the_second_moment_is_that_of_draws():
    """An integral over the rows by Monte Carlo."""
    center = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    widths = torch.tensor([1.1, 1.3, 1.6], dtype=torch.float64)
    transform = torch.diag(widths) @ torch.linalg.qr(normal(3, 3)).Q
    proposal = standard_proposal(1, 3)._replace(center=center[None], transform=transform[None])
    total, draws = 0.5 * normal(6, 3, seed=2), normal(400_000, 3, seed=1)
    rows = draws @ transform.T + center
    log = (draws.square().sum(-1) - rows.square().sum(-1)) / 2 + torch.linalg.slogdet(transform)[1]
    estimates = (rows @ total.T + log[:, None] - total.square().sum(-1) / 2).exp()
    expected = log_second_moment(total[None], proposal)[0].exp()
    for samples, mean in ((estimates, 1.0), (estimates.square(), expected)):
        error = samples.std(0) / math.sqrt(len(samples))
        assert ((samples.mean(0) - mean).abs() < 4 * error).all()
        assert (error < 0.02 * samples.mean(0)).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_data_aware_is_a_local_optimum(weighted):
    query, key, weights, moments = plenty(weighted=weighted)
    best = fit_proposal("data_aware", moments)
    center, transform = (x.clone().requires_grad_() for x in (best.center, best.transform))
    least = objective(best._replace(center=center, transform=transform), query, key, weights)
    least.sum().backward()
    assert center.grad.abs().max() < 1e-9
    assert transform.grad.abs().max() < 1e-9
    for seed in range(8):
        for size in (0.01, 0.04):
            center = best.center + size * normal(2, HEAD_DIM, seed=seed)
            transform = best.transform + size * normal(2, HEAD_DIM, HEAD_DIM, seed=100 + seed)
            for changes in ({"center": center}, {"transform": transform}):
                other = objective(best._replace(**changes), query, key, weights)
                assert (other > least + 1e-3 * size**2).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_more_freedom_fits_better(weighted):
    """Each estimator against the ones that it contains, on the pairs that it is fitted to."""
    query, key, weights, moments = plenty(weighted=weighted)
    fits = {name: fit_proposal(name, moments) for name in CALIBRATED}
    fits["positive"] = standard_proposal(2, HEAD_DIM)
    value = {name: objective(fit, query, key, weights) for name, fit in fits.items()}
    for better, worse in (
        ("optimal", "positive"),
        ("sderf", "optimal"),
        ("data_aware", "sderf"),
        ("data_aware", "saderf"),
    ):
        assert (value[better] < value[worse]).all(), (better, worse, value)


def test_the_balance_gives_both_sides_one_covariance():
    query, key, _, moments = plenty()
    fit = fit_proposal("data_aware", moments)
    torch.testing.assert_close(fit.query_transform @ fit.key_transform.mT, EYE.expand(2, -1, -1))
    covariances = [
        torch.stack([torch.cov(x.T, correction=0) for x in side @ matrix.mT])
        for side, matrix in ((query, fit.query_transform), (key, fit.key_transform))
    ]
    torch.testing.assert_close(*covariances, rtol=0.02, atol=0.02)
    after = sum(x.diagonal(dim1=1, dim2=2).sum(-1) for x in covariances)
    before = sum(x.var(-2, correction=0).sum(-1) for x in (query, key))
    assert (after < 0.9 * before).all()


def test_fits_are_the_published_ones():
    """Likhosherstov et al.: one width, a width per eigenvector, ``(E k_l^2 / E q_l^2)^{1/4}``."""
    query, key, _, moments = plenty(1)
    query, key = query[0], key[0]
    power = (query[:, None] + key).square().sum(-1).mean() / HEAD_DIM
    optimal = fit_proposal("optimal", moments).transform[0]
    torch.testing.assert_close(optimal, published_variance(power).sqrt() * EYE)
    means = torch.outer(query.mean(0), key.mean(0))
    matrix = query.T @ query / 300 + key.T @ key / 300 + means + means.T
    values, vectors = torch.linalg.eigh(matrix)
    transform = fit_proposal("sderf", moments).transform[0]
    covariance = vectors @ torch.diag(published_variance(values)) @ vectors.T
    torch.testing.assert_close(transform @ transform.T, covariance)
    fit = fit_proposal("saderf", moments)
    ratio = (key.square().sum(0) / query.square().sum(0)) ** 0.25
    diagonal = fit.query_transform[0].diagonal()
    # The floor under powers moves it by little.
    torch.testing.assert_close(diagonal, ratio, rtol=0.01, atol=0)
    torch.testing.assert_close(fit.query_transform[0], torch.diag(diagonal))
    torch.testing.assert_close(fit.key_transform[0], torch.diag(1 / diagonal))


def test_heads_without_a_pair_stay_standard():
    moments = PairMoments.empty(3, HEAD_DIM)
    weights = torch.ones(3, 1, 40, 40)
    weights[1] = 0
    query, key = sample(HEAD_DIM, 3, batch=1, length=40)
    moments.add(query[0].unsqueeze(1), key[0], weights)
    standard = standard_proposal(3, HEAD_DIM)
    for estimator in CALIBRATED:
        proposal = fit_proposal(estimator, moments)
        for new, plain in zip(proposal, standard, strict=True):
            assert torch.equal(new[1], plain[1])
            assert new.isfinite().all()
        assert not torch.equal(proposal.transform[0], standard.transform[0])


Q, K = normal(1, 1, 50, HEAD_DIM), normal(1, 1, 50, HEAD_DIM, seed=1)
PLANE = torch.tensor([1.0, 1.0, 0.0, 0.0])
DEGENERATE = {
    "one sample": (Q[:, :, :1], K[:, :, :1]),
    "one key": (Q, K[:, :, :1]),
    "zeros": (0 * Q, 0 * K),
    "constant": (0 * Q[:, :, :5] + 1, 0 * K[:, :, :5] + 1),
    "queries of zero": (0 * Q, K),
    "keys of zero": (Q, 0 * K),
    "one direction": (Q[..., :1] * torch.ones(HEAD_DIM), K[..., :1] * torch.ones(HEAD_DIM)),
    "orthogonal planes": (Q * PLANE, K * (1 - PLANE)),
    "huge": (1e4 * Q, 1e4 * K),
    "tiny": (1e-12 * Q, 1e-12 * K),
    "very different sides": (1e3 * Q, 1e-3 * K),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("estimator", CALIBRATED)
def test_degenerate_samples_give_an_unbiased_estimator(estimator, name):
    """Finite, with an exact balance, and exact in the mean for ordinary vectors."""
    feature_map = SoftmaxFeatures(HEAD_DIM, 50_000, estimator=estimator, generator=generator(0))
    feature_map.double().calibrate_(*DEGENERATE[name], scale=1.0)
    assert all(x.isfinite().all() for x in feature_map.buffers())
    product = feature_map.query_transform[0] @ feature_map.key_transform[0].T
    torch.testing.assert_close(product, EYE, rtol=1e-9, atol=1e-9)
    assert (torch.linalg.svdvals(feature_map.transform) >= 1 - 1e-9).all()
    query, key = 0.1 * normal(1, HEAD_DIM, seed=2), 0.1 * normal(1, HEAD_DIM, seed=3)
    variance = log_relative_variance(feature_map, query, key, 1.0).exp().item()
    # A fit to vectors thousands of times as long is of no use here.
    assert (variance < 1e-3) == (name not in ("huge", "very different sides"))
    if variance < 1e-3:
        estimate = feature_map.estimate_kernel(query, key, scale=1.0)
        ratio = (estimate / (query * key).sum(-1).exp()).item()
        assert abs(ratio - 1) < 5 * math.sqrt(variance) + 1e-9


def test_a_few_samples_are_enough_to_gain():
    """Each further sample helps, and the fit to few is no worse than none at all."""
    query, key = sample(32, batch=1, length=2000)
    rest = query[0, 0, 1000:], key[0, 0, 1000:]
    values = [mean_log_variance(*rest)] + [
        mean_log_variance(*rest, samples=(query[:, :, :count], key[:, :, :count]))
        for count in (4, 16, 64, 1000)
    ]
    assert values == sorted(set(values), reverse=True)


def anisotropic(power, count, seed):
    """Queries and keys with covariance eigenvalues ``~ 1 / i`` and ``E|q|^2 = E|k|^2 = power``."""
    spectrum = 1 / torch.arange(1, 65, dtype=torch.float64)
    root = (power * spectrum / spectrum.sum()).sqrt()
    return root * normal(count, 64, seed=seed), root * normal(count, 64, seed=seed + 1)


@pytest.mark.parametrize(
    ("power", "median", "mean"), [(2.0, 0.65, 0.2), (4.0, 0.2, 1e-3), (8.0, 0.01, 1e-6)]
)
def test_the_error_on_anisotropic_data_is_far_below_that_of_favor_plus(power, median, mean):
    """Over 4,096 pairs, independent rows; at 8 neither can be used."""
    samples = [x[None, None] for x in anisotropic(power, 1024, seed=0)]
    query, key = anisotropic(power, 4096, seed=3)
    plain, fitted = (SoftmaxFeatures(64, 64, estimator="data_aware").double() for _ in range(2))
    fitted.calibrate_(*samples, scale=1.0)
    theirs, ours = (log_relative_variance(m, query, key, 1.0).exp() for m in (plain, fitted))
    assert ours.median() < median * theirs.median()
    assert ours.mean() < mean * theirs.mean()
    assert (ours.mean() < 0.5) == (power == 2)
    assert (ours.median() > 100) == (power == 8)
