"""Attention over rows of relatives, against exact attention."""

import pytest
import torch

from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import MaskedCollator
from studies.families.scored import TOKENIZER
from studies.families.synthetic import synthetic_families
from studies.families.training import CONTESTANTS, Shape, make_model

ROWS = FamilyRows(synthetic_families(3, members=3, length=20), max_length=400)


def model(attention, **options):
    torch.manual_seed(0)
    config = PerformerConfig(
        vocab_size=31, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=32, hidden_dropout_prob=0.0, num_features=16, initializer_range=0.3,
        attention=attention, attention_options=options,
    )  # fmt: skip
    return PerformerForMaskedLM(config).eval()


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
    shape = Shape(hidden_size=32, num_layers=1, num_features=16)
    assert make_model(CONTESTANTS[name], shape, 0)(**batch(0, 1)).loss.isfinite()
