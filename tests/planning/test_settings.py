"""The grid, and the count of multiply-adds."""

import pytest
import torch

from performers.planning.samples import checked_samples
from performers.planning.settings import Setting, exact_multiply_adds, grid, multiply_adds

from . import heads

OPTIONS = {
    "num_features": (8,),
    "estimators": ("positive",),
    "projections": ("orthogonal",),
    "heads": ("key",),
    "windows": (None,),
    "sinks": (0,),
    "listed_keys": (0,),
}


def samples(**kind):
    causal = kind.pop("is_causal", False)
    return checked_samples(
        *heads.structured(**kind), is_causal=causal, key_mask=None, scale=None, seed=0
    )


def test_the_grid_is_the_product_fewest_features_first():
    found = grid(
        samples(heads=4, key_heads=2),
        num_features=(32, 8),
        estimators=("positive", "data_aware"),
        projections=("orthogonal", "simplex"),
        heads=("key", "query"),
        windows=(None, 4, 4),
        sinks=(0, 1),
        listed_keys=(0, 8),
    )
    assert len(found) == len(set(found)) == 128
    assert [options.num_features for options in found] == [8] * 64 + [32] * 64


def test_what_cannot_be_combined_is_left_out():
    found = grid(
        samples(),
        **{
            **OPTIONS,
            "estimators": ("trigonometric", "hyperbolic", "positive"),
            "projections": ("orthogonal", "antithetic"),
            "heads": ("query", "key"),
            "listed_keys": (0, 8),
        },
    )
    assert {(o.estimator, o.projection, o.heads, o.listed_keys) for o in found} == {
        ("trigonometric", "orthogonal", "key", 0),
        ("hyperbolic", "orthogonal", "key", 0),
        ("hyperbolic", "orthogonal", "key", 8),
        ("positive", "orthogonal", "key", 0),
        ("positive", "orthogonal", "key", 8),
        ("positive", "antithetic", "key", 0),
        ("positive", "antithetic", "key", 8),
    }
    with pytest.raises(ValueError, match="no combination"):
        grid(
            samples(), **{**OPTIONS, "estimators": ("hyperbolic",), "projections": ("antithetic",)}
        )


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("num_features", ()),
        ("num_features", (0,)),
        ("num_features", (2.5,)),
        ("num_features", 64),
        ("estimators", ("favor",)),
        ("estimators", "positive"),
        ("estimators", ()),
        ("projections", ("haar",)),
        ("projections", (None,)),
        ("heads", ("value",)),
        ("windows", (-1,)),
        ("windows", (True,)),
        ("windows", None),
        ("windows", ("wide",)),
        ("sinks", (-1,)),
        ("sinks", (None,)),
        ("listed_keys", (-64,)),
        ("listed_keys", 64),
    ],
)
def test_unknown_options(name, given):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        grid(samples(), **{**OPTIONS, name: given})


def test_two_sided_estimators_need_even_numbers():
    with pytest.raises(ValueError, match=r"^num_features must be even.*got 7"):
        grid(samples(), **{**OPTIONS, "estimators": ("hyperbolic",), "num_features": (8, 7)})


def counted(sequences, estimator="positive", heads="key", m=32, window=None, sinks=0, listed=0):
    setting = Setting(
        num_features=m,
        estimator=estimator,
        heads=heads,
        window=window,
        sinks=sinks,
        listed_keys=listed,
    )
    return multiply_adds(setting, sequences, num_lists=16)


def test_multiply_adds_of_features():
    shared = samples(heads=4, key_heads=2, head_dim=16, length=96)
    once = 32 * 16 + 32 * 17
    assert counted(shared) == 1.5 * once
    assert counted(shared, heads="query") == 2 * once
    assert counted(shared, "data_aware") == 1.5 * (once + 256)
    assert counted(shared, "hyperbolic") == 1.5 * (once - 16 * 16)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [0, 5, 95, 500])
def test_multiply_adds_of_exact_pairs(is_causal, window):
    sequences = samples(length=96, is_causal=is_causal)
    distance = torch.arange(96)[:, None] - torch.arange(96)
    near = distance.abs() <= window
    pairs = int((near & (distance >= 0) if is_causal else near).sum())
    extra = counted(sequences, window=window) - counted(sequences)
    assert extra == pytest.approx(pairs / 96 * 32)
    with_sinks = counted(sequences, window=window, sinks=3)
    assert with_sinks == pytest.approx(counted(sequences) + 32 * min(pairs / 96 + 3, 96))
    everything = 97 / 2 if is_causal else 96
    assert exact_multiply_adds(sequences) == everything * 32


def test_multiply_adds_of_lists():
    sequences = samples(length=96)
    extra = counted(sequences, listed=8) - counted(sequences)
    assert extra == 8 * (16 + 16) + 8 * (32 + 16) + 2 * 16 * 16
