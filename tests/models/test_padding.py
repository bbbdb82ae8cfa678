"""Padding changes nothing for real tokens: not on either side, not whatever it holds."""

import pytest
import torch

from performers.models import PerformerForSequenceClassification
from tests.models.cases import (
    EVERY,
    MAIN,
    POSITION_NAMES,
    TOLERANCE,
    gradients,
    left_padded,
    make_config,
    make_model,
    right_padded,
    tokens,
)

KINDS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
SIDES = pytest.mark.parametrize("pad", [left_padded, right_padded])


def rows_of(*lengths):
    return [tokens(1, length, seed=length)[0] for length in lengths]


@SIDES
@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_padded_rows_equal_rows_alone(attention, is_causal, pad):
    model = make_model(attention, is_causal)
    rows = rows_of(12, 7, 1)
    ids, mask = pad(rows)
    together = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(together[index][mask[index].bool()], alone, **TOLERANCE)


@SIDES
@KINDS
@pytest.mark.parametrize("positions", POSITION_NAMES)
def test_padding_is_not_counted_as_a_position(positions, is_causal, pad):
    model = make_model("favor-softmax", is_causal, position_embedding=positions)
    rows = rows_of(9, 4)
    ids, mask = pad(rows)
    together = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        alone = model(row[None]).logits[0]
        torch.testing.assert_close(together[index][mask[index].bool()], alone, **TOLERANCE)


@SIDES
@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_a_batch_of_one_is_masked_too(attention, is_causal, pad):
    """Padding to the length of a longer row, which is then dropped from the batch."""
    model = make_model(attention, is_causal)
    short = rows_of(6)[0]
    ids, mask = pad([*rows_of(11), short])
    out = model(ids[1:], attention_mask=mask[1:]).logits[0]
    alone = model(short[None]).logits[0]
    torch.testing.assert_close(out[mask[1].bool()], alone, **TOLERANCE)


@SIDES
@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_content_of_padding_is_irrelevant(attention, is_causal, pad):
    model = make_model(attention, is_causal)
    ids, mask = pad(rows_of(10, 5))
    real = mask.bool()
    embedded = model.get_input_embeddings()(ids).detach()
    hostile = embedded.masked_fill(~real[..., None], 1e3)
    before = model(inputs_embeds=embedded, attention_mask=mask).logits
    after = model(inputs_embeds=hostile, attention_mask=mask).logits
    torch.testing.assert_close(after[real], before[real], rtol=0, atol=0)
    assert torch.isfinite(after).all()


@SIDES
@KINDS
@pytest.mark.parametrize("attention", MAIN)
def test_gradients_of_padded_rows(attention, is_causal, pad):
    model = make_model(attention, is_causal)
    rows = rows_of(12, 7)
    ids, mask = pad(rows)
    labels = ids.masked_fill(~mask.bool(), -100)
    model(ids, attention_mask=mask).logits[labels != -100].square().sum().backward()
    together = gradients(model)
    for row in rows:
        model(row[None]).logits.square().sum().backward()
    alone = gradients(model)
    assert together.keys() == alone.keys()
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(("attention", "is_causal"), EVERY)
def test_a_row_of_padding_only_is_finite(attention, is_causal):
    model = make_model(attention, is_causal).train()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    logits = model(tokens(2, 4), attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all(), name


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize(
    ("attention", "is_causal"), [kind for kind in EVERY if kind[0] != "identity"]
)
def test_attention_to_nothing_is_zero(attention, is_causal, output_attentions):
    model = make_model(attention, is_causal)
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
    results = []
    model.performer.layers[0].attention.mechanism.register_forward_hook(
        lambda module, args, result: results.append(result)
    )
    model(tokens(2, 4), attention_mask=mask, use_cache=False, output_attentions=output_attentions)
    ((out, weights),) = results
    assert (out[1] == 0).all()
    assert (out[0, :, 1:] != 0).any()
    if is_causal:
        assert (out[0, :, 0] == 0).all()
    if output_attentions:
        assert (weights[1] == 0).all()


@KINDS
@pytest.mark.parametrize("attention", MAIN)
def test_a_mask_of_ones_changes_nothing(attention, is_causal):
    model = make_model(attention, is_causal)
    ids = tokens(2, 8)
    for mask in (torch.ones_like(ids), torch.ones(2, 8), torch.ones(2, 8, dtype=torch.bool)):
        torch.testing.assert_close(
            model(ids, attention_mask=mask).logits, model(ids).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("attention", MAIN)
def test_holes_inside_a_row_are_masked(attention):
    """A masked token in the middle is no key, whatever the attention."""
    model = make_model(attention, is_causal=False)
    ids = tokens(1, 8)
    mask = torch.ones_like(ids)
    mask[0, 3] = 0
    other = ids.clone()
    other[0, 3] = 5 if ids[0, 3] != 5 else 6
    real = mask.bool()
    before, after = (model(x, attention_mask=mask).logits[real] for x in (ids, other))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@SIDES
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("attention", MAIN)
def test_pooled_outputs_ignore_padding(attention, is_decoder, pad):
    torch.manual_seed(0)
    config = make_config(attention, is_decoder=is_decoder, num_labels=3)
    model = PerformerForSequenceClassification(config).double().eval()
    rows = rows_of(12, 5)
    ids, mask = pad(rows)
    together = model(ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        torch.testing.assert_close(together[index], model(row[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("shape", [(2, 5), (1, 6), (2, 7), (2, 1, 6, 6)])
def test_a_mask_of_another_shape_is_refused(shape):
    model = make_model("favor-softmax", is_causal=False)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 6\), got"):
        model(tokens(2, 6), attention_mask=torch.ones(shape))
