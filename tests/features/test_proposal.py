"""Fits are optimal where samples are plenty, and sensible where they are few or degenerate."""

import math

import pytest
import torch

from performers import SoftmaxFeatures
from performers.features import CALIBRATED, theory
from performers.features.moments import PairMoments
from performers.features.proposal import (
    fit_data_aware,
    fit_optimal,
    fit_saderf,
    fit_sderf,
    log_second_moment,
    standard_proposal,
)
from tests.features.calibrated import sample
from tests.features.cases import generator

HEAD_DIM = 4
FITS = {
    "optimal": fit_optimal,
    "sderf": fit_sderf,
    "saderf": fit_saderf,
    "data_aware": fit_data_aware,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


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


def second_moment(total, proposal):
    """``E[estimate^2] / SM^2`` of one row, an integral over the rows by Monte Carlo."""
    draws = normal(400_000, total.shape[-1], seed=1)
    rows = draws @ proposal.transform[0].T + proposal.center[0]
    log = (draws.square().sum(-1) - rows.square().sum(-1)) / 2
    log = log + torch.linalg.slogdet(proposal.transform[0])[1]
    estimates = (rows @ total.T + log[:, None] - total.square().sum(-1) / 2).exp()
    return estimates


def test_the_second_moment_is_that_of_draws():
    proposal = standard_proposal(1, 3)._replace(
        center=torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64),
        transform=torch.diag(torch.tensor([1.1, 1.3, 1.6], dtype=torch.float64))[None]
        @ torch.linalg.qr(normal(3, 3)).Q,
    )
    total = 0.5 * normal(6, 3, seed=2)
    estimates = second_moment(total, proposal)
    expected = log_second_moment(total[None], proposal)[0].exp()
    for samples, mean in ((estimates, 1.0), (estimates.square(), expected)):
        error = samples.std(0) / math.sqrt(len(samples))
        assert ((samples.mean(0) - mean).abs() < 4 * error).all()
        assert (error < 0.02 * samples.mean(0)).all()


def test_the_standard_gaussian_is_the_positive_estimator():
    total = normal(1, 10, HEAD_DIM)
    result = log_second_moment(total, standard_proposal(1, HEAD_DIM))
    torch.testing.assert_close(result, total.square().sum(-1))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [0.01, 0.04])
@pytest.mark.parametrize("part", ["center", "transform", "both"])
def test_nothing_near_the_fit_is_better(part, size, weighted):
    query, key, weights, moments = plenty(weighted=weighted)
    best = fit_data_aware(moments)
    least = objective(best, query, key, weights)
    for seed in range(30):
        center, transform = best.center, best.transform
        if part != "transform":
            center = center + size * normal(*center.shape, seed=seed)
        if part != "center":
            transform = transform + size * normal(*transform.shape, seed=100 + seed)
        changed = best._replace(center=center, transform=transform)
        other = objective(changed, query, key, weights)
        assert (other > least + 1e-3 * size**2).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_where_the_gradient_vanishes(weighted):
    query, key, weights, moments = plenty(weighted=weighted)
    best = fit_data_aware(moments)
    center, transform = (x.clone().requires_grad_() for x in (best.center, best.transform))
    changed = best._replace(center=center, transform=transform)
    objective(changed, query, key, weights).sum().backward()
    assert center.grad.abs().max() < 1e-9
    assert transform.grad.abs().max() < 1e-9


def test_the_balance_gives_both_sides_one_covariance():
    query, key, _, moments = plenty()
    fit = fit_data_aware(moments)
    identity = torch.eye(HEAD_DIM, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(fit.query_transform @ fit.key_transform.mT, identity)
    covariances = [
        torch.stack([torch.cov(x.T, correction=0) for x in side @ matrix.mT])
        for side, matrix in ((query, fit.query_transform), (key, fit.key_transform))
    ]
    torch.testing.assert_close(*covariances, rtol=0.02, atol=0.02)
    powers = [torch.stack([x.trace() for x in side]) for side in covariances]
    before = [x.var(-2, correction=0).sum(-1) for x in (query, key)]
    assert (sum(powers) < 0.9 * sum(before)).all()


@pytest.mark.parametrize("weighted", [False, True])
def test_more_freedom_fits_better(weighted):
    """Each estimator against the ones that it contains, on the pairs that it is fitted to."""
    query, key, weights, moments = plenty(weighted=weighted)
    value = {name: objective(fit(moments), query, key, weights) for name, fit in FITS.items()}
    value["positive"] = objective(standard_proposal(2, HEAD_DIM), query, key, weights)
    for better, worse in (
        ("optimal", "positive"),
        ("sderf", "optimal"),
        ("data_aware", "sderf"),
        ("data_aware", "saderf"),
    ):
        assert (value[better] < value[worse]).all(), (better, worse, value)


def test_optimal_has_the_published_width():
    """``A = (1 - 2 p - sqrt((2 p + 1)^2 + 8 p)) / 16``, ``p = E |q + k|^2 / d``."""
    query, key, _, moments = plenty(1)
    total = query[0, :, None] + key[0]
    power = total.square().sum(-1).mean().item() / HEAD_DIM
    a = (1 - 2 * power - math.sqrt((2 * power + 1) ** 2 + 8 * power)) / 16
    expected = math.sqrt(1 - 4 * a) * torch.eye(HEAD_DIM, dtype=torch.float64)
    torch.testing.assert_close(fit_optimal(moments).transform[0], expected)


def test_sderf_has_the_published_matrices():
    """``B = (I - 4 A)^{1/2} U^T`` on the eigenvectors of ``E[q q^T] + E[k k^T] + ...``."""
    query, key, _, moments = plenty(1)
    query_mean, key_mean = query[0].mean(0), key[0].mean(0)
    matrix = query[0].T @ query[0] / 300 + key[0].T @ key[0] / 300
    matrix = matrix + torch.outer(query_mean, key_mean) + torch.outer(key_mean, query_mean)
    values, vectors = torch.linalg.eigh(matrix)
    a = (1 - 2 * values - ((2 * values + 1) ** 2 + 8 * values).sqrt()) / 16
    covariance = vectors @ torch.diag(1 - 4 * a) @ vectors.T
    transform = fit_sderf(moments).transform[0]
    torch.testing.assert_close(transform @ transform.T, covariance)


def test_saderf_has_the_published_balance():
    """``(sum k_l^2 / sum q_l^2)^{1/4}`` on queries; the floor under powers moves it by little."""
    query, key, _, moments = plenty(1)
    ratio = (key[0].square().sum(0) / query[0].square().sum(0)) ** 0.25
    fit = fit_saderf(moments)
    diagonal = fit.query_transform[0].diagonal()
    torch.testing.assert_close(diagonal, ratio, rtol=0.01, atol=0)
    torch.testing.assert_close(fit.query_transform[0], torch.diag(diagonal))
    torch.testing.assert_close(fit.key_transform[0], torch.diag(1 / diagonal))


DEGENERATE = {
    "one sample": (normal(1, 1, 1, HEAD_DIM), normal(1, 1, 1, HEAD_DIM, seed=1)),
    "one key": (normal(1, 1, 40, HEAD_DIM), normal(1, 1, 1, HEAD_DIM, seed=1)),
    "nothing but zeros": 2 * (torch.zeros(1, 1, 5, HEAD_DIM, dtype=torch.float64),),
    "constant": 2 * (torch.ones(1, 1, 5, HEAD_DIM, dtype=torch.float64),),
    "queries of zero": (
        torch.zeros(1, 1, 50, HEAD_DIM, dtype=torch.float64),
        normal(1, 1, 50, HEAD_DIM),
    ),
    "keys of zero": (
        normal(1, 1, 50, HEAD_DIM),
        torch.zeros(1, 1, 50, HEAD_DIM, dtype=torch.float64),
    ),
    "one direction": (
        normal(1, 1, 50, 1) * torch.ones(HEAD_DIM),
        normal(1, 1, 50, 1, seed=1) * torch.ones(HEAD_DIM),
    ),
    "two orthogonal planes": (
        normal(1, 1, 50, HEAD_DIM) * torch.tensor([1.0, 1.0, 0.0, 0.0]),
        normal(1, 1, 50, HEAD_DIM, seed=1) * torch.tensor([0.0, 0.0, 1.0, 1.0]),
    ),
    "huge": (1e4 * normal(1, 1, 50, HEAD_DIM), 1e4 * normal(1, 1, 50, HEAD_DIM, seed=1)),
    "tiny": (1e-12 * normal(1, 1, 50, HEAD_DIM), 1e-12 * normal(1, 1, 50, HEAD_DIM, seed=1)),
    "sides of very different size": (
        1e3 * normal(1, 1, 50, HEAD_DIM),
        1e-3 * normal(1, 1, 50, HEAD_DIM, seed=1),
    ),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("estimator", CALIBRATED)
def test_degenerate_samples_give_an_unbiased_estimator_all_the_same(estimator, name):
    """Finite, with an exact balance, and exact in the mean for ordinary vectors."""
    feature_map = SoftmaxFeatures(HEAD_DIM, 200_000, estimator=estimator, generator=generator(0))
    feature_map.double().calibrate_(*DEGENERATE[name], scale=1.0)
    assert all(torch.isfinite(x).all() for x in feature_map.buffers())
    identity = torch.eye(HEAD_DIM, dtype=torch.float64)
    product = feature_map.query_transform[0] @ feature_map.key_transform[0].T
    torch.testing.assert_close(product, identity, rtol=1e-9, atol=1e-9)
    assert (torch.linalg.svdvals(feature_map.transform) >= 1 - 1e-9).all()
    query, key = 0.1 * normal(1, HEAD_DIM, seed=2), 0.1 * normal(1, HEAD_DIM, seed=3)
    variance = theory.log_relative_variance(feature_map, query, key, 1.0).exp().item()
    # A fit to vectors thousands of times as long is of no use here.
    assert (variance < 1e-3) == (name not in ("huge", "sides of very different size"))
    if variance < 1e-3:
        estimate = feature_map.estimate_kernel(query, key, scale=1.0)
        ratio = (estimate / (query * key).sum(-1).exp()).item()
        assert abs(ratio - 1) < 5 * math.sqrt(variance) + 1e-9


def test_one_sample_gives_nearly_the_optimal_estimator():
    """Mean log variance on the population that one pair was taken from, for twenty such pairs."""
    head_dim = 32
    query, key = sample(head_dim, batch=1, length=300)
    excess = []
    for index in range(20):
        value = {}
        for estimator in ("optimal", "sderf", "data_aware"):
            feature_map = SoftmaxFeatures(head_dim, 64, estimator=estimator).double()
            one = (x[:, :, index : index + 1] for x in (query, key))
            feature_map.calibrate_(*one, scale=1.0)
            logs = theory.log_relative_variance(feature_map, query[0, 0], key[0, 0], 1.0)
            value[estimator] = logs.mean().item()
        excess.append([value[name] - value["optimal"] for name in ("data_aware", "sderf")])
    ours, published = torch.tensor(excess).T
    assert ours.mean() < 0
    assert ours.max() < 0.4 < published.mean()


def test_a_few_samples_are_enough_to_gain():
    """Each further sample helps, and the fit to few is no worse than none at all."""
    head_dim = 32
    query, key = sample(head_dim, batch=1, length=2000)
    value = {}
    for count in (0, 4, 16, 64, 1000):
        feature_map = SoftmaxFeatures(head_dim, 64, estimator="data_aware").double()
        if count:
            some = (x[:, :, :count] for x in (query, key))
            feature_map.calibrate_(*some, scale=1.0)
        rest = (x[0, 0, 1000:] for x in (query, key))
        value[count] = theory.log_relative_variance(feature_map, *rest, 1.0).mean().item()
    assert value[0] > value[4] > value[16] > value[64] > value[1000], value


def test_heads_without_a_pair_stay_standard():
    moments = PairMoments.empty(3, HEAD_DIM)
    weights = torch.ones(3, 1, 40, 40)
    weights[1] = 0
    query, key = sample(HEAD_DIM, 3, batch=1, length=40)
    moments.add(query[0].unsqueeze(1), key[0], weights)
    standard = standard_proposal(3, HEAD_DIM)
    for fit in FITS.values():
        proposal = fit(moments)
        for new, plain in zip(proposal, standard, strict=True):
            assert torch.equal(new[1], plain[1])
            assert torch.isfinite(new).all()
        assert not torch.equal(proposal.transform[0], standard.transform[0])
