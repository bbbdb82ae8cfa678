"""Exact keys chosen by content: which are listed, and that they are exact."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from performers import (
    LearnedFeatures,
    ListedKeys,
    SoftmaxFeatures,
    favor_attention,
    favor_attention_weights,
)
from tests.features.cases import generator

BACKENDS = ("reference", "torch", None)
BATCH, HEADS, KEY_HEADS, DIM, VALUE_DIM = 2, 4, 2, 16, 8


def inputs(length, seed=0, dtype=torch.float32):
    random = generator(seed)
    query = torch.randn(BATCH, HEADS, length, DIM, generator=random, dtype=torch.float64)
    key = torch.randn(BATCH, KEY_HEADS, length, DIM, generator=random, dtype=torch.float64)
    value = torch.randn(BATCH, KEY_HEADS, length, VALUE_DIM, generator=random, dtype=torch.float64)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def features(seed=1, num_heads=None):
    return SoftmaxFeatures(DIM, 64, num_heads=num_heads, generator=generator(seed))


def listed_pairs(listed_keys, query, key, *, is_causal, key_mask=None, sinks=0):
    """Bool ``(B, H, L, S)``, written from the definition, one query at a time."""
    length, size = query.shape[2], key.shape[2]
    taking = torch.ones(BATCH, size, dtype=torch.bool) if key_mask is None else key_mask.clone()
    taking &= taking.long().cumsum(1) > sinks
    groups = HEADS // KEY_HEADS
    member = torch.zeros(BATCH, HEADS, length, size, dtype=torch.bool)
    for index in range(listed_keys.num_rounds):
        for batch in range(BATCH):
            for head in range(HEADS):
                key_head = head // groups
                which = 0 if listed_keys.num_heads is None else key_head
                centers = listed_keys.centers[index, which]
                offsets = listed_keys.offsets[index, which]
                for i in range(length):
                    chosen = (centers @ query[batch, head, i] + offsets).argmax()
                    end = i // listed_keys.refresh * listed_keys.refresh if is_causal else size
                    strength = key[batch, key_head] @ centers[chosen]
                    strength[~taking[batch]] = -math.inf
                    strength[end:] = -math.inf
                    count = min(listed_keys.num_keys // listed_keys.num_rounds, size)
                    best = strength.topk(count)
                    member[batch, head, i, best.indices[best.values > -math.inf]] = True
    return member


def dense(feature_map, query, key, value, exact, seen):
    """The definition in float64: exact weights where ``exact``, estimates elsewhere."""
    groups = HEADS // KEY_HEADS
    query = query.double()
    key, value = (x.double().repeat_interleave(groups, 1) for x in (key, value))
    estimate = copy.deepcopy(feature_map).double().estimate_kernel(query, key)
    kernel = torch.where(exact, (query @ key.mT / math.sqrt(DIM)).exp(), estimate) * seen
    total = kernel.sum(-1, keepdim=True)
    return kernel @ value / total.where(total != 0, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "sinks", "masked"), [(None, 0, False), (5, 2, True)])
def test_listed_keys_are_exact(backend, rounds, is_causal, window, sinks, masked):
    length = 90
    query, key, value = inputs(length)
    listed_keys = ListedKeys(
        DIM, 6, 12, num_rounds=rounds, refresh=16, num_heads=KEY_HEADS, generator=generator(2)
    )
    mask = torch.rand(BATCH, length, generator=generator(3)) < 0.7 if masked else None
    taking = torch.ones(BATCH, length, dtype=torch.bool) if mask is None else mask
    exact = listed_pairs(listed_keys, query, key, is_causal=is_causal, key_mask=mask, sinks=sinks)
    if window is not None:
        position = torch.arange(length)
        exact |= (position[:, None] - position).abs() <= window
    exact |= (taking & (taking.long().cumsum(1) <= sinks))[:, None, None, :]
    seen = taking[:, None, None, :].expand(-1, -1, length, -1)
    seen = seen.tril() if is_causal else seen
    feature_map = features()
    options = {
        "is_causal": is_causal,
        "key_mask": mask,
        "window": window,
        "sinks": sinks,
        "listed_keys": listed_keys,
    }
    expected = dense(feature_map, query, key, value, exact, seen)
    out = favor_attention(query, key, value, feature_map, backend=backend, **options)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-5)
    weights = favor_attention_weights(query, key, feature_map, **options)
    values = value.repeat_interleave(HEADS // KEY_HEADS, 1)
    torch.testing.assert_close((weights @ values).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("window", "sinks"), [(3, 0), (None, 0), (4, 2), (None, 3)])
def test_gradients_equal_those_of_the_reference(backend, is_causal, window, sinks):
    listed_keys = ListedKeys(DIM, 6, 12, num_rounds=2, refresh=32, generator=generator(4))
    # Of queries, keys and values, and of the trained features.
    feature_map = LearnedFeatures(features(num_heads=KEY_HEADS), num_heads=KEY_HEADS)
    gradients = []
    for name in ("reference", backend):
        leaves = [x.requires_grad_() for x in inputs(150, seed=5)]
        out = favor_attention(
            *leaves,
            feature_map,
            is_causal=is_causal,
            window=window,
            sinks=sinks,
            listed_keys=listed_keys,
            backend=name,
        )
        upstream = torch.randn(out.shape, generator=generator(6))
        leaves += feature_map.parameters()
        gradients.append(torch.autograd.grad(out, leaves, upstream))
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("window", [None, 4])
def test_lists_that_hold_every_key_give_exact_attention(window):
    query, key, value = inputs(60)
    listed_keys = ListedKeys(DIM, 4, 200, generator=generator(7))
    out = favor_attention(query, key, value, features(), window=window, listed_keys=listed_keys)
    groups = HEADS // KEY_HEADS
    exact = F.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    )
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_later_tokens_change_no_earlier_row(backend):
    query, key, value = inputs(200)
    listed_keys = ListedKeys(DIM, 6, 12, refresh=32, generator=generator(8))
    options = {"is_causal": True, "window": 4, "listed_keys": listed_keys, "backend": backend}
    before = favor_attention(query, key, value, features(), **options)
    for position in (33, 64, 150):
        changed = [x.clone() for x in (query, key, value)]
        for x, size in zip(changed, (30.0, 30.0, 1e3), strict=True):
            x[:, :, position:] = size * torch.randn(x[:, :, position:].shape)
        after = favor_attention(*changed, features(), **options)
        torch.testing.assert_close(
            after[:, :, :position], before[:, :, :position], rtol=0, atol=1e-6
        )


def test_calibrated_buckets_find_more_of_the_attention():
    """Queries that come in clusters: a cluster's centre knows its keys, a random axis does not."""
    random = generator(9)
    centers = 3 * torch.randn(12, DIM, generator=random)
    which = torch.randint(12, (BATCH, HEADS, 400), generator=random)
    query = centers[which] + 0.3 * torch.randn(BATCH, HEADS, 400, DIM, generator=random)
    key = 2 * torch.randn(BATCH, KEY_HEADS, 400, DIM, generator=random)
    value = torch.randn(BATCH, KEY_HEADS, 400, VALUE_DIM, generator=random)
    groups = HEADS // KEY_HEADS
    keys = key.repeat_interleave(groups, 1)
    attention = (query @ keys.mT / math.sqrt(DIM)).softmax(-1)
    exact = attention @ value.repeat_interleave(groups, 1)

    def error(listed_keys):
        out = favor_attention(query, key, value, features(), listed_keys=listed_keys)
        return ((out - exact).norm() / exact.norm()).item()

    random_axes = ListedKeys(DIM, 12, 24, generator=generator(10))
    calibrated = copy.deepcopy(random_axes).calibrate_(query[:1])
    calibrated.calibrate_(query[1:])
    assert error(calibrated) < 0.5 * error(random_axes) < error(None)


def test_calibration_and_state_dict():
    query, _, _ = inputs(100)
    listed_keys = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS).calibrate_(query)
    again = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS).calibrate_(query)
    assert torch.equal(listed_keys.centers, again.centers)
    loaded = ListedKeys(DIM, 8, 16, num_heads=KEY_HEADS)
    loaded.load_state_dict(listed_keys.state_dict())
    assert torch.equal(loaded.centers, listed_keys.centers)
    assert torch.equal(loaded.offsets, listed_keys.offsets)
    few = ListedKeys(DIM, 8, 16).calibrate_(query[:1, :1, :3])
    assert torch.isfinite(few.centers).all()


def test_angular_buckets_are_opposite_rows_of_a_rotation():
    centers = ListedKeys(DIM, 8, generator=generator(11)).centers[0, 0]
    torch.testing.assert_close(centers[:4] @ centers[:4].mT, torch.eye(4), rtol=0, atol=1e-6)
    assert torch.equal(centers[4:], -centers[:4])


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_buckets": 0}, "num_buckets"),
        ({"num_keys": 0}, "num_keys"),
        ({"num_keys": 10, "num_rounds": 3}, "num_keys"),
        ({"refresh": 0}, "refresh"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_bad_sizes_are_refused(arguments, name):
    with pytest.raises(ValueError, match=name):
        ListedKeys(DIM, **arguments)


def test_calls_that_cannot_be_are_refused():
    query, key, value = inputs(30)
    listed_keys = ListedKeys(DIM, 4, 8)

    def call(feature_map=None, listed_keys=listed_keys, batch=slice(None), **options):
        return favor_attention(
            query[batch],
            key[batch],
            value[batch],
            features() if feature_map is None else feature_map,
            listed_keys=listed_keys,
            **options,
        )

    with pytest.raises(ValueError, match="return_state"):
        call(is_causal=True, return_state=True)
    with pytest.raises(ValueError, match="cu_seqlens"):
        call(batch=slice(1), cu_seqlens=torch.tensor([0, 10, 30]))
    with pytest.raises(ValueError, match="positive softmax features"):
        call(SoftmaxFeatures(DIM, 32, estimator="trigonometric"))
    with pytest.raises(ValueError, match="head_dim"):
        call(listed_keys=ListedKeys(DIM + 1))
    with pytest.raises(ValueError, match="num_heads"):
        call(listed_keys=ListedKeys(DIM, num_heads=3))
    with pytest.raises(ValueError, match="ListedKeys"):
        call(listed_keys=8)
    with pytest.raises(ValueError, match="finite"):
        listed_keys.calibrate_(torch.full((1, 1, 4, DIM), math.nan))
    with pytest.raises(ValueError, match="shape"):
        listed_keys.calibrate_(torch.zeros(1, 1, 4, DIM + 1))
