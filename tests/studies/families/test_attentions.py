"""Attention over rows of relatives, against exact attention."""

import pytest
import torch
from torch import nn

from performers.models import PerformerConfig, PerformerForMaskedLM
from performers.models.context import AttentionContext
from performers.models.positions import rotary_angles
from performers.proteins.inputs.families import FamilyRows
from performers.proteins.inputs.objectives import MaskedCollator
from studies.families.attentions import NAME, OrderedHeads, positions
from studies.families.scored import TOKENIZER
from studies.families.synthetic import synthetic_families
from studies.families.training import CONTESTANTS

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


@pytest.mark.parametrize("options", [{}, {"listed_keys": 4}, {"positions_window": 1000}])
def test_windows_that_cover_a_row_are_exact(options):
    exact, linear = model("exact"), model(NAME, window=1000, **options)
    missing, _ = linear.load_state_dict(exact.state_dict(), strict=False)
    assert all(".mechanism." in name for name in missing)
    # Rows of two lengths: padding is left out.
    inputs = batch(0, 4)
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        ours, theirs = (x(**inputs).logits for x in (linear, exact))
    present = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[present], theirs[present], rtol=1e-4, atol=1e-4)


class Previous(nn.Module):
    """Each token's result is the value of the one before it, as far as the mask reaches."""

    def forward(self, query, key, value, context, layer):
        return (value * context.key_mask[:, None, :, None]).roll(1, dims=2), None


def test_half_of_the_heads_see_the_row_by_position():
    ids = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    value = torch.arange(9.0)[None, None, :, None].expand(1, 4, 9, 8)
    mask = torch.ones(1, 9, dtype=torch.bool)
    mask[0, 8] = False
    context = AttentionContext(False, key_mask=mask, rotary=rotary_angles(ids, 8, 10000.0))
    out, _ = OrderedHeads(Previous(), Previous())(value, value, value, context, 0)
    assert out[0, :2, 1:, 0].tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]] * 2
    # By position: 0 3 5 | 1 4 6 | 2 7 | 8, of which the last is padding, and precedes the first.
    before = {3: 0, 5: 3, 1: 5, 4: 1, 6: 4, 2: 6, 7: 2, 8: 7, 0: 0}
    assert out[0, 2:, :, 0].tolist() == [[before[place] for place in range(9)]] * 2


def test_angles_tell_positions():
    inputs = batch(0, 4)
    config = PerformerConfig(hidden_size=64, num_attention_heads=4)
    many = torch.arange(5000).flip(0)[None]
    assert torch.equal(positions(rotary_angles(many, 16, config.rope_theta)).argsort(), many)
    found = positions(rotary_angles(inputs["position_ids"], 16, config.rope_theta))
    order = found.argsort(dim=-1, stable=True)
    assert torch.equal(order, inputs["position_ids"].argsort(dim=-1, stable=True))


def test_refusals():
    with pytest.raises(ValueError, match="masked model"):
        PerformerForMaskedLM(
            PerformerConfig(
                hidden_size=32,
                num_attention_heads=4,
                num_hidden_layers=1,
                intermediate_size=8,
                position_embedding="sinusoidal",
                attention=NAME,
                attention_options={"positions_window": 4},
            )
        )(torch.ones(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("name", CONTESTANTS)
def test_contestants_are_registered(name):
    contestant = CONTESTANTS[name]
    assert model(contestant.attention, **contestant.options)(**batch(0, 1)).loss.isfinite()
