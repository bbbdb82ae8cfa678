"""Numerator and denominator are unbiased, and exact pairs add nothing to their variance.

``favor_attention`` divides them, but a pair whose weight is known undoes the division: with the
identity for values the outputs of a row are its weights over their sum, and where the weight of
the query's own key, or of a sink, is exactly ``exp(scale q . k)``, the sum follows and with it
every other weight. One call has thousands of heads with the same inputs, each with a projection
of its own.
"""

import functools
import math

import pytest
import torch

from performers import favor_attention
from tests.attention import oracle
from tests.attention.cases import BACKENDS, EXACT
from tests.features.cases import generator

HEADS, LENGTH, HEAD_DIM, NUM_FEATURES = 3000, 9, 4, 8
SCALE = 1 / math.sqrt(HEAD_DIM)
UNBIASED = [case for case in EXACT if case.softmax and not case.biased]
EXACT_TERMS = [
    {"window": 0},
    {"window": 2},
    {"window": 2, "is_causal": True},
    {"sinks": 2},
    {"sinks": 1, "is_causal": True},
    {"window": 1, "sinks": 2},
]


def inputs():
    """Vectors of length about 1.3 at head_dim 4: estimates vary, and their tails are tame."""
    random = generator(0)
    return tuple(0.65 * torch.randn(LENGTH, HEAD_DIM, generator=random) for _ in range(2))


@functools.cache
def feature_map_of(case):
    """One projection for each head; an estimator that is fitted, fitted to these inputs."""
    feature_map = case.build(HEAD_DIM, NUM_FEATURES, num_heads=HEADS, generator=generator(1))
    if case.calibrated and case.drawn:
        feature_map.reset_calibration_().calibrate_(*(x.expand(1, HEADS, -1, -1) for x in inputs()))
    return feature_map


def recovered(case, backend, **options):
    """Before normalisation: weights ``(HEADS, L, L)``, numerators and sums, from one call."""
    query, key = inputs()
    value = torch.cat((torch.eye(LENGTH), column_values()), dim=-1)
    tensors = [x.expand(1, HEADS, -1, -1) for x in (query, key, value)]
    out = favor_attention(*tensors, feature_map_of(case), backend=backend, **options)[0].double()
    truth = (SCALE * query.double() @ key.double().mT).exp()
    # The pair whose weight every row knows: its own key, or the first sink.
    rows = torch.arange(LENGTH)
    anchor = rows if "window" in options else torch.zeros_like(rows)
    denominator = truth[rows, anchor] / out[:, rows, anchor]
    weights, numerator = out.split((LENGTH, out.shape[-1] - LENGTH), dim=-1)
    scale = denominator.unsqueeze(-1)
    return weights * scale, numerator * scale, denominator


def column_values():
    return torch.randn(LENGTH, 3, generator=generator(2))


def pairs(**options):
    """Which pairs are seen, and which of them are exact."""
    is_causal = options.get("is_causal", False)
    terms = {name: x for name, x in options.items() if name != "is_causal"}
    seen = oracle.visible(LENGTH, LENGTH, is_causal=is_causal)[0, 0]
    return seen, oracle.exact(LENGTH, LENGTH, **terms)[0, 0] & seen


def assert_unbiased(samples, truth):
    """The mean over heads within four standard errors; samples without spread, at rounding."""
    error = samples.std(0) / math.sqrt(samples.shape[0])
    assert ((samples.mean(0) - truth).abs() <= 4 * error + 1e-5 * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("case", UNBIASED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_means_over_projections(backend, case, options):
    query, key = (x.double() for x in inputs())
    seen, close = pairs(**options)
    weights, numerator, denominator = recovered(case, backend, **options)
    truth = (SCALE * query @ key.mT).exp() * seen
    assert_unbiased(denominator, truth.sum(-1))
    assert_unbiased(numerator, truth @ column_values().double())
    assert_unbiased(weights, truth)
    far = seen & ~close
    assert (weights.std(0)[far] > 0.01 * truth[far]).all()


@pytest.mark.parametrize("options", EXACT_TERMS, ids=str)
@pytest.mark.parametrize("case", EXACT, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_far_pairs_vary(backend, case, options):
    """For each projection: the true weight of a near pair, ``estimate_kernel`` of a far one."""
    query, key = inputs()
    seen, close = pairs(**options)
    weights, _, denominator = recovered(case, backend, **options)
    truth = (SCALE * query.double() @ key.double().mT).exp()
    estimate = feature_map_of(case).estimate_kernel(
        *(x.expand(HEADS, -1, -1).double() for x in (query, key))
    )
    expected = torch.where(close, truth, estimate) * seen
    # Rounding grows where signed features leave a small sum; positive ones are held to 1e-5.
    tame = denominator.abs() > 0.1 * truth.mul(seen).sum(-1)
    if not case.signed:
        tame = torch.ones_like(tame)
    size = expected.abs().sum(-1, keepdim=True)
    assert tame.double().mean() > 0.9
    assert (((weights - expected).abs() <= 3e-5 * size) | ~tame.unsqueeze(-1)).all()


@pytest.mark.parametrize("case", UNBIASED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_over_everything_has_no_variance(backend, case):
    weights, numerator, denominator = recovered(case, backend, window=LENGTH)
    for samples in (weights, numerator, denominator):
        assert (samples.amax(0) - samples.amin(0)).max() <= 1e-5 * samples.abs().max()
