"""Proteins read with relatives: their rows, and what is scored of them."""

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from performers.proteins.scoring.embedding import embed_residues, embed_sequences
from performers.proteins.scoring.evaluation import evaluate_model
from tests.proteins.runs import make_model

TOKENIZER = build_protein_tokenizer()
PROTEINS = ["MKTAYIAKQR", "GGWC"]
OTHERS = ["MKTAYLAKQK", "MRTAWIARQ", "MKSAYV"]


def record(sequence, name="x", description=""):
    return ProteinRecord(name, description, sequence)


def records(sequences):
    return [record(sequence, f"p{n}") for n, sequence in enumerate(sequences)]


def rows(proteins=PROTEINS, others=OTHERS, max_tokens=100):
    return Relatives(records(others), TOKENIZER, max_tokens).rows(records(proteins))


def by_hand(protein, others=OTHERS):
    """Tokens and positions of a row, and the place of the protein."""
    pieces = [*encode_sequences(TOKENIZER, others)[::-1], *encode_sequences(TOKENIZER, [protein])]
    tokens = torch.from_numpy(np.concatenate(pieces)).long()
    positions = torch.cat([torch.arange(len(piece)) for piece in pieces])
    return tokens, positions, len(tokens) - len(pieces[-1])


def test_a_row_is_a_protein_after_its_relatives_the_first_one_nearest():
    found = rows()
    for index, protein in enumerate(PROTEINS):
        tokens, positions, start = by_hand(protein)
        example = found[index]
        assert example["input_ids"].tolist() == tokens.tolist()
        assert example["position_ids"].tolist() == positions.tolist()
        assert found.starts[index] == start
        assert found.lengths[index] == len(tokens)
        assert not example["may_be_target"][: start + 1].any()
        assert example["may_be_target"][start + 1 :].all()


@pytest.mark.parametrize(
    ("room", "sizes"), [(31, [12, 11, 8]), (30, [12, 11, 7]), (25, [12, 11]), (3, [3])]
)
def test_what_has_no_place_is_left_out_or_cut(room, sizes):
    own = len(PROTEINS[0]) + 2
    relatives = Relatives(records(OTHERS), TOKENIZER, own + room)
    (chosen,) = relatives.rows(records(PROTEINS[:1]))._relatives
    encoded = encode_sequences(TOKENIZER, OTHERS)
    assert [x.tolist() for x in chosen] == [
        x[:size].tolist() for x, size in zip(encoded, sizes, strict=False)
    ]
    relatives.count(record(PROTEINS[0]))
    missing = len(OTHERS) - len(sizes)
    assert f"read with {len(sizes)} relative" in relatives.summary()
    assert (f"{missing} without a place in {own + room}" in relatives.summary()) == (missing > 0)


@pytest.mark.parametrize("copy", [PROTEINS[0], "WW" + PROTEINS[0], PROTEINS[0][2:6]])
def test_the_protein_itself_is_no_relative(copy):
    relatives = Relatives(records([copy, *OTHERS, copy]), TOKENIZER, 100)
    assert relatives.rows(records(PROTEINS[:1])).lengths[0] == rows().lengths[0]
    relatives.count(record(PROTEINS[0]))
    assert "; 2 that are the protein, or overlap with it whole, left out" in relatives.summary()
    with pytest.raises(UserError, match="no relative in the file of relatives but 1 of its own"):
        Relatives(records([copy]), TOKENIZER, 100).rows(records(PROTEINS[:1]))


def test_families_are_named_in_headers():
    others = [record(x, "r", f"family={'AB'[n % 2]}") for n, x in enumerate(OTHERS)]
    relatives = Relatives(others, TOKENIZER, 100)
    made = relatives.rows(
        [record(PROTEINS[0], "a", "x family=B"), record(PROTEINS[1], "b", "family=A")]
    )
    assert [len(x) for x in made._relatives] == [1, 2]
    # A protein without a family is one of its own name.
    assert len(relatives.rows([record(PROTEINS[0], "B", "")])._relatives[0]) == 1
    for protein, message in (
        (record("MK", "m"), "no relative of the family 'm'"),
        (record("MK", "m", "family=C"), "no relative of the family 'C'"),
    ):
        with pytest.raises(UserError, match=message):
            relatives.rows([protein])
    with pytest.raises(UserError, match="'r' and 'x' differ"):
        Relatives([*others, record("MK")], TOKENIZER, 100)
    with pytest.raises(UserError, match="there is no relative"):
        Relatives([], TOKENIZER, 100)


def test_a_protein_that_leaves_no_place():
    with pytest.raises(UserError, match=r"10 residues leaves no place .* raise --relatives-tokens"):
        rows(max_tokens=14)


def test_vectors_are_those_of_the_protein():
    model, tokenizer = make_model(window=2, position_window=1)
    plain = embed_residues(model, tokenizer, PROTEINS)
    options = {"relatives": rows(), "batch_tokens": 50}
    found = embed_residues(model, tokenizer, PROTEINS, **options)
    means = embed_sequences(model, tokenizer, PROTEINS, **options)
    for protein, vectors, mean, alone in zip(PROTEINS, found, means, plain, strict=True):
        tokens, positions, start = by_hand(protein)
        row = {"position_ids": positions[None], "attention_mask": torch.ones(1, len(tokens))}
        with torch.no_grad():
            output = model.base_model(tokens[None], **row).last_hidden_state
        expected = output[0, start + 1 : -1].numpy()
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        np.testing.assert_allclose(mean, expected.mean(0), atol=1e-5)
        assert np.abs(vectors - alone).max() > 1e-3


def test_evaluation_hides_the_same_residues_with_relatives_as_without():
    model, tokenizer = make_model(position_window=1)
    options = {"mask_probability": 0.4, "by_sequence": True}
    alone = evaluate_model(model, tokenizer, PROTEINS, max_length=100, **options)
    found = evaluate_model(model, tokenizer, PROTEINS, relatives=rows(), **options)
    same = ("tokens", "tokens_by_sequence", "baseline_accuracy", "baseline_perplexity", "sequences")
    assert [found[name] for name in same] == [alone[name] for name in same]
    assert found["loss"] != pytest.approx(alone["loss"], abs=1e-4)
