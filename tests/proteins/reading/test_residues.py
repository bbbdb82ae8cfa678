"""Guesses of hidden residues against a direct computation, and the map of proteins."""

import numpy as np
import pytest

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences, residue_ids
from performers.proteins.reading import residues
from performers.proteins.reading.residues import principal_components, read_proteins
from performers.proteins.scoring.embedding import embed_sequences
from tests.proteins.runs import log_probabilities, make_model, proteins


def records(*sequences):
    return [ProteinRecord(f"p{n}", "", letters) for n, letters in enumerate(sequences)]


def shares(model, tokenizer, tokens, place):
    """The model's distribution over the amino acids at a place of a row."""
    found = log_probabilities(model, tokens)[place].exp()
    return found[residue_ids(tokenizer, AMINO_ACIDS)].numpy()


def check(reading, expected):
    for place, letter in enumerate(reading.record.sequence):
        if letter not in AMINO_ACIDS:
            assert np.isnan(reading.probability[place])
            continue
        found = expected(place)
        own = AMINO_ACIDS.index(letter)
        assert reading.probability[place] == pytest.approx(found[own], rel=1e-4)
        others = [i for i in np.argsort(-found, kind="stable") if i != own][:3]
        np.testing.assert_allclose(
            reading.substitute_probability[place], found[others], rtol=1e-4, atol=1e-7
        )


def test_a_masked_model_guesses_residues_that_it_does_not_see(monkeypatch):
    # As many folds as tokens: each residue is hidden alone.
    monkeypatch.setattr(residues, "FOLDS", 1000)
    model, tokenizer = make_model()
    given = records("MKTXAYIAKQR", "ACDBEFGHIKLMN")
    for reading in read_proteins(model, tokenizer, given, max_length=40):
        (tokens,) = encode_sequences(tokenizer, [reading.record.sequence])

        def expected(place, tokens=tokens):
            hidden = tokens.copy()
            hidden[place + 1] = tokenizer.mask_token_id
            return shares(model, tokenizer, hidden, place + 1)

        check(reading, expected)
    vectors = embed_sequences(model, tokenizer, [record.sequence for record in given])
    np.testing.assert_allclose(reading.embedding, vectors[1], atol=1e-6)


def test_each_residue_is_hidden_once_and_a_seventh_of_them_together():
    model, tokenizer = make_model()
    (letters,) = proteins(1, 90, 90)
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].clone()), with_kwargs=True
    )
    (reading,) = read_proteins(model, tokenizer, records(letters), max_length=40)
    handle.remove()
    hidden = [(row == tokenizer.mask_token_id).sum().item() for rows in seen for row in rows]
    assert sum(hidden) == 90
    assert len(hidden) == 3 * residues.FOLDS, "windows of at most 40 tokens"
    assert max(hidden) <= 12
    assert np.isfinite(reading.probability).all()
    assert 0 <= reading.accuracy <= 1
    assert reading.surprise == pytest.approx(-np.log2(reading.probability).mean(), rel=1e-5)


def test_a_causal_model_guesses_residues_from_those_before():
    model, tokenizer = make_model("clm")
    (reading,) = read_proteins(model, tokenizer, records("MKTXAYIAKQR"), max_length=40)
    (tokens,) = encode_sequences(tokenizer, ["MKTXAYIAKQR"])
    check(reading, lambda place: shares(model, tokenizer, tokens, place))
    (reading,) = read_proteins(model, tokenizer, records("MKTAYIAKQR"), max_length=6)
    # The first token of a later window has nothing before it.
    assert np.isnan(reading.probability).sum() == 1


def test_nothing_to_guess_is_not_a_number():
    model, tokenizer = make_model()
    (reading,) = read_proteins(model, tokenizer, records("XXB"))
    assert np.isnan([reading.surprise, reading.accuracy]).all()
    assert read_proteins(model, tokenizer, []) == []


def test_principal_components_are_the_directions_of_most_variance():
    generator = np.random.default_rng(0)
    vectors = (generator.normal(size=(50, 6)) * [9, 4, 1, 1, 1, 1]).astype(np.float32)
    places, parts = principal_components(vectors)
    values = np.linalg.eigvalsh(np.cov(vectors.T.astype(float)))[::-1]
    np.testing.assert_allclose(places.var(0, ddof=1), values[:2], rtol=1e-6)
    np.testing.assert_allclose(parts, values[:2] / values.sum(), rtol=1e-6)
    mirrored, _ = principal_components(-vectors)
    assert (np.abs(mirrored).max(0) == mirrored.max(0)).all()
    places, parts = principal_components(vectors[:1])
    assert (places == 0).all()
    assert parts == [0.0, 0.0]
