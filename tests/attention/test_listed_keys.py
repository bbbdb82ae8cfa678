"""``ListedKeys``: directions, calibration, refusals. The laws of its calls are in the battery."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from performers import ListedKeys, SoftmaxFeatures, favor_attention
from tests.attention.cases import (
    BIASED,
    POSITIVE,
    check_against_oracle,
    law,
    make_call,
)
from tests.features.cases import generator

BATCH, HEADS, KEY_HEADS, DIM, VALUE_DIM = 2, 4, 2, 16, 8


def inputs(length):
    return make_call(POSITIVE, length, heads=HEADS, key_heads=KEY_HEADS, head_dim=DIM).inputs


def features():
    return SoftmaxFeatures(DIM, 64, generator=generator(1))


@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("num_heads", [None, KEY_HEADS])
@pytest.mark.parametrize(("keys", "rounds"), [(1, 1), (30, 1), (30, 2), (64, 1), (150, 1)])
@pytest.mark.parametrize("count", [1, 3, 25])
@law()
def test_lists_of_any_size(backend, mode, count, keys, rounds, num_heads, sinks):
    """Lists within and over a block of the kernels, shared by all heads or one for each."""
    heads = {"heads": HEADS, "key_heads": KEY_HEADS, "num_heads": num_heads, "sinks": sinks}
    call = make_call(BIASED, 150, mode, **heads)
    options = {"num_rounds": rounds, "refresh": 40, "num_heads": num_heads}
    call.options["listed_keys"] = ListedKeys(16, count, keys, generator=generator(4), **options)
    check_against_oracle(call, backend)


def test_calibrated_buckets_find_more_of_the_attention():
    """Queries that come in clusters: a cluster's centre knows its keys, a random axis does not."""
    random = generator(9)
    centers = 3 * torch.randn(12, DIM, generator=random)
    which = torch.randint(12, (BATCH, HEADS, 400), generator=random)
    query = centers[which] + 0.3 * torch.randn(BATCH, HEADS, 400, DIM, generator=random)
    key = 2 * torch.randn(BATCH, KEY_HEADS, 400, DIM, generator=random)
    value = torch.randn(BATCH, KEY_HEADS, 400, VALUE_DIM, generator=random)
    exact = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    def error(listed_keys):
        out = favor_attention(query, key, value, features(), listed_keys=listed_keys)
        return ((out - exact).norm() / exact.norm()).item()

    random_axes = ListedKeys(DIM, 12, 24, generator=generator(10))
    calibrated = copy.deepcopy(random_axes).calibrate_(query[:1])
    calibrated.calibrate_(query[1:])
    assert error(calibrated) < 0.5 * error(random_axes) < error(None)


def test_calibration_and_state_dict():
    query, *_ = inputs(100)
    listed_keys = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS).calibrate_(query)
    again = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS).calibrate_(query)
    assert torch.equal(listed_keys.centers, again.centers)
    loaded = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS)
    loaded.load_state_dict(listed_keys.state_dict())
    assert torch.equal(loaded.centers, listed_keys.centers)
    assert torch.equal(loaded.offsets, listed_keys.offsets)
    few = ListedKeys(DIM, 8, 16).calibrate_(query[:1, :1, :3])
    assert torch.isfinite(few.centers).all()


def test_samples_are_limited_and_arguments_are_printed():
    listed_keys = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS).calibrate_(inputs(4200)[0][:1])
    assert listed_keys._samples.shape == (KEY_HEADS, 4096, DIM)
    assert listed_keys.centers.isfinite().all()
    expected = "head_dim=16, num_buckets=8, num_keys=16, num_rounds=1, refresh=128, num_heads=2"
    assert repr(listed_keys) == f"ListedKeys({expected})"
    assert "num_heads" not in repr(ListedKeys(DIM))


def test_angular_buckets_are_opposite_rows_of_a_rotation():
    centers = ListedKeys(DIM, 8, generator=generator(11)).centers[0, 0]
    torch.testing.assert_close(centers[:4] @ centers[:4].mT, torch.eye(4), rtol=0, atol=1e-6)
    assert torch.equal(centers[4:], -centers[:4])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"is_causal": True, "return_state": True}, "return_state"),
        ({"cu_seqlens": torch.tensor([0, 10, 30])}, "cu_seqlens"),
        ({"feature_map": SoftmaxFeatures(DIM, 32, estimator="trigonometric")}, "positive softmax"),
        ({"listed_keys": ListedKeys(DIM + 1)}, "head_dim"),
        ({"listed_keys": ListedKeys(DIM, num_heads=3)}, "num_heads"),
        ({"listed_keys": 8}, "ListedKeys"),
    ],
    ids=str,
)
def test_calls_that_cannot_be_are_refused(options, match):
    options = {"feature_map": features(), "listed_keys": ListedKeys(DIM, 4, 8), **options}
    with pytest.raises(ValueError, match=match):
        favor_attention(*(x[:1] for x in inputs(30)), **options)


def test_lists_that_cannot_be_are_refused():
    for name in ("num_buckets", "num_keys", "refresh", "num_heads"):
        with pytest.raises(ValueError, match=name):
            ListedKeys(DIM, **{name: 0})
    with pytest.raises(ValueError, match="num_keys"):
        ListedKeys(DIM, num_keys=10, num_rounds=3)
    nan, wide = math.nan * torch.ones(1, 1, 4, DIM), torch.zeros(1, 1, 4, DIM + 1)
    for query, match in ((nan, "finite"), (wide, "shape")):
        with pytest.raises(ValueError, match=match):
            ListedKeys(DIM, 4, 8).calibrate_(query)
