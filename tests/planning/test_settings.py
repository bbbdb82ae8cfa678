"""The samples, the grid of settings, their arithmetic, and the choice among them."""

import itertools
import re

import pytest
import torch

import performers
from performers.planning.planner import choose, pareto_front
from performers.planning.samples import checked_samples
from performers.planning.settings import Setting, exact_multiply_adds, grid, multiply_adds

from . import heads
from .heads import setting

QUERY, KEY, VALUE = heads.structured(batch=3, heads=4, key_heads=2, length=20, head_dim=8)
SMALL = {"num_features": (8,), "windows": (None, 4), "num_draws": 1, "show": False}
SMALL["backend"] = "torch"
NAN = float("nan")


def changed(x, value, *index):
    x = x.clone()
    x[index] = value
    return x


def mask(*hidden_rows):
    rows = torch.ones(3, 20, dtype=torch.bool)
    rows[list(hidden_rows)] = False
    return rows


SHORT = {"key": KEY[:, :, :9], "value": VALUE[:, :, :9]}
ONE = {"query": QUERY[:1], "key": KEY[:1], "value": VALUE[:1]}
REFUSED = [
    ({"query": QUERY[0]}, "query must have 4 dimensions"),
    ({"key": KEY.long()}, "key must be a floating-point tensor"),
    ({"query": QUERY[:0], "key": KEY[:0], "value": VALUE[:0]}, "query must not be empty"),
    ({"key": KEY[:, :, :0], "value": VALUE[:, :, :0]}, "key must not be empty"),
    ({"key": KEY[..., :4]}, "key must have shape (3, Hkv, S, 8)"),
    ({**SHORT, "is_causal": True}, "is_causal needs"),
    (SHORT, "windows must be (None,)"),
    ({"query": changed(QUERY, NAN, 0, 0, 3)}, "query must be finite"),
    ({"key": changed(KEY, float("inf"), 2, 1, 3)}, "key must be finite"),
    ({"value": changed(VALUE, 0.0, 2)}, "value must not be zero"),
    ({"key_mask": mask(1)}, "key_mask must leave at least one key in every row"),
    ({**ONE, "key_mask": torch.arange(20)[None] < 10}, "both halves of the one row"),
    (
        {name: x[:, :, :1] for name, x in ONE.items()},
        "query and key must have at least 2 positions",
    ),
    ({"scale": -1.0}, "scale must be"),
    ({"target_error": 0.0}, "target_error must be a positive number"),
    ({"target_error": "small"}, "target_error must be a positive number"),
    ({"target_time": -1.0}, "target_time must be a positive number"),
    ({"length": 1.5}, "length must be an integer of at least 1"),
    ({"num_draws": 0}, "num_draws must be an integer of at least 1"),
    ({"seed": None}, "seed must be an integer of at least 0"),
    ({"backend": "cuda"}, "backend must be one of"),
    ({"windows": (-3,)}, "windows must be a sequence of integers >= 0 or None, got -3"),
    ({"estimators": ("hyperbolic",), "num_features": (8, 7)}, "num_features must be even"),
    ({"estimators": ("hyperbolic",), "projections": ("antithetic",)}, "no combination"),
    *(
        ({name: values}, f"{name} must be a sequence of")
        for name, every in {
            "num_features": [(), (0,), (2.5,), 64],
            "estimators": [("favor",), "positive", ()],
            "projections": [("haar",), (None,)],
            "heads": [("value",)],
            "windows": [(True,), None, ("wide",)],
            "sinks": [(-1,), (None,)],
            "listed_keys": [(-64,), 64],
        }.items()
        for values in every
    ),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED)
def test_refused_arguments(arguments, words):
    arguments = {"query": QUERY, "key": KEY, "value": VALUE, **SMALL, **arguments}
    with pytest.raises(ValueError, match=re.escape(words)):
        performers.plan(**arguments)


def test_a_setting_of_another_type():
    plan = performers.plan(QUERY, KEY, VALUE, **SMALL)
    with pytest.raises(ValueError, match=r"^setting must be one of plan.settings or None, got str"):
        plan.build("data_aware")


def test_masked_keys_and_values_may_hold_anything():
    rows = torch.arange(20) < torch.tensor([20, 14, 11]).unsqueeze(1)
    junk = [x.masked_fill(~rows[:, None, :, None], NAN) for x in (KEY, VALUE)]
    first, second = (
        performers.plan(QUERY, *x, key_mask=rows, **SMALL) for x in (junk, (KEY, VALUE))
    )
    assert [s.error for s in first.settings] == [s.error for s in second.settings]
    assert first.diagnosis == second.diagnosis


def samples(tensors=None, *, is_causal=False, key_mask=None, **kind):
    tensors = tensors or heads.structured(**kind)
    return checked_samples(*tensors, is_causal=is_causal, key_mask=key_mask, scale=None, seed=0)


def cut(batch=1, length=20, size=20):
    return QUERY[:batch, :, :length], KEY[:batch, :, :size], VALUE[:batch, :, :size]


def test_half_of_the_rows_calibrate():
    calibration, held_out = samples(cut(3)).split()
    assert torch.equal(calibration.query, QUERY[:2])
    assert torch.equal(held_out.value, VALUE[2:])
    rows = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    second, first = samples(cut(1, 19, 20), key_mask=rows).split()
    for half, queries, keys in (
        (first, slice(9), slice(10)),
        (second, slice(9, 18), slice(10, 20)),
    ):
        assert torch.equal(half.query, QUERY[:1, :, queries])
        assert torch.equal(half.key_mask, rows[:, keys])
        kept = rows[:, None, keys, None]
        assert torch.equal(half.key, KEY[:1, :, keys].where(kept, 0))
        assert torch.equal(half.value, VALUE[:1, :, keys].where(kept, 0))


def test_samples_are_cut_or_repeated_to_a_length():
    longer = samples(cut(2)).at_length(47)
    assert longer.query.shape == (1, 4, 47, 8)
    assert torch.equal(longer.key[0, :, 40:], KEY[0, :, :7])
    assert torch.equal(samples(cut(2)).at_length(5).value, VALUE[:1, :, :5])
    crossed = samples(cut(1, 20, 10)).at_length(40)
    assert (crossed.query.shape[2], crossed.key.shape[2]) == (40, 20)


def combined(sequences, **options):
    defaults = {"num_features": (8,), "estimators": ("positive",), "projections": ("orthogonal",)}
    defaults |= {"heads": ("key",), "windows": (None,), "sinks": (0,), "listed_keys": (0,)}
    return grid(sequences, {**defaults, **options})


def test_the_grid_is_the_product_fewest_features_first():
    settings = combined(
        samples(heads=4, key_heads=2),
        num_features=(32, 8),
        estimators=("positive", "data_aware"),
        projections=("orthogonal", "simplex"),
        heads=("key", "query"),
        windows=(None, 4, 4),
        sinks=(0, 1),
        listed_keys=(0, 8),
    )
    assert len(settings) == len(set(settings)) == 128
    assert [x.num_features for x in settings] == [8] * 64 + [32] * 64


def test_combinations_that_are_left_out():
    settings = combined(
        samples(),
        estimators=("trigonometric", "hyperbolic", "positive"),
        projections=("orthogonal", "antithetic"),
        heads=("query", "key"),
        listed_keys=(0, 8),
    )
    assert {x.heads for x in settings} == {"key"}
    assert sorted((x.estimator, x.projection, x.listed_keys) for x in settings) == [
        *(("hyperbolic", "orthogonal", listed) for listed in (0, 8)),
        *(("positive", "antithetic", listed) for listed in (0, 8)),
        *(("positive", "orthogonal", listed) for listed in (0, 8)),
        ("trigonometric", "orthogonal", 0),
    ]


def counted(sequences, **options):
    return multiply_adds(Setting(**{"num_features": 32, **options}), sequences)


def test_multiply_adds_of_features_and_lists():
    shared = samples(heads=4, key_heads=2)
    once = 32 * 16 + 32 * 17
    assert counted(shared) == 1.5 * once
    assert counted(shared, heads="query") == 2 * once
    assert counted(shared, estimator="data_aware") == 1.5 * (once + 256)
    assert counted(shared, estimator="hyperbolic") == 1.5 * (once - 16 * 16)
    extra = counted(samples(), listed_keys=8) - counted(samples())
    assert extra == 8 * (16 + 16) + 8 * (32 + 16) + 2 * 16 * 16


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 5, 95, 500])
def test_multiply_adds_of_exact_pairs(is_causal, window):
    sequences = samples(is_causal=is_causal)
    distance = torch.arange(96)[:, None] - torch.arange(96)
    within = distance.abs() <= window
    pairs = int((within & (distance >= 0) if is_causal else within).sum())
    for sinks in (0, 3):
        extra = counted(sequences, window=window, sinks=sinks) - counted(sequences)
        assert extra == pytest.approx(32 * min(pairs / 96 + sinks, 96))
    assert exact_multiply_adds(sequences) == (97 / 2 if is_causal else 96) * 32


FAST, BALANCED, ACCURATE = setting(0.8, 1e-3), setting(0.2, 4e-3), setting(0.1, 30e-3)
FRONT = [FAST, BALANCED, ACCURATE]


def test_the_front():
    everything = [*FRONT, setting(0.8, 2e-3), setting(0.3, 4e-3), setting(0.8, 1e-3)]
    for order in list(itertools.permutations(everything))[::97]:
        assert pareto_front(order, lambda x: (x.seconds, x.error)) == FRONT


@pytest.mark.parametrize(
    ("error", "seconds", "expected", "met"),
    [
        (None, None, BALANCED, True),
        (0.8, None, FAST, True),
        (0.3, None, BALANCED, True),
        (0.05, None, ACCURATE, False),
        (None, 1.0, ACCURATE, True),
        (None, 5e-3, BALANCED, True),
        (None, 0.5e-3, FAST, False),
        (0.15, 5e-3, BALANCED, False),
        (0.9, 0.5e-3, FAST, False),
    ],
)
def test_targets(error, seconds, expected, met):
    *choice, reason = choose(FRONT, error, seconds)
    assert choice == [expected, met]
    assert ("NOTHING" in reason) is not met
