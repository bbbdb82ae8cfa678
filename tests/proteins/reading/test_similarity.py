"""Similarity of amino acids against its definition."""

import math

import numpy as np
import pytest
import torch

from performers.proteins.inputs.tokenizer import AMINO_ACIDS, build_protein_tokenizer, residue_ids
from performers.proteins.reading.similarity import (
    AttentionSimilarity,
    embedding_similarity,
    pair_ranks,
    top_pairs,
)
from tests.proteins.runs import make_model

FIRST = 5
"""Id of the first amino acid."""


def _similarity(batch=None, *, threshold=None):
    """A similarity, of a batch if one is given."""
    similarity = AttentionSimilarity(build_protein_tokenizer(closed=True), threshold=threshold)
    if batch is not None:
        similarity.update(*batch)
    return similarity


def _batch(batch: int = 2, layers: int = 2, heads: int = 3, length: int = 40, seed: int = 0):
    """Framed sequences with every amino acid and an X, the second one padded; peaky attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST, FIRST + 21, (batch, length), generator=generator)
    tokens[0, 1:21] = torch.arange(FIRST, FIRST + 20)
    tokens[:, 0] = 1
    tokens[0, -1] = 2
    tokens[1:, -6] = 2
    tokens[1:, -5:] = 0
    padding = tokens[:, None, None] == 0
    attentions = []
    for _ in range(layers):
        scores = 2 * torch.randn(batch, heads, length, length, generator=generator)
        attentions.append(scores.masked_fill(padding, -math.inf).softmax(-1))
    return tokens, attentions


def _shares_by_hand(tokens: torch.Tensor, attentions: list[torch.Tensor], threshold: float):
    rows = []
    for weights in attentions:
        for head in range(weights.shape[1]):
            paid, total = np.zeros(20), 0.0
            for b in range(tokens.shape[0]):
                inside = [i for i in range(tokens.shape[1]) if tokens[b, i] >= FIRST]
                for i in inside:
                    for j in inside:
                        weight = float(weights[b, head, i, j])
                        if weight > threshold:
                            total += weight
                            if tokens[b, j] < FIRST + 20:
                                paid[int(tokens[b, j]) - FIRST] += weight
            rows.append(paid / total)
    return np.array(rows)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_shares_and_similarity_match_the_definition(threshold):
    tokens, attentions = batch = _batch()
    similarity = _similarity(batch, threshold=threshold)
    expected = _shares_by_hand(tokens, attentions, -1.0 if threshold is None else threshold)
    np.testing.assert_allclose(similarity.shares(), expected, rtol=1e-5)
    matrix = similarity.matrix()
    np.testing.assert_allclose(matrix, np.corrcoef(expected.T), atol=1e-4)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert similarity.heads() == 6
    # The frequency of an amino acid does not enter.
    enrichment = similarity.shares() / (similarity.occurrences / similarity.occurrences.sum())
    np.testing.assert_allclose(matrix, np.corrcoef(enrichment.T), atol=1e-9)


def test_batches_add_up_to_the_whole():
    tokens, attentions = batch = _batch(batch=4)
    whole, parts = _similarity(batch), _similarity()
    for rows in (slice(0, 1), slice(1, 4)):
        parts.update(tokens[rows], [weights[rows] for weights in attentions])
    np.testing.assert_allclose(parts.shares(), whole.shares(), rtol=1e-12)
    np.testing.assert_array_equal(parts.occurrences, whole.occurrences)


def test_amino_acid_that_never_occurs_is_left_out_and_named():
    tokens, attentions = _batch()
    tokens = torch.where(tokens == FIRST + AMINO_ACIDS.index("W"), FIRST, tokens)
    similarity = _similarity((tokens, attentions))
    matrix = similarity.matrix()
    tryptophan = AMINO_ACIDS.index("W")
    assert np.isnan(matrix[tryptophan]).all()
    assert np.isfinite(np.delete(np.delete(matrix, tryptophan, 0), tryptophan, 1)).all()
    missing, there = pair_ranks(matrix, ["FW", "DE"])
    assert missing["rank"] is None
    assert math.isnan(missing["similarity"])
    assert there["rank"] is not None
    assert missing["of"] == there["of"] == 171
    assert [note for note in similarity.notes() if note.endswith(": W.")]


def test_head_without_attention_above_the_threshold_is_left_out_and_named():
    _, attentions = batch = _batch(heads=4)
    attentions[1][:, 2] = 0.01
    similarity = _similarity(batch, threshold=0.1)
    assert similarity.heads() == 7
    assert np.isfinite(similarity.matrix()).all()
    assert "1 of 8 heads" in similarity.notes()[0]
    assert "2.3" in similarity.notes()[0]
    assert _similarity(batch).notes() == []
    attentions[0][0, 1, 3, 3] = math.nan
    similarity = _similarity(batch)
    assert similarity.heads() == 7, "nor does one with NaN count"
    assert np.isfinite(similarity.matrix()).all()


def test_pairs_are_ranked_among_all_that_have_a_similarity():
    matrix = _similarity(_batch(layers=3)).matrix()
    every = top_pairs(matrix, 190)
    assert top_pairs(matrix, 5) == every[:5]
    assert len({frozenset(pair["pair"]) for pair in every}) == 190
    values = [pair["similarity"] for pair in every]
    assert values == sorted(values, reverse=True)
    row, column = (AMINO_ACIDS.index(letter) for letter in every[0]["pair"].split("–"))
    assert values[0] == matrix[row, column]
    ranked = pair_ranks(matrix, [pair["pair"][::-2] for pair in every])
    assert [pair["rank"] for pair in ranked] == list(range(1, 191))
    assert {pair["of"] for pair in ranked} == {190}
    assert [pair["similarity"] for pair in ranked] == values
    assert [pair["pair"] for pair in pair_ranks(matrix)] == ["D–E", "F–Y", "I–V", "K–R"]


def test_embeddings_are_compared_without_their_mean():
    model, tokenizer = make_model()
    ids = residue_ids(tokenizer, AMINO_ACIDS)
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(20, 16))
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[ids] = torch.tensor(vectors, dtype=torch.float32)
    before = embedding_similarity(model, tokenizer)
    vectors -= vectors.mean(0)
    np.testing.assert_allclose(before, np.corrcoef(np.c_[vectors, -vectors]), atol=1e-5)
    with torch.no_grad():
        weight[ids] += torch.tensor(generator.normal(0, 5, 16), dtype=torch.float32)
    np.testing.assert_allclose(embedding_similarity(model, tokenizer), before, atol=1e-4)


def test_one_that_lies_at_the_mean_has_no_similarity():
    model, tokenizer = make_model()
    ids = residue_ids(tokenizer, AMINO_ACIDS)
    weight = model.get_input_embeddings().weight
    weight.data[ids] = 0
    weight.data[ids[1], 0], weight.data[ids[2], 0] = 1, -1
    similarity = embedding_similarity(model, tokenizer)
    assert similarity[1, 2] == -1
    assert np.isnan(similarity[0]).all()
    assert np.isnan(similarity[:, 3]).all()
    assert [p["pair"] for p in top_pairs(similarity)] == ["–".join(AMINO_ACIDS[1:3])]
    known, unknown = pair_ranks(similarity, (AMINO_ACIDS[1:3], AMINO_ACIDS[:2]))
    assert (known["rank"], known["of"]) == (1, 1)
    assert unknown["rank"] is None


def test_padding_and_precision_do_not_matter():
    tokens, attentions = batch = _batch(length=64)
    clean = _similarity(batch)
    half = _similarity((tokens, [weights.bfloat16() for weights in attentions]))
    np.testing.assert_allclose(half.shares(), clean.shares(), rtol=5e-3)
    for weights in attentions:
        weights[1, :, -5:, :] = math.nan
        weights[1, :, :, -5:] = 7.0
    dirty = _similarity(batch)
    np.testing.assert_array_equal(dirty.shares(), clean.shares())
    np.testing.assert_array_equal(dirty.occurrences, clean.occurrences)


@pytest.mark.parametrize("threshold", [None, 0.1])
def test_no_similarity_is_explained(threshold):
    tokens, weights = _batch()
    flat = (tokens, [torch.full_like(x, 0.25) for x in weights])
    for batch, note in (
        (_batch(layers=1, heads=1), "at least 3"),
        (_batch(layers=2, heads=1), "at least 3"),
        (flat, "same share"),
    ):
        found = _similarity(batch, threshold=threshold)
        assert np.isnan(found.matrix()).all()
        assert top_pairs(found.matrix()) == []
        assert note in found.notes()[-1]
