"""Tokens say the same however they are arranged: in batches, in packed rows, in pieces."""

import pytest
import torch

from performers.models import (
    PerformerCache,
    PerformerForSequenceClassification,
)
from performers.models.configuration import POSITIONS
from tests.models.cases import (
    CACHED,
    KINDS,
    MAIN,
    MODELS,
    NAMES,
    PAD,
    PLAIN,
    TOLERANCE,
    assert_same,
    build,
    causal_model,
    gradients,
    left_padded,
    make_model,
    masked_model,
    padded,
    read,
    rows_of,
    tokens,
)

# Pieces of 13 tokens.
CUTS = ((7, 6), (3, 1, 9), (1,) * 13)


def batched(rows, left):
    """Rows as a batch: the arguments of a call, and the place of each sequence."""
    ids, mask = padded(rows, left=left)
    return {"input_ids": ids, "attention_mask": mask}, [(i, x.bool()) for i, x in enumerate(mask)]


def packed(rows, names=(7, 2, 7), tail=2):
    """Rows packed into one, the rest into a second; names of sequences come twice."""
    lines = (rows[:3], rows[3:])
    length = max(sum(map(len, line)) for line in lines) + tail
    ids = torch.full((2, length), PAD)
    mask, sequence_ids = torch.zeros_like(ids), torch.zeros_like(ids)
    places = []
    for index, line in enumerate(lines):
        start = 0
        for row, name in zip(line, names, strict=False):
            place = (index, slice(start, start + len(row)))
            ids[place], mask[place], sequence_ids[place] = row, 1, name
            places.append(place)
            start += len(row)
    return {"input_ids": ids, "attention_mask": mask, "sequence_ids": sequence_ids}, places


ARRANGEMENTS = {
    "left": lambda rows: batched(rows, left=True),
    "right": lambda rows: batched(rows, left=False),
    "packed": packed,
}
ARRANGED = pytest.mark.parametrize("arrangement", ARRANGEMENTS)


@ARRANGED
@pytest.mark.parametrize("positions", POSITIONS)
@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_sequences_together_equal_sequences_alone(name, is_causal, positions, arrangement):
    """Rows may be longer than the table of learned positions: neither they nor padding count."""
    options = {"position_embedding": positions, "max_position_embeddings": 9}
    model = make_model(name, is_causal, **options)
    rows = rows_of(4, 1, 6, 9)
    inputs, places = ARRANGEMENTS[arrangement](rows)
    together = model(**inputs).logits
    assert torch.isfinite(together).all()
    for place, row in zip(places, rows, strict=True):
        torch.testing.assert_close(together[place], model(row[None]).logits[0], **TOLERANCE)
    # A row of a batch by itself keeps its padding.
    row, place = places[1]
    alone = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
    torch.testing.assert_close(alone[0, place], together[row, place], **TOLERANCE)


@ARRANGED
@KINDS
@pytest.mark.parametrize("name", MAIN)
def test_so_do_their_gradients(name, is_causal, arrangement):
    model = make_model(name, is_causal)
    rows = rows_of(4, 1, 6, 9)
    inputs, places = ARRANGEMENTS[arrangement](rows)
    logits = model(**inputs).logits
    sum(logits[place].square().sum() for place in places).backward()
    together = gradients(model)
    for row in rows:
        model(row[None]).logits.square().sum().backward()
    assert_same(together, gradients(model), rtol=1e-5, atol=1e-7)


@ARRANGED
@KINDS
@pytest.mark.parametrize("name", [*PLAIN, "reversible"])
def test_attention_matrices(name, is_causal, arrangement):
    """They are those of each sequence alone, and what the layers did."""
    model = make_model(name, is_causal)
    rows = rows_of(4, 1, 6, 9)
    inputs, places = ARRANGEMENTS[arrangement](rows)
    results = []
    for layer in model.performer.layers:
        layer.attention.mechanism.register_forward_hook(
            lambda module, args, result: results.append((args[2], *result))
        )
    plain = model(**inputs, use_cache=False)
    results.clear()
    shown = model(**inputs, use_cache=False, output_attentions=True)
    for (value, out, _), weights in zip(results, shown.attentions, strict=True):
        batch, length = inputs["input_ids"].shape
        assert weights.shape == (batch, 2, length, length)
        assert not (is_causal and weights.triu(1).any())
        attended = weights @ value
        for row, place in places:
            torch.testing.assert_close(attended[row, :, place], out[row, :, place], **TOLERANCE)
    alone = [model(row[None], use_cache=False, output_attentions=True).attentions for row in rows]
    for layer, weights in enumerate(shown.attentions):
        for (row, place), matrices in zip(places, alone, strict=True):
            seen = weights[row][:, place]
            inside = seen[:, :, place]
            assert torch.count_nonzero(seen) == torch.count_nonzero(inside)
            ones = torch.ones_like(inside[..., 0])
            torch.testing.assert_close(inside.sum(-1), ones, **TOLERANCE)
            torch.testing.assert_close(inside, matrices[layer][0], rtol=1e-5, atol=1e-7)
    for place in places:
        torch.testing.assert_close(shown.logits[place], plain.logits[place], **TOLERANCE)


@ARRANGED
@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_content_of_padding_is_irrelevant(name, is_causal, arrangement):
    """Also where its sequence id is that of the last sequence of the row."""
    model = make_model(name, is_causal)
    inputs, _ = ARRANGEMENTS[arrangement](rows_of(4, 1, 6, 9))
    real = inputs["attention_mask"].bool()
    embedded = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    before = model(inputs_embeds=embedded, **inputs).logits
    if "sequence_ids" in inputs:
        inputs["sequence_ids"] = inputs["sequence_ids"].where(real, 7)
    hostile = embedded.masked_fill(~real[..., None], 1e3)
    after = model(inputs_embeds=hostile, **inputs).logits
    torch.testing.assert_close(after[real], before[real], **TOLERANCE)
    assert torch.isfinite(after).all()


@KINDS
@pytest.mark.parametrize("name", NAMES)
def test_padding_alone_and_before_a_row(name, is_causal):
    """A row of padding is finite with its gradients; attention to nothing is zero."""
    model = make_model(name, is_causal).train()
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]])
    results = []
    model.performer.layers[0].attention.mechanism.register_forward_hook(
        lambda module, args, result: results.append(result)
    )
    options = {"attention_mask": mask, "use_cache": False}
    logits = model(tokens(2, 4), **options).logits
    assert torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    model(tokens(2, 4), **options, output_attentions=True)
    for out, weights in (results[0], results[-1]) if name != "identity" else ():
        assert (out[1] == 0).all()
        assert (out[0, :, 1:] != 0).any()
        assert not (is_causal and out[0, :, 0].any())
        assert weights is None or not weights[1].any()


@pytest.mark.parametrize("name", MAIN)
def test_masks_of_ones_and_masks_with_holes(name):
    model = masked_model(name)
    ids = tokens(2, 8)
    plain = model(ids).logits
    ones = torch.ones_like(ids)
    for mask in (ones, ones.float(), ones.bool()):
        assert torch.equal(model(ids, attention_mask=mask).logits, plain)
    # One sequence in a row is an ordinary batch, its padding no position.
    torch.testing.assert_close(model(ids, sequence_ids=ones).logits, plain, **TOLERANCE)
    row, hole = torch.nn.functional.pad(ids, (4, 0)), torch.nn.functional.pad(ones, (4, 0))
    out = model(row, attention_mask=hole, sequence_ids=torch.ones_like(row)).logits
    torch.testing.assert_close(out[:, 4:], plain, **TOLERANCE)
    # A masked token in the middle is no key.
    ones[:, 3] = 0
    other = ids.clone()
    other[:, 3] = torch.where(ids[:, 3] == 5, 6, 5)
    before, after = (model(x, attention_mask=ones).logits[ones.bool()] for x in (ids, other))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("is_decoder", [False, True])
@pytest.mark.parametrize("name", MAIN)
def test_pooled_outputs_ignore_padding(name, is_decoder, left):
    model = build(PerformerForSequenceClassification, name, is_decoder=is_decoder).double()
    rows = rows_of(12, 5)
    inputs, _ = batched(rows, left)
    for logits, row in zip(model(**inputs).logits, rows, strict=True):
        torch.testing.assert_close(logits, model(row[None]).logits[0], **TOLERANCE)


@pytest.mark.parametrize("masks", ["none", "own", "whole"])
@pytest.mark.parametrize("cuts", CUTS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", CACHED)
def test_pieces_equal_the_whole(name, positions, cuts, masks):
    """Rows are padded on the left, and between a prompt and what continues it."""
    model = causal_model(name, position_embedding=positions)
    rows = rows_of(13, 6, 2)
    ids, mask = left_padded(rows)
    if masks == "none":
        rows = list(tokens(3, 13))
        ids, mask = torch.stack(rows), torch.ones_like(ids)
    elif "window" not in MODELS[name]:
        # A window counts places, padding included.
        mask[1] = torch.tensor([0] * 5 + [1] * 4 + [0] * 2 + [1] * 2)
        ids[1].zero_().masked_scatter_(mask[1].bool(), rows[1])
    parts = None if masks == "none" else mask
    logits, cache = read(model, ids, parts, cuts, whole_mask=masks == "whole")
    whole = model(ids, attention_mask=parts, use_cache=False)
    assert whole.past_key_values is None
    real = mask.bool()
    torch.testing.assert_close(logits[real], whole.logits[real], **TOLERANCE)
    for index, row in enumerate(rows):
        alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits[index][real[index]], alone, **TOLERANCE)
    assert isinstance(cache, PerformerCache)
    assert cache.get_seq_length() == 13


@pytest.mark.parametrize("name", [*MAIN, "reversible", "hybrid, outer"])
def test_gradients_of_pieces_equal_those_of_the_whole(name):
    model = causal_model(name).train()
    ids = tokens(2, 13)
    model(ids).logits.square().sum().backward()
    whole = gradients(model)
    logits, _ = read(model, ids, None, (5, 1, 7))
    logits.square().sum().backward()
    assert_same(gradients(model), whole, rtol=1e-5, atol=1e-7)


@KINDS
def test_a_window_over_everything_is_exact_attention(is_causal):
    windowed, exact = (
        make_model(name, is_causal, **options)
        for name, options in (("window", {"window": 64}), ("exact", {}))
    )
    exact.load_state_dict(windowed.state_dict(), strict=False)
    torch.testing.assert_close(windowed(tokens(2, 40)).logits, exact(tokens(2, 40)).logits)
