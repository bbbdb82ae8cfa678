"""Calibration of softmax features: what it fits to, and what becomes of the fit."""

import copy
import io
import math
import pickle

import pytest
import torch

from performers import SoftmaxFeatures, redraw_features_
from performers.features import CALIBRATED, theory
from performers.features.moments import PairMoments, add_attention_pairs
from performers.features.proposal import fit_data_aware, fit_optimal, fit_saderf, fit_sderf
from tests.features.calibrated import sample
from tests.features.cases import generator

HEAD_DIM = 6
FIT = ("center", "transform", "query_transform", "key_transform", "log_volume")


def build(estimator="data_aware", **options):
    options = {"generator": generator(0), **options}
    return SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator, **options)


def fitted(query, key, estimator="data_aware", *, num_heads=None, **options):
    feature_map = build(estimator, num_heads=num_heads).double()
    return feature_map.calibrate_(query, key, **{"scale": 1.0, **options})


def fit_of(feature_map, head=None):
    heads = slice(None) if head is None else slice(head, head + 1)
    return {name: feature_map.get_buffer(name)[heads] for name in FIT}


def assert_same_fit(first, second, *, rtol=1e-6, atol=1e-6):
    for name in FIT:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=atol, msg=name)


def covariance(feature_map):
    """Of the rows: eigenvectors have no sign, and equal eigenvalues no order."""
    return feature_map.transform @ feature_map.transform.mT


def is_standard(feature_map):
    plain = fit_of(build(num_heads=feature_map.num_heads))
    return all(
        torch.equal(plain[name].double(), x.double()) for name, x in fit_of(feature_map).items()
    )


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_before_calibration_it_is_the_positive_estimator(estimator):
    feature_map, positive = build(estimator), build("positive")
    assert is_standard(feature_map)
    query, key = (x[0, 0].float() for x in sample(HEAD_DIM))
    torch.testing.assert_close(
        feature_map.estimate_kernel(query, key), positive.estimate_kernel(query, key)
    )


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_what_each_estimator_fits(estimator):
    feature_map = fitted(*sample(HEAD_DIM, length=200), estimator)
    fit, eye = fit_of(feature_map), torch.eye(HEAD_DIM, dtype=torch.float64)[None]
    transform, width = fit["transform"], fit["transform"].diagonal(dim1=-2, dim2=-1)
    isotropic = torch.allclose(transform, width.mean() * eye)
    assert isotropic == (estimator in ("optimal", "saderf"))
    assert (torch.linalg.svdvals(transform) >= 1).all()
    assert torch.linalg.svdvals(transform).max() > 1.05
    assert (fit["center"] == 0).all() == (estimator != "data_aware")
    balanced = not torch.equal(fit["query_transform"], eye)
    assert balanced == (estimator in ("saderf", "data_aware"))
    torch.testing.assert_close(fit["query_transform"] @ fit["key_transform"].mT, eye)
    volume = torch.linalg.slogdet(transform)[1]
    torch.testing.assert_close(fit["log_volume"], volume, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_heads", [None, 2])
@pytest.mark.parametrize("estimator", CALIBRATED)
def test_batches_add_up(estimator, num_heads):
    query, key = sample(HEAD_DIM, 2, batch=6)
    whole = fitted(query, key, estimator, num_heads=num_heads, is_causal=True)
    streamed = build(estimator, num_heads=num_heads).double()
    for part in ((0, 1), (1, 4), (4, 6)):
        batch = slice(*part)
        streamed.calibrate_(query[batch], key[batch], scale=1.0, is_causal=True)
    assert_same_fit(fit_of(streamed), fit_of(whole))
    first = fitted(query[:1], key[:1], estimator, num_heads=num_heads, is_causal=True)
    assert not torch.allclose(first.transform, whole.transform, atol=1e-3)


def test_a_shared_projection_pools_heads():
    query, key = sample(HEAD_DIM, 3)
    pooled = fitted(query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None])
    assert_same_fit(fit_of(fitted(query, key)), fit_of(pooled))


@pytest.mark.parametrize("num_heads", [2, 4])
def test_heads_are_fitted_one_by_one(num_heads):
    """Four heads of queries on two of keys; the projection has as many heads as either."""
    query, key = sample(HEAD_DIM, 4)
    key = key[:, :2]
    fit = fitted(query, key, num_heads=num_heads)
    for head in range(num_heads):
        heads = slice(2 * head, 2 * head + 2) if num_heads == 2 else slice(head, head + 1)
        group = head if num_heads == 2 else head // 2
        alone = fitted(query[:, heads], key[:, group : group + 1])
        assert_same_fit(fit_of(fit, head), fit_of(alone))


def test_grouped_heads_may_share_one_projection():
    query, key = sample(HEAD_DIM, 4)
    key = key[:, :2]
    repeated = key.repeat_interleave(2, dim=1)
    assert_same_fit(fit_of(fitted(query, key)), fit_of(fitted(query, repeated)))


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_masked_keys_count_for_nothing(estimator):
    query, key = sample(HEAD_DIM, batch=1)
    mask = torch.rand(1, 24, generator=generator(1)) < 0.6
    without = fitted(query, key[:, :, mask[0]], estimator)
    for junk in (math.nan, math.inf, 1e30):
        masked = key.masked_fill(~mask[:, None, :, None], junk)
        assert_same_fit(fit_of(fitted(query, masked, estimator, key_mask=mask)), fit_of(without))


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_only_data_aware_weighs_pairs_by_their_attention(estimator):
    query, key = sample(HEAD_DIM, 2)
    fit = {
        "optimal": fit_optimal,
        "sderf": fit_sderf,
        "saderf": fit_saderf,
        "data_aware": fit_data_aware,
    }[estimator]
    options = {"key_mask": None, "is_causal": True, "window": 2, "sinks": 1}
    alike = []
    for weighted in (False, True):
        moments = PairMoments.empty(2, HEAD_DIM)
        add_attention_pairs(
            moments, query.unsqueeze(2), key, attention_weighted=weighted, **options
        )
        expected = fit(moments)
        feature_map = fitted(query, key, estimator, num_heads=2, **options)
        alike.append(torch.allclose(feature_map.transform, expected.transform, atol=1e-9))
        if alike[-1]:
            for name, x in expected._asdict().items():
                torch.testing.assert_close(feature_map.get_buffer(name), x.contiguous())
    assert alike == [estimator != "data_aware", estimator == "data_aware"]


@pytest.mark.parametrize("option", [{"is_causal": True}, {"window": 4}, {"sinks": 3}], ids=str)
@pytest.mark.parametrize("estimator", CALIBRATED)
def test_exact_and_unseen_pairs_change_the_fit(estimator, option):
    query, key = sample(HEAD_DIM)
    plain, other = fitted(query, key, estimator), fitted(query, key, estimator, **option)
    assert not torch.allclose(plain.transform, other.transform, atol=1e-4)


@pytest.mark.parametrize("estimator", ["optimal", "sderf", "saderf"])
def test_sinks_may_be_anything(estimator):
    """The attention that they draw aside, which is what ``data_aware`` weighs by."""
    query, key = sample(HEAD_DIM)
    wild = key.clone()
    wild[:, :, 0] *= 50
    first, second = (fitted(query, k, estimator, sinks=1) for k in (key, wild))
    assert_same_fit(fit_of(first), fit_of(second))
    assert not torch.allclose(fitted(query, wild, estimator).transform, first.transform)


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_the_scale_is_part_of_the_vectors(estimator):
    query, key = sample(HEAD_DIM)
    root = HEAD_DIM**-0.25
    for scale, factor in ((None, root), (0.49, 0.7), (4.0, 2.0)):
        assert_same_fit(
            fit_of(fitted(query, key, estimator, scale=scale)),
            fit_of(fitted(query * factor, key * factor, estimator)),
        )


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_a_vector_added_to_all_keys_is_free(estimator):
    """Softmax does not see it, and neither does the variance of ``data_aware``."""
    query, key = sample(HEAD_DIM, batch=40, length=100)
    plain, moved = (fitted(query, k, estimator) for k in (key, key + 1.5))
    variances = [
        theory.log_relative_variance(fit, query[:, 0], k[:, 0], 1.0).mean().item()
        for fit, k in ((plain, key), (moved, key + 1.5))
    ]
    if estimator == "data_aware":
        assert variances[1] == pytest.approx(variances[0], abs=0.02)
    else:
        assert variances[1] > variances[0] + 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("estimator", CALIBRATED)
def test_samples_in_half_precision(estimator, dtype):
    query, key = (x.to(dtype) for x in sample(HEAD_DIM, 2))
    half, full = (
        build(estimator, num_heads=2).calibrate_(q, k, is_causal=True)
        for q, k in ((query, key), (query.double(), key.double()))
    )
    assert half.transform.dtype == torch.float32
    for name in ("center", "query_transform", "key_transform"):
        torch.testing.assert_close(
            half.get_buffer(name), full.get_buffer(name), rtol=0.01, atol=0.01
        )
    torch.testing.assert_close(covariance(half), covariance(full), rtol=0.02, atol=0.02)


def test_calibration_leaves_no_graph_and_works_in_inference_mode():
    query, key = (x.requires_grad_() for x in sample(HEAD_DIM))
    feature_map = fitted(query, key)
    assert not any(x.requires_grad for x in fit_of(feature_map).values())
    with torch.inference_mode():
        again = fitted(*sample(HEAD_DIM))
    assert_same_fit(fit_of(feature_map), fit_of(again))


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_redrawing_keeps_the_fit(estimator):
    feature_map = fitted(*sample(HEAD_DIM), estimator)
    fit, draws = copy.deepcopy(fit_of(feature_map)), feature_map.weight.clone()
    redraw_features_(feature_map, generator(5))
    assert not torch.equal(feature_map.weight, draws)
    assert all(torch.equal(fit[name], x) for name, x in fit_of(feature_map).items())


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_resetting_forgets_all_samples(estimator):
    query, key = sample(HEAD_DIM)
    feature_map = fitted(query, key, estimator, num_heads=1)
    assert not is_standard(feature_map)
    assert feature_map.reset_calibration_() is feature_map
    assert is_standard(feature_map)
    feature_map.calibrate_(2 * query, key, scale=1.0)
    fresh = fitted(2 * query, key, estimator, num_heads=1)
    assert_same_fit(fit_of(feature_map), fit_of(fresh), rtol=0, atol=0)


def test_resetting_an_estimator_without_a_fit():
    feature_map = build("positive")
    before = feature_map.weight.clone()
    assert feature_map.reset_calibration_() is feature_map
    assert torch.equal(feature_map.weight, before)


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_saving_and_loading(estimator):
    feature_map = build(estimator, num_heads=2).calibrate_(*sample(HEAD_DIM, 2))
    stream = io.BytesIO()
    torch.save(feature_map.state_dict(), stream)
    stream.seek(0)
    loaded = build(estimator, num_heads=2, generator=generator(9))
    loaded.load_state_dict(torch.load(stream, weights_only=True))
    query, key = (x.float() for x in sample(HEAD_DIM, 2, seed=7))
    expected = feature_map.estimate_kernel(query, key)
    assert torch.equal(loaded.estimate_kernel(query, key), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_with_a_calibration_of_their_own(clone):
    batches = [sample(HEAD_DIM, seed=seed) for seed in range(3)]
    original = fitted(*batches[0])
    before = copy.deepcopy(fit_of(original))
    copied = clone(original)
    assert_same_fit(fit_of(copied), before, rtol=0, atol=0)
    copied.calibrate_(*batches[1], scale=1.0)
    assert_same_fit(fit_of(original), before, rtol=0, atol=0)
    both = fitted(*batches[0]).calibrate_(*batches[1], scale=1.0)
    assert_same_fit(fit_of(copied), fit_of(both))
    original.calibrate_(*batches[2], scale=1.0)
    assert_same_fit(fit_of(copied), fit_of(both))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_keeps_float32_at_least(dtype):
    feature_map = build().calibrate_(*sample(HEAD_DIM))
    before = fit_of(feature_map)
    feature_map.to(dtype)
    for name, x in fit_of(feature_map).items():
        assert x.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(x.float(), before[name], rtol=0, atol=0)
    feature_map.calibrate_(*sample(HEAD_DIM, seed=3))
    assert feature_map.transform.dtype == torch.promote_types(dtype, torch.float32)
