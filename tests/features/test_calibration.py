"""Calibration of softmax features: what is fitted, to what, and when it is forgotten."""

import copy
import math
import pickle

import pytest
import torch

from performers import SoftmaxFeatures, redraw_features_
from performers.features import CALIBRATED
from performers.features.moments import PairMoments, add_attention_pairs
from performers.features.proposal import fit_proposal
from performers.features.theory import log_relative_variance
from tests.features.cases import generator, sample

HEAD_DIM = 6
FIT = ("center", "transform", "query_transform", "key_transform", "log_volume")
META = torch.device("meta")
EYE = torch.eye(HEAD_DIM, dtype=torch.float64)[None]
pytestmark = pytest.mark.parametrize("estimator", CALIBRATED)


def build(estimator, **options):
    options = {"generator": generator(0), **options}
    return SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator, **options).double()


def fitted(query, key, estimator, *, num_heads=None, **options):
    return build(estimator, num_heads=num_heads).calibrate_(query, key, **{"scale": 1.0, **options})


def assert_same_fit(first, second, *, head=None, tolerance=1e-6):
    heads = slice(None) if head is None else slice(head, head + 1)
    for name in FIT:
        torch.testing.assert_close(
            first.get_buffer(name)[heads],
            second.get_buffer(name),
            rtol=tolerance,
            atol=tolerance,
            msg=name,
        )


def test_until_calibrated_an_estimator_raises(estimator):
    feature_map, (query, key) = build(estimator), sample(HEAD_DIM)
    message = f"estimator='{estimator}' is fitted to data: call calibrate_"
    loaded = build(estimator)
    loaded.load_state_dict(feature_map.state_dict())
    for each in (feature_map, copy.deepcopy(feature_map), loaded):
        assert not each.is_calibrated
        with pytest.raises(ValueError, match=message):
            each(key)
        with pytest.raises(ValueError, match=message):
            each.estimate_kernel(query, key)
    fit = fitted(query, key, estimator)
    loaded.load_state_dict(fit.state_dict())
    assert loaded.is_calibrated
    torch.testing.assert_close(loaded(key), fit(key))
    with pytest.raises(ValueError, match=message):
        fit.reset_calibration_()(key)


def test_parts_that_each_estimator_fits(estimator):
    fit = fitted(*sample(HEAD_DIM, length=200), estimator)
    widths = torch.linalg.svdvals(fit.transform)
    assert (widths >= 1).all()
    assert widths.max() > 1.05
    isotropic = torch.allclose(fit.transform, widths.mean() * EYE)
    assert isotropic == (estimator in ("optimal", "saderf"))
    assert (fit.center == 0).all() == (estimator != "data_aware")
    assert torch.equal(fit.query_transform, EYE) == (estimator in ("optimal", "sderf"))
    torch.testing.assert_close(fit.query_transform @ fit.key_transform.mT, EYE)
    torch.testing.assert_close(fit.log_volume, torch.linalg.slogdet(fit.transform)[1])


@pytest.mark.parametrize("num_heads", [None, 2])
def test_batches_add_up(estimator, num_heads):
    """One without an estimated pair adds nothing."""
    query, key = sample(HEAD_DIM, 2, batch=6)
    options = {"num_heads": num_heads, "is_causal": True, "window": 2}
    whole, first = (fitted(query[:n], key[:n], estimator, **options) for n in (6, 1))
    streamed = build(estimator, num_heads=num_heads)
    for batch in (slice(0, 1), slice(1, 4), slice(4, 6)):
        streamed.calibrate_(query[batch], key[batch], scale=1.0, is_causal=True, window=2)
    streamed.calibrate_(3 * query[:, :, :3], key[:, :, :3], scale=1.0, is_causal=True, window=2)
    assert_same_fit(streamed, whole)
    assert not torch.allclose(first.transform, whole.transform, atol=1e-3)


def test_a_shared_projection_pools_heads(estimator):
    query, key = sample(HEAD_DIM, 4)
    fit = fitted(query, key, estimator)
    assert_same_fit(
        fit, fitted(query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None], estimator)
    )
    grouped = fitted(query, key[:, :2], estimator)
    assert_same_fit(grouped, fitted(query, key[:, :2].repeat_interleave(2, dim=1), estimator))


@pytest.mark.parametrize("num_heads", [2, 4])
def test_heads_are_fitted_one_by_one(estimator, num_heads):
    """Four heads of queries on two of keys; the projection has as many heads as either."""
    query, key = sample(HEAD_DIM, 4)
    key = key[:, :2]
    fit = fitted(query, key, estimator, num_heads=num_heads)
    for head in range(num_heads):
        heads = slice(2 * head, 2 * head + 2) if num_heads == 2 else slice(head, head + 1)
        group = head * 2 // num_heads
        assert_same_fit(
            fit, fitted(query[:, heads], key[:, group : group + 1], estimator), head=head
        )


def test_masked_keys_do_not_count(estimator):
    query, key = sample(HEAD_DIM, batch=1)
    mask = torch.rand(1, 24, generator=generator(1)) < 0.6
    without = fitted(query, key[:, :, mask[0]], estimator)
    for junk in (math.nan, math.inf, 1e30):
        masked = key.masked_fill(~mask[:, None, :, None], junk)
        assert_same_fit(fitted(query, masked, estimator, key_mask=mask), without)


def test_only_data_aware_weights_pairs_by_attention(estimator):
    query, key = sample(HEAD_DIM, 2)
    options = {"key_mask": None, "is_causal": True, "window": 2, "sinks": 1}
    feature_map = fitted(query, key, estimator, num_heads=2, **options)
    for weighted in (False, True):
        moments = PairMoments.empty(2, HEAD_DIM)
        add_attention_pairs(
            moments, query.unsqueeze(2), key, attention_weighted=weighted, **options
        )
        expected = fit_proposal(estimator, moments)
        same = torch.allclose(feature_map.transform, expected.transform, atol=1e-9)
        assert same == (weighted == (estimator == "data_aware"))
        if same:
            for name, x in expected._asdict().items():
                torch.testing.assert_close(feature_map.get_buffer(name), x.contiguous())


def test_the_scale_is_part_of_the_vectors(estimator):
    query, key = sample(HEAD_DIM)
    for scale, factor in ((None, HEAD_DIM**-0.25), (0.49, 0.7), (4.0, 2.0)):
        assert_same_fit(
            fitted(query, key, estimator, scale=scale),
            fitted(query * factor, key * factor, estimator),
        )


def test_a_vector_added_to_all_keys(estimator):
    """Softmax is invariant to it, and so is the variance of ``data_aware``."""
    query, key = sample(HEAD_DIM, batch=40, length=100)
    first, second = (
        log_relative_variance(fitted(query, k, estimator), query[:, 0], k[:, 0], 1.0).mean().item()
        for k in (key, key + 1.5)
    )
    if estimator == "data_aware":
        assert second == pytest.approx(first, abs=0.02)
    else:
        assert second > first + 1


@pytest.mark.parametrize(
    "context",
    [torch.enable_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: META],
    ids=["grad", "inference", "autocast", "device"],
)
def test_calibration_in_other_contexts(estimator, context):
    query, key = (x.float().requires_grad_() for x in sample(HEAD_DIM))
    feature_map, plain = build(estimator), fitted(query, key, estimator)
    with context():
        feature_map.calibrate_(query, key, scale=1.0)
    assert not any(x.requires_grad for x in feature_map.buffers())
    assert_same_fit(feature_map, plain, tolerance=0)


def test_redrawing_keeps_the_fit(estimator):
    feature_map = fitted(*sample(HEAD_DIM), estimator)
    before = copy.deepcopy(feature_map)
    redraw_features_(feature_map, generator(5))
    assert not torch.equal(feature_map.weight, before.weight)
    assert_same_fit(feature_map, before, tolerance=0)


@pytest.mark.parametrize(
    "forget",
    [
        SoftmaxFeatures.reset_calibration_,
        SoftmaxFeatures.reset_parameters,
        lambda x: x.load_state_dict(build(x.estimator).state_dict()),
    ],
    ids=["reset_calibration_", "reset_parameters", "load_state_dict"],
)
def test_samples_are_forgotten(estimator, forget):
    query, key = sample(HEAD_DIM)
    feature_map, fresh = fitted(3 * query, key, estimator), build(estimator)
    forget(feature_map)
    assert_same_fit(feature_map, fresh, tolerance=0)
    for x in (feature_map, fresh):
        x.calibrate_(query, key, scale=1.0)
    assert_same_fit(feature_map, fresh, tolerance=0)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue_separately(estimator, clone):
    first, second, third = (sample(HEAD_DIM, seed=seed) for seed in range(3))
    original, before = (fitted(*first, estimator) for _ in range(2))
    copied = clone(original)
    assert_same_fit(copied, before, tolerance=0)
    copied.calibrate_(*second, scale=1.0)
    assert_same_fit(original, before, tolerance=0)
    both = fitted(*first, estimator).calibrate_(*second, scale=1.0)
    original.calibrate_(*third, scale=1.0)
    assert_same_fit(copied, both)


def test_a_fit_is_adopted_by_another_projection(estimator):
    source = fitted(*sample(HEAD_DIM), estimator)
    feature_map = SoftmaxFeatures(HEAD_DIM, 40, estimator=estimator, projection="simplex").double()
    weight = feature_map.weight.clone()
    assert feature_map.adopt_calibration_(source) is feature_map
    assert torch.equal(feature_map.weight, weight)
    assert_same_fit(feature_map, source, tolerance=0)
