"""Sequences packed into one row, told apart by ``sequence_ids``, equal sequences alone."""

import pytest
import torch

from tests.models.cases import (
    CAUSAL,
    MAIN,
    PAD,
    POSITION_NAMES,
    TOLERANCE,
    gradients,
    make_model,
    masked_model,
    tokens,
)

KINDS = pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])

# Row by row, the sequences' ids and lengths; id 7 stands for two sequences of the first row.
ROWS = (((7, 4), (2, 1), (7, 6)), ((3, 9),))
LENGTH = 13


def packed(rows=ROWS, length=LENGTH):
    """Ids, mask and sequence ids of the rows, and where each sequence stands."""
    ids = torch.full((len(rows), length), PAD)
    mask, sequence_ids = torch.zeros_like(ids), torch.zeros_like(ids)
    places = []
    for index, row in enumerate(rows):
        start = 0
        for number, (name, size) in enumerate(row):
            place = (index, slice(start, start + size))
            ids[place] = tokens(1, size, seed=10 * index + number)[0]
            mask[place], sequence_ids[place] = 1, name
            places.append(place)
            start += size
    return ids, mask, sequence_ids, places


@KINDS
@pytest.mark.parametrize("attention", CAUSAL)
def test_packed_sequences_equal_sequences_alone(attention, is_causal):
    model = make_model(attention, is_causal)
    ids, mask, sequence_ids, places = packed()
    together = model(ids, attention_mask=mask, sequence_ids=sequence_ids).logits
    assert torch.isfinite(together).all()
    for place in places:
        alone = model(ids[place][None]).logits[0]
        torch.testing.assert_close(together[place], alone, **TOLERANCE)


@KINDS
@pytest.mark.parametrize("positions", POSITION_NAMES)
def test_positions_start_again_with_each_sequence(positions, is_causal):
    model = make_model("favor-relu", is_causal, position_embedding=positions)
    ids, mask, sequence_ids, places = packed()
    together = model(ids, attention_mask=mask, sequence_ids=sequence_ids).logits
    for place in places:
        alone = model(ids[place][None]).logits[0]
        torch.testing.assert_close(together[place], alone, **TOLERANCE)


@KINDS
def test_rows_may_be_longer_than_the_table_of_positions(is_causal):
    """Sequences may not; neither the row nor the run of padding at its end counts."""
    model = make_model(
        "favor-softmax", is_causal, position_embedding="learned", max_position_embeddings=9
    )
    ids, mask, sequence_ids, places = packed(length=30)
    together = model(ids, attention_mask=mask, sequence_ids=sequence_ids).logits
    for place in places:
        alone = model(ids[place][None]).logits[0]
        torch.testing.assert_close(together[place], alone, **TOLERANCE)


@KINDS
@pytest.mark.parametrize("attention", MAIN)
def test_packed_gradients_equal_those_alone(attention, is_causal):
    model = make_model(attention, is_causal)
    ids, mask, sequence_ids, places = packed()
    logits = model(ids, attention_mask=mask, sequence_ids=sequence_ids).logits
    logits[mask.bool()].square().sum().backward()
    together = gradients(model)
    for place in places:
        model(ids[place][None]).logits.square().sum().backward()
    alone = gradients(model)
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=1e-5, atol=1e-7, msg=name)


@KINDS
@pytest.mark.parametrize("attention", MAIN)
def test_other_sequences_do_not_matter(attention, is_causal):
    """Nor does their place, in rows that are long enough to be worked on in chunks."""
    model = make_model(attention, is_causal)
    lengths = (70, 63, 1, 66)
    ids, mask, sequence_ids, places = packed(([*enumerate(lengths)],), sum(lengths) + 5)
    together = model(ids, attention_mask=mask, sequence_ids=sequence_ids).logits
    other = ids.clone()
    other[places[1]] = tokens(1, 63, seed=99)[0]
    after = model(other, attention_mask=mask, sequence_ids=sequence_ids).logits
    for index in (0, 2, 3):
        torch.testing.assert_close(after[places[index]], together[places[index]], **TOLERANCE)
        alone = model(ids[places[index]][None]).logits[0]
        torch.testing.assert_close(together[places[index]], alone, **TOLERANCE)


@KINDS
@pytest.mark.parametrize("attention", MAIN)
def test_padding_of_a_packed_row_is_irrelevant(attention, is_causal):
    """Also where its sequence id is that of the row's last sequence."""
    model = make_model(attention, is_causal)
    ids, mask, sequence_ids, _ = packed()
    last = torch.tensor([[7], [3]]).expand_as(ids)
    continued = torch.where(mask.bool(), sequence_ids, last)
    filled = torch.where(mask.bool(), ids, torch.full_like(ids, 9))
    real = mask.bool()
    before = model(ids, attention_mask=mask, sequence_ids=sequence_ids).logits
    after = model(filled, attention_mask=mask, sequence_ids=continued).logits
    torch.testing.assert_close(after[real], before[real], **TOLERANCE)


@KINDS
@pytest.mark.parametrize("attention", CAUSAL)
def test_attention_matrices_of_packed_rows(attention, is_causal):
    """They keep to the sequences' blocks, sum to one there, and are those of each alone."""
    model = make_model(attention, is_causal)
    ids, mask, sequence_ids, places = packed()
    shown = model(ids, attention_mask=mask, sequence_ids=sequence_ids, output_attentions=True)
    for layer, weights in enumerate(shown.attentions):
        for index, place in places:
            rows = weights[index, :, place]
            inside = rows[:, :, place]
            torch.testing.assert_close(inside.sum(-1), torch.ones_like(inside[..., 0]), **TOLERANCE)
            assert torch.count_nonzero(rows) == torch.count_nonzero(inside)
            alone = model(ids[index, place][None], use_cache=False, output_attentions=True)
            torch.testing.assert_close(inside, alone.attentions[layer][0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("attention", MAIN)
def test_one_sequence_per_row_is_an_ordinary_batch(attention):
    model = masked_model(attention)
    ids = tokens(2, 9)
    together = model(ids, sequence_ids=torch.zeros_like(ids)).logits
    torch.testing.assert_close(together, model(ids).logits, **TOLERANCE)


def test_sequence_ids_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"sequence_ids must have shape \(2, 6\), got \(1, 6\)"):
        masked_model()(tokens(2, 6), sequence_ids=torch.zeros(1, 6))


def test_sequence_ids_do_not_go_with_a_cache():
    model = make_model("favor-softmax", is_causal=True)
    ids = tokens(1, 6)
    past = model(ids, use_cache=True).past_key_values
    with pytest.raises(
        ValueError, match=r"packed sequences.*cannot be combined with past_key_values"
    ):
        model(ids, sequence_ids=torch.zeros_like(ids), past_key_values=past)


def test_padding_inside_a_packed_run_is_not_counted():
    """Learned positions of a left-padded sequence are those of the sequence alone."""
    model = masked_model("favor-softmax", position_embedding="learned")
    ids = tokens(1, 12)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)), dim=1)
    packed = model(padded, attention_mask=mask, sequence_ids=torch.ones_like(padded)).logits
    torch.testing.assert_close(packed[:, 4:], model(ids).logits, **TOLERANCE)
