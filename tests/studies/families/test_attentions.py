"""Attention over rows of relatives, against exact attention."""

import pytest
import torch

from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import MaskedCollator
from studies.families.scored import TOKENIZER
from studies.families.synthetic import synthetic_families
from studies.families.training import CONTESTANTS, Contestant, Shape, make_model

ROWS = FamilyRows(synthetic_families(3, members=3, length=20), max_length=400)
SHAPE = Shape(hidden_size=32, num_layers=1, num_features=16)


def model(attention, **options):
    config = {"attention": attention, "attention_options": options, "initializer_range": 0.3}
    return make_model(Contestant(config), SHAPE, 0).eval()


def batch(*indices):
    return MaskedCollator(TOKENIZER)([ROWS[index] for index in indices])


@pytest.mark.parametrize("keys", [0, 4])
def test_windows_that_cover_a_row_are_exact(keys):
    exact, linear = model("exact"), model("favor-listed", window=1000, keys=keys)
    missing, _ = linear.load_state_dict(exact.state_dict(), strict=False)
    assert all(".mechanism." in name for name in missing)
    # Rows of two lengths: padding is left out.
    inputs = batch(0, 4)
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        ours, theirs = (x(**inputs).logits for x in (linear, exact))
    present = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[present], theirs[present], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_are_registered(name):
    assert make_model(CONTESTANTS[name], SHAPE, 0)(**batch(0, 1)).loss.isfinite()
