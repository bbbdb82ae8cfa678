"""Samples that cannot be calibrated on are refused by name, and leave the map as it was."""

import copy
import math

import pytest
import torch

from performers import SoftmaxFeatures
from performers.features import CALIBRATED
from tests.features.calibrated import sample

HEAD_DIM = 6


def with_value(x, value):
    x = x.clone()
    x[-1, -1, 3, 2] = value
    return x


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


QUERY, KEY = sample(HEAD_DIM, 2, length=8)
REFUSED = [
    ("key_mask", (QUERY, KEY), {"key_mask": mask_of(8 * [1], 8 * [0])}, r"key_mask.*row 1"),
    ("key_mask", (QUERY, KEY), {"key_mask": mask_of(8 * [0], 8 * [0])}, r"key_mask.*row 0"),
    ("NaN query", (with_value(QUERY, math.nan), KEY), {}, "query must be finite"),
    ("infinite query", (with_value(QUERY, -math.inf), KEY), {}, "query must be finite"),
    ("NaN key", (QUERY, with_value(KEY, math.nan)), {}, "key must be finite"),
    ("infinite key", (QUERY, with_value(KEY, math.inf)), {}, "key must be finite"),
    (
        "NaN in a key that takes part",
        (QUERY, with_value(KEY, math.nan)),
        {"key_mask": mask_of(8 * [1], 4 * [1] + 4 * [0])},
        "key must be finite",
    ),
    ("window", (QUERY, KEY), {"window": 8}, "leave no pair.*window"),
    ("causal window", (QUERY, KEY), {"window": 7, "is_causal": True}, "leave no pair"),
    ("sinks", (QUERY, KEY), {"sinks": 8}, "leave no pair.*sinks"),
    ("window and sinks", (QUERY, KEY), {"window": 5, "sinks": 7, "is_causal": True}, "no pair"),
    ("no batch", (QUERY[:0], KEY[:0]), {}, "leave no pair"),
    ("no query", (QUERY[:, :, :0], KEY), {}, "leave no pair"),
    ("no key", (QUERY, KEY[:, :, :0]), {}, "leave no pair"),
    ("three dimensions", (QUERY[0], KEY[0]), {}, r"query must be .*\(batch, heads, length, 6\)"),
    ("query size", (QUERY[..., :5], KEY), {}, r"query must be .*6\), got .*5\)"),
    ("key size", (QUERY, KEY[..., :5]), {}, r"key must be .*6\), got .*5\)"),
    ("integers", (QUERY.long(), KEY), {}, "query must be a floating-point tensor.*int64"),
    ("batches", (QUERY, KEY[:1]), {}, "key must have batch size 2"),
    ("heads", (QUERY, KEY[:, [0, 0, 1]]), {}, "key must .*heads that divides 2"),
    ("mask shape", (QUERY, KEY), {"key_mask": mask_of(7 * [1])}, r"key_mask .*\(2, 8\).*\(1, 7\)"),
    ("mask type", (QUERY, KEY), {"key_mask": torch.ones(2, 8)}, "key_mask must be a bool.*float32"),
    ("scale", (QUERY, KEY), {"scale": -1.0}, r"scale must be .*got -1.0"),
    ("NaN scale", (QUERY, KEY), {"scale": math.nan}, r"scale must be .*got nan"),
]


@pytest.mark.parametrize(
    ("pair", "options", "match"),
    [case[1:] for case in REFUSED],
    ids=[case[0] for case in REFUSED],
)
@pytest.mark.parametrize("estimator", CALIBRATED)
def test_refused_samples(estimator, pair, options, match):
    feature_map = SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator)
    before = copy.deepcopy(feature_map.state_dict())
    with pytest.raises(ValueError, match=match):
        feature_map.calibrate_(*pair, **options)
    assert all(torch.equal(before[name], x) for name, x in feature_map.state_dict().items())


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_a_call_that_fails_leaves_nothing_behind(estimator):
    """The first row is sound, the second is not."""
    feature_map, fresh = (
        SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator).calibrate_(QUERY, KEY) for _ in range(2)
    )
    for bad in (
        lambda: feature_map.calibrate_(with_value(QUERY, math.nan), KEY),
        lambda: feature_map.calibrate_(QUERY, KEY, mask_of(8 * [1], 8 * [0])),
    ):
        with pytest.raises(ValueError, match=r"query must be finite|key_mask"):
            bad()
    for x in (feature_map, fresh):
        x.calibrate_(2 * QUERY, KEY)
    for name in ("center", "transform", "query_transform"):
        assert torch.equal(feature_map.get_buffer(name), fresh.get_buffer(name))


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_a_batch_without_a_pair_adds_nothing_to_a_stream(estimator):
    """A sequence that its window covers, among longer ones."""
    feature_map, fresh = (
        SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator).calibrate_(QUERY, KEY, window=4)
        for _ in range(2)
    )
    feature_map.calibrate_(3 * QUERY[:, :, :5], KEY[:, :, :5], window=4)
    for name in ("center", "transform", "query_transform"):
        assert torch.equal(feature_map.get_buffer(name), fresh.get_buffer(name))


def test_heads_of_a_map_with_a_fit_per_head():
    feature_map = SoftmaxFeatures(HEAD_DIM, 24, estimator="data_aware", num_heads=3)
    with pytest.raises(ValueError, match=r"query has 2 heads and key has 2.*num_heads=3"):
        feature_map.calibrate_(QUERY, KEY)


@pytest.mark.parametrize("options", [{"windows": 3}, {"causal": True}])
def test_unknown_options(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        SoftmaxFeatures(HEAD_DIM, 24, estimator="data_aware").calibrate_(QUERY, KEY, **options)


@pytest.mark.parametrize("estimator", CALIBRATED)
def test_regularized_rows_are_not_for_calibrated_estimators(estimator):
    with pytest.raises(ValueError, match=rf"regularized must be False for the {estimator}"):
        SoftmaxFeatures(HEAD_DIM, 24, estimator=estimator, regularized=True)


def test_reaches_below_zero_and_causal_cross_attention_are_refused():
    feature_map = SoftmaxFeatures(8, 16, estimator="data_aware")
    query, key = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 30, 8)
    for options in ({"window": -1}, {"sinks": -3}):
        with pytest.raises(ValueError, match="at least 0"):
            feature_map.calibrate_(query, query, **options)
    for options in ({"window": 2}, {"is_causal": True}):
        with pytest.raises(ValueError, match="as many keys as queries"):
            feature_map.calibrate_(query, key, **options)
    feature_map.calibrate_(query, key)


def test_calibration_does_not_depend_on_the_default_device():
    query = torch.randn(1, 2, 20, 8)
    maps = [SoftmaxFeatures(8, 16, estimator=name) for name in CALIBRATED]
    with torch.device("meta"):
        for feature_map in maps:
            feature_map.calibrate_(query, query)
    assert all(bool(torch.isfinite(m.form().bias).all()) for m in maps)


def test_loading_a_fit_forgets_the_samples():
    query, other = torch.randn(1, 2, 50, 8), 3 * torch.randn(1, 2, 50, 8)
    fresh = SoftmaxFeatures(8, 16, estimator="optimal").calibrate_(other, other)
    used = SoftmaxFeatures(8, 16, estimator="optimal").calibrate_(query, query)
    used.load_state_dict(used.state_dict())
    used.calibrate_(other, other)
    assert torch.equal(used.transform, fresh.transform)
