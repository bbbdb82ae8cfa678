"""Later tokens do not change what a causal model said before them."""

import pytest
import torch

from performers.models import PerformerForCausalLM
from tests.models.cases import CAUSAL, TOLERANCE, causal_model, make_config, tokens


@pytest.mark.parametrize("attention", CAUSAL)
def test_later_tokens_do_not_change_earlier_logits(attention):
    model = causal_model(attention)
    ids = tokens(1, 150)
    before = model(ids).logits
    embedded = model.get_input_embeddings()(ids).detach()
    for position in (1, 63, 64, 100, 149):
        other = ids.clone()
        other[:, position:] = tokens(1, 150 - position, seed=7)
        after = model(other).logits
        torch.testing.assert_close(after[:, :position], before[:, :position], **TOLERANCE)
        loud = embedded.clone()
        loud[:, position:] *= 1e4
        after = model(inputs_embeds=loud).logits
        torch.testing.assert_close(after[:, :position], before[:, :position], **TOLERANCE)


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu"])
def test_nor_do_they_in_single_precision(attention):
    """By more than rounding."""
    torch.manual_seed(0)
    model = PerformerForCausalLM(make_config(attention)).eval()
    embedded = model.get_input_embeddings()(tokens(1, 150)).detach()
    before = model(inputs_embeds=embedded).logits
    for factor in (1e4, 0.0):
        changed = embedded.clone()
        changed[:, 70:] *= factor
        after = model(inputs_embeds=changed).logits
        torch.testing.assert_close(after[:, :70], before[:, :70], rtol=1e-5, atol=1e-5)
        assert (after[:, 70:] - before[:, 70:]).abs().max() > 1e-2
