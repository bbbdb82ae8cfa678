"""Samples are checked, split so that nothing measured was calibrated on, and stretched."""

import re

import pytest
import torch

import performers
from performers.planning.samples import checked_samples

from . import heads

QUERY, KEY, VALUE = heads.structured(batch=3, heads=4, key_heads=2, length=20, head_dim=8)
SMALL = {
    "num_features": (8,),
    "windows": (None, 4),
    "num_draws": 1,
    "backend": "torch",
    "show": False,
}


def changed(x, value, *index):
    x = x.clone()
    x[index] = value
    return x


def hidden(*rows):
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[list(rows)] = False
    return mask


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": QUERY[0]}, "query must be a floating-point tensor of shape"),
        ({"key": KEY.long()}, "key must be a floating-point tensor"),
        ({"query": QUERY[:0], "key": KEY[:0], "value": VALUE[:0]}, "query must not be empty"),
        ({"key": KEY[..., :4]}, "key must have shape (3, Hkv, S, 8)"),
        ({"key": KEY[:2]}, "key must have shape (3, Hkv, S, 8)"),
        ({"query": QUERY[:, :3]}, "key must have a number of heads that divides"),
        ({"value": VALUE[:, :, :5]}, "value must have shape (3, 2, 20, Dv)"),
        ({"key": KEY[:, :, :9], "value": VALUE[:, :, :9], "is_causal": True}, "is_causal needs"),
        ({"key": KEY[:, :, :9], "value": VALUE[:, :, :9]}, "windows must be (None,)"),
        ({"value": VALUE.double()}, "one dtype"),
        ({"query": changed(QUERY, float("nan"), 0, 0, 3)}, "query must be finite"),
        ({"key": changed(KEY, float("inf"), 2, 1, 3)}, "key must be finite"),
        ({"value": changed(VALUE, float("nan"), 1, 1, 3)}, "value must be finite"),
        ({"value": 0 * VALUE}, "value must not be zero"),
        ({"value": changed(VALUE, 0.0, 2)}, "value must not be zero"),
        ({"key_mask": hidden()[:, :5]}, "key_mask must be a bool tensor of shape (3, 20)"),
        ({"key_mask": hidden().float()}, "key_mask must be a bool tensor"),
        ({"key_mask": hidden(1)}, "key_mask must leave at least one key in every row"),
        ({"scale": -1.0}, "scale must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"target_error": 0.0}, "target_error must be a positive number"),
        ({"target_error": float("nan")}, "target_error must be a positive number"),
        ({"target_error": "small"}, "target_error must be a positive number"),
        ({"target_time": -1.0}, "target_time must be a positive number"),
        ({"length": 0}, "length must be an integer of at least 1"),
        ({"length": 1.5}, "length must be an integer of at least 1"),
        ({"num_draws": 0}, "num_draws must be an integer of at least 1"),
        ({"seed": None}, "seed must be an integer of at least 0"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"windows": (-3,)}, "windows must be a sequence of integers >= 0 or None, got -3"),
        ({"estimators": ("relu",)}, "estimators must be a sequence of names from"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    given = {"query": QUERY, "key": KEY, "value": VALUE, **SMALL, **arguments}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}|{re.escape(message)}"):
        performers.plan(**given)


def test_a_single_position_in_a_single_row():
    one = [x[:1, :, :1] for x in (QUERY, KEY, VALUE)]
    with pytest.raises(ValueError, match=r"^query and key must have at least 2 positions"):
        performers.plan(*one, **SMALL)


def test_a_row_of_which_one_half_is_hidden():
    mask = (torch.arange(20) < 10).unsqueeze(0)
    with pytest.raises(ValueError, match="both halves of the one row"):
        performers.plan(QUERY[:1], KEY[:1], VALUE[:1], key_mask=mask, **SMALL)


def test_masked_keys_and_values_may_hold_anything():
    mask = torch.arange(20) < torch.tensor([20, 14, 11]).unsqueeze(1)
    dirty = [x.masked_fill(~mask[:, None, :, None], float("nan")) for x in (KEY, VALUE)]
    clean = [x.masked_fill(~mask[:, None, :, None], 0.0) for x in (KEY, VALUE)]
    first, second = (performers.plan(QUERY, *x, key_mask=mask, **SMALL) for x in (dirty, clean))
    assert [s.error for s in first.settings] == [s.error for s in second.settings]
    assert first.diagnosis == second.diagnosis


def test_a_setting_of_another_type():
    found = performers.plan(QUERY, KEY, VALUE, **SMALL)
    with pytest.raises(ValueError, match=r"^setting must be one of plan.settings or None, got str"):
        found.build("data_aware")


def given(batch=1, length=20, size=20, mask=None):
    query, key, value = (x[:batch, :, :n] for x, n in ((QUERY, length), (KEY, size), (VALUE, size)))
    return checked_samples(query, key, value, is_causal=False, key_mask=mask, scale=None, seed=0)


@pytest.mark.parametrize(("batch", "calibrate"), [(2, 1), (3, 2)])
def test_rows_are_split(batch, calibrate):
    calibration, held_out = given(batch).split()
    assert torch.equal(calibration.query, QUERY[:calibrate])
    assert torch.equal(held_out.value, VALUE[calibrate:batch])


def test_one_row_is_cut_and_its_beginning_measures():
    mask = torch.rand(1, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    calibration, held_out = given(1, 19, 20, mask).split()
    assert torch.equal(held_out.query, QUERY[:1, :, :9])
    assert torch.equal(held_out.key, KEY[:1, :, :10])
    assert torch.equal(held_out.key_mask, mask[:, :10])
    assert torch.equal(calibration.query, QUERY[:1, :, 9:18])
    assert torch.equal(calibration.value, VALUE[:1, :, 10:])
    assert torch.equal(calibration.key_mask, mask[:, 10:])


def test_lengths():
    sequences = given(2)
    longer = sequences.at_length(47)
    assert longer.query.shape == (1, 4, 47, 8)
    assert torch.equal(longer.key[0, :, 40:], KEY[0, :, :7])
    assert torch.equal(sequences.at_length(5).value, VALUE[:1, :, :5])
    crossed = given(1, 20, 10).at_length(40)
    assert (crossed.query.shape[2], crossed.key.shape[2]) == (40, 20)
