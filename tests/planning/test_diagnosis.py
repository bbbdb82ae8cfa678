"""The diagnosis is true, and says when features alone do not suffice."""

import math

import pytest
import torch

import performers

from . import heads


def diagnosed(*samples, **options):
    alone = {"windows": (None,), "sinks": (0,), "listed_keys": (0,), "num_draws": 1}
    options = {"num_features": (64,), "scale": 1.0, **alone, **options}
    return performers.plan(*samples, backend="torch", show=False, **options)


@pytest.mark.parametrize(("power", "suffice"), [(2, True), (8, False)])
def test_anisotropic_gaussians(power, suffice):
    plan = diagnosed(*heads.anisotropic(power), num_features=(64, 512))
    assert plan.diagnosis.features_suffice is suffice
    assert ("cannot do it" in plan.diagnosis.sentence) is not suffice
    assert ("can do it" in plan.diagnosis.sentence) is suffice
    assert ("meet such keys exactly" in str(plan).replace("\n", " ")) is not suffice
    assert (min(setting.error for setting in plan.settings) < 0.5) is suffice


def test_norms_variances_and_dimension_of_gaussians():
    diagnosis = diagnosed(*heads.anisotropic(4)).diagnosis
    assert diagnosis.query_norm == pytest.approx(4, rel=0.05)
    assert diagnosis.key_norm == pytest.approx(4, rel=0.05)
    assert diagnosis.sum_norm == pytest.approx(8, rel=0.05)
    assert diagnosis.centred_sum_norm == pytest.approx(8, rel=0.05)
    assert diagnosis.attended_sum_norm > 1.1 * diagnosis.sum_norm
    spectrum = 1 / torch.arange(1, 65)
    dimension = float(spectrum.sum() ** 2 / spectrum.square().sum())
    assert diagnosis.effective_dimension == pytest.approx(dimension, rel=0.1)
    positive, data_aware = diagnosis.variances
    assert (positive.estimator, data_aware.estimator) == ("positive", "data_aware")
    # log Var = |z|^2 + log(1 - e^{-|z|^2}) for FAVOR+.
    logarithm = diagnosis.attended_sum_norm / math.log(10)
    assert positive.log10_attended == pytest.approx(logarithm, rel=0.02)
    assert data_aware.log10_attended < positive.log10_attended - 0.5
    for variance in diagnosis.variances:
        features = 10**variance.log10_features_needed
        assert variance.kernel_error(features) == pytest.approx(0.5)
        assert variance.kernel_error(1) == pytest.approx(10 ** (variance.log10_attended / 2))


@pytest.mark.parametrize(
    ("is_causal", "masked", "length"), [(False, False, 70), (False, True, 600), (True, True, 70)]
)
def test_shares_of_attention(is_causal, masked, length):
    """Of at most 512 queries a sequence, evenly spaced."""
    query, key, value = heads.structured(batch=2, key_heads=1, length=length)
    mask, rows = None, torch.arange(length)
    if masked:
        mask = torch.ones(2, length, dtype=torch.bool)
        mask[1, :3] = mask[1, -10:] = False
        rows = rows[mask[1]]
    if len(rows) > 512:
        rows = rows[torch.linspace(0, len(rows) - 1, 512).long()]
    diagnosis = diagnosed(
        *(query, key, value),
        is_causal=is_causal,
        key_mask=mask,
        num_features=(16,),
        estimators=("positive",),
        windows=(None, 4, 16),
        sinks=(0, 1, 5),
        scale=None,
    ).diagnosis
    attention = heads.weights(query, key, is_causal=is_causal, key_mask=mask)[1][:, rows]
    distance = (torch.arange(length) - rows[:, None]).abs()
    first = 3 if masked else 0
    for share, part in (
        (diagnosis.top_share, attention.topk(16, dim=-1).values),
        *((diagnosis.window_shares[w], attention * (distance <= w)) for w in (4, 16)),
        *((diagnosis.sink_shares[n], attention[..., first : first + n]) for n in (1, 5)),
    ):
        assert share == pytest.approx(float(part.sum() / attention.sum()), abs=1e-4)


def test_extreme_vectors():
    """Zeros have no variance and no dimension; very long vectors give finite numbers."""
    query, value = torch.zeros(2, 1, 12, 4), heads.structured(length=12, batch=2, heads=1)[2]
    plan = diagnosed(query, query, value)
    assert plan.diagnosis.sum_norm == 0
    assert plan.diagnosis.effective_dimension == 1
    assert plan.diagnosis.features_suffice
    assert plan.recommended.error < 1e-5
    diagnosis = diagnosed(*heads.anisotropic(20_000, batch=2, length=24, head_dim=8)).diagnosis
    assert not diagnosis.features_suffice
    assert diagnosis.variances[0].log10_features_needed > 1000
    assert diagnosis.variances[0].kernel_error(16) == math.inf
    assert "10^" in diagnosis.sentence
    assert "inf" not in diagnosis.sentence
