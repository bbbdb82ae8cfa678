"""The diagnosis says what is so, and says when features alone cannot do it."""

import math

import pytest
import torch

import performers

from . import heads

ALONE = {
    "windows": (None,),
    "sinks": (0,),
    "listed_keys": (0,),
    "num_draws": 1,
    "backend": "torch",
    "show": False,
}


@pytest.mark.parametrize(("power", "suffice"), [(2, True), (8, False)])
def test_anisotropic_gaussians(power, suffice):
    samples = heads.anisotropic(power)
    found = performers.plan(*samples, scale=1.0, num_features=(64, 512), **ALONE)
    assert found.diagnosis.features_suffice is suffice
    assert ("cannot do it" in found.diagnosis.sentence) is not suffice
    assert ("can do it" in found.diagnosis.sentence) is suffice
    # What the sentence says is what was measured.
    best = min(setting.error for setting in found.settings)
    assert (best < 0.5) is suffice
    assert ("meet such keys exactly" in str(found).replace("\n", " ")) is not suffice


def test_norms_variances_and_dimension_of_gaussians():
    query, key, value = heads.anisotropic(4, batch=4, heads=2)
    found = performers.plan(query, key, value, scale=1.0, num_features=(64,), **ALONE).diagnosis
    assert found.query_norm == pytest.approx(4, rel=0.05)
    assert found.key_norm == pytest.approx(4, rel=0.05)
    assert found.sum_norm == pytest.approx(8, rel=0.05)
    assert found.centred_sum_norm == pytest.approx(8, rel=0.05)
    assert found.attended_sum_norm > 1.1 * found.sum_norm
    spectrum = 1 / torch.arange(1, 65)
    dimension = float(spectrum.sum() ** 2 / spectrum.square().sum())
    assert found.effective_dimension == pytest.approx(dimension, rel=0.1)
    positive, data_aware = found.variances
    assert (positive.estimator, data_aware.estimator) == ("positive", "data_aware")
    # log Var = |z|^2 + log(1 - e^{-|z|^2}) for FAVOR+.
    assert positive.log10_attended == pytest.approx(
        found.attended_sum_norm / math.log(10), rel=0.02
    )
    assert data_aware.log10_attended < positive.log10_attended - 0.5
    for variance in found.variances:
        features = 10**variance.log10_features_needed
        assert variance.kernel_error(features) == pytest.approx(0.5)
        assert variance.kernel_error(1) == pytest.approx(10 ** (variance.log10_attended / 2))


def test_a_constant_in_queries_and_keys_is_seen_and_calibrated_away():
    query, key, value = heads.anisotropic(1, length=128, head_dim=16)
    found = performers.plan(
        query + 1.5, key + 1.5, value, scale=1.0, num_features=(64,), **ALONE
    ).diagnosis
    assert found.sum_norm > 100
    assert found.centred_sum_norm < 4
    assert found.calibrated_sum_norm < 4
    assert found.features_suffice


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_shares_of_attention(is_causal, masked):
    query, key, value = heads.structured(batch=2, key_heads=1, length=70)
    mask = None
    if masked:
        mask = torch.ones(2, 70, dtype=torch.bool)
        mask[1, :3] = False
        mask[1, 60:] = False
    found = performers.plan(
        query,
        key,
        value,
        is_causal=is_causal,
        key_mask=mask,
        num_features=(16,),
        estimators=("positive",),
        windows=(None, 4, 16),
        sinks=(0, 1, 5),
        listed_keys=(0,),
        num_draws=1,
        backend="torch",
        show=False,
    ).diagnosis
    attention = heads.weights(query, key, is_causal=is_causal, key_mask=mask)[1]
    first = 0
    if masked:
        attention, first = attention[:, mask[1]], 3
    places = torch.arange(70)
    rows = places if mask is None else places[mask[1]]
    distance = (places - rows[:, None]).abs()
    whole = attention.sum()
    for window in (4, 16):
        share = (attention * (distance <= window)).sum() / whole
        assert found.window_shares[window] == pytest.approx(float(share), abs=1e-4)
    for sinks in (1, 5):
        share = attention[..., first : first + sinks].sum() / whole
        assert found.sink_shares[sinks] == pytest.approx(float(share), abs=1e-4)
    share = attention.topk(16, dim=-1).values.sum() / whole
    assert found.top_share == pytest.approx(float(share), abs=1e-4)


def test_vectors_that_do_not_vary():
    """Nothing to estimate: no variance, no dimension, and no division by zero."""
    query = torch.zeros(2, 1, 12, 4)
    value = torch.randn(2, 1, 12, 4, generator=torch.Generator().manual_seed(0))
    found = performers.plan(query, query, value, num_features=(16,), **ALONE)
    assert found.diagnosis.sum_norm == 0
    assert found.diagnosis.effective_dimension == 1
    assert found.diagnosis.features_suffice
    assert found.recommended.error < 1e-5


def test_very_long_vectors_give_finite_numbers():
    query, key, value = heads.anisotropic(20_000, batch=2, length=24, head_dim=8)
    found = performers.plan(query, key, value, scale=1.0, num_features=(16,), **ALONE).diagnosis
    assert not found.features_suffice
    assert found.variances[0].log10_features_needed > 1000
    assert found.variances[0].kernel_error(16) == math.inf
    assert "10^" in found.sentence
    assert "inf" not in found.sentence
