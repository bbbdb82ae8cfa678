from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from performers.proteins.inputs.tokenizer import build_protein_tokenizer, residue_ids
from performers.proteins.reading.similarity import (
    AMINO_ACIDS,
    AttentionSimilarity,
    embedding_similarity,
    load_reference_matrix,
    pair_ranks,
    top_pairs,
)
from tests.proteins.runs import make_model

FIRST = 5
"""Id of the first amino acid."""


def _similarity(threshold: float = 0.1) -> AttentionSimilarity:
    return AttentionSimilarity(build_protein_tokenizer(closed=True), threshold=threshold)


def _batch(
    batch: int = 2, layers: int = 2, heads: int = 3, length: int = 40, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Framed sequences with every amino acid and an X, the second one padded; peaky attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(FIRST, FIRST + 21, (batch, length), generator=generator)
    tokens[0, 1:21] = torch.arange(FIRST, FIRST + 20)
    tokens[:, 0] = 1
    tokens[0, -1] = 2
    tokens[1:, -6] = 2
    tokens[1:, -5:] = 0
    mask = (tokens != 0).long()
    attentions = []
    for _ in range(layers):
        scores = 2 * torch.randn(batch, heads, length, length, generator=generator)
        attentions.append(scores.masked_fill(mask[:, None, None] == 0, -math.inf).softmax(-1))
    return tokens, mask, attentions


def _shares_by_hand(
    tokens: torch.Tensor, attentions: list[torch.Tensor], threshold: float
) -> np.ndarray:
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


@pytest.mark.parametrize("thresholded", [False, True])
def test_shares_and_similarity_match_the_definition(thresholded: bool) -> None:
    tokens, mask, attentions = _batch()
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    expected = _shares_by_hand(tokens, attentions, 0.1 if thresholded else -1.0)
    np.testing.assert_allclose(similarity.shares(thresholded=thresholded), expected, rtol=1e-5)
    matrix = similarity.similarity(thresholded=thresholded)
    np.testing.assert_allclose(matrix, np.corrcoef(expected.T), atol=1e-4)
    np.testing.assert_array_equal(matrix, matrix.T)
    assert similarity.heads(thresholded=thresholded) == 6
    assert similarity.sequences == 2


def test_batches_add_up_to_the_whole() -> None:
    tokens, mask, attentions = _batch(batch=4)
    whole, parts = _similarity(), _similarity()
    whole.update(tokens, mask, attentions)
    for rows in (slice(0, 1), slice(1, 4)):
        parts.update(tokens[rows], mask[rows], [weights[rows] for weights in attentions])
    for kind in (False, True):
        np.testing.assert_allclose(
            parts.shares(thresholded=kind), whole.shares(thresholded=kind), rtol=1e-12
        )
    np.testing.assert_array_equal(parts.occurrences, whole.occurrences)


def test_padding_content_is_irrelevant() -> None:
    tokens, mask, attentions = _batch()
    clean, dirty = _similarity(), _similarity()
    clean.update(tokens, mask, attentions)
    tokens = tokens.clone()
    tokens[1, -5:] = FIRST
    attentions = [weights.clone() for weights in attentions]
    for weights in attentions:
        weights[1, :, -5:, :] = math.nan
        weights[1, :, :, -5:] = 7.0
    dirty.update(tokens, mask, attentions)
    np.testing.assert_array_equal(dirty.shares(), clean.shares())
    np.testing.assert_array_equal(dirty.occurrences, clean.occurrences)


def test_frequency_of_an_amino_acid_does_not_enter() -> None:
    tokens, mask, attentions = _batch()
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    enrichment = similarity.shares() / (similarity.occurrences / similarity.occurrences.sum())
    np.testing.assert_allclose(similarity.similarity(), np.corrcoef(enrichment.T), atol=1e-9)


def test_planted_blosum_is_found_and_shuffled_labels_are_not() -> None:
    reference = load_reference_matrix("BLOSUM62", AMINO_ACIDS)
    values, vectors = np.linalg.eigh(reference)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    preference = np.random.default_rng(0).normal(size=(64, 20)) @ root.T / 4
    tokens = torch.arange(FIRST, FIRST + 20).repeat(3)[None]
    mask = torch.ones_like(tokens)

    def compare(by_head: np.ndarray):
        similarity = _similarity()
        rows = torch.from_numpy(by_head[:, np.tile(np.arange(20), 3)])
        weights = rows.softmax(-1)[None, :, None, :].expand(1, 64, 60, 60)
        similarity.update(tokens, mask, [weights])
        return similarity, similarity.compare()

    similarity, found = compare(preference)
    assert found.pearson > 0.6
    assert found.spearman > 0.5
    assert found.p_value == pytest.approx(1e-4)
    assert found.pairs == 190
    assert found.note == ""
    assert similarity.notes() == []
    order = np.random.default_rng(1).permutation(20)
    _, shuffled = compare(preference[:, order])
    assert shuffled.p_value > 0.05


def test_top_pairs_are_the_largest_off_the_diagonal() -> None:
    tokens, mask, attentions = _batch()
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    matrix = similarity.similarity()
    pairs = similarity.top_pairs(190)
    assert len(similarity.top_pairs(5)) == 5
    assert len({frozenset(pair[:2]) for pair in pairs}) == 190
    assert [p.similarity for p in pairs] == sorted((p.similarity for p in pairs), reverse=True)
    first, second, value = pairs[0]
    assert value == matrix[AMINO_ACIDS.index(first), AMINO_ACIDS.index(second)]


def test_half_precision_attention_is_summed_in_full() -> None:
    tokens, mask, attentions = _batch(length=64)
    full, half = _similarity(), _similarity()
    full.update(tokens, mask, attentions)
    half.update(tokens, mask, [weights.bfloat16() for weights in attentions])
    np.testing.assert_allclose(half.shares(), full.shares(), rtol=5e-3)


def test_amino_acid_that_never_occurs_is_left_out_and_named() -> None:
    tokens, mask, attentions = _batch()
    tokens = torch.where(tokens == FIRST + AMINO_ACIDS.index("W"), FIRST, tokens)
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    matrix = similarity.similarity()
    tryptophan = AMINO_ACIDS.index("W")
    assert np.isnan(matrix[tryptophan]).all()
    assert np.isfinite(np.delete(np.delete(matrix, tryptophan, 0), tryptophan, 1)).all()
    assert similarity.compare(permutations=9).pairs == 171
    assert [note for note in similarity.notes() if note.endswith(": W.")]


def test_head_without_attention_above_the_threshold_is_left_out_and_named() -> None:
    tokens, mask, attentions = _batch(heads=4)
    attentions[1][:, 2] = 0.01
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    assert similarity.heads(thresholded=True) == 7
    assert np.isfinite(similarity.similarity(thresholded=True)).all()
    assert "1 of 8 heads" in similarity.notes(thresholded=True)[0]
    assert "2.3" in similarity.notes(thresholded=True)[0]
    assert similarity.notes() == []


def test_head_with_nan_attention_is_left_out() -> None:
    tokens, mask, attentions = _batch(heads=4)
    attentions[0][0, 1, 3, 3] = math.nan
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    assert similarity.heads() == 7
    assert np.isfinite(similarity.similarity()).all()


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (1, 2), (2, 1)])
def test_too_few_heads_give_nan_and_a_sentence(layers: int, heads: int) -> None:
    tokens, mask, attentions = _batch(layers=layers, heads=heads)
    similarity = _similarity()
    similarity.update(tokens, mask, attentions)
    assert np.isnan(similarity.similarity()).all()
    assert math.isnan(similarity.compare().pearson)
    assert similarity.top_pairs() == []
    assert "at least 3" in similarity.notes()[-1]


def test_heads_that_all_attend_evenly_have_no_similarity() -> None:
    tokens, mask, attentions = _batch()
    similarity = _similarity()
    similarity.update(tokens, mask, [torch.full_like(weights, 0.025) for weights in attentions])
    assert np.isnan(similarity.similarity()).all()
    assert "same share" in similarity.notes()[0]
    assert math.isnan(similarity.compare(thresholded=True).p_value)


def test_nothing_recorded_is_said() -> None:
    similarity = _similarity()
    assert np.isnan(similarity.similarity()).all()
    assert similarity.heads() == 0
    assert similarity.notes() == ["No attention was recorded, so there is no similarity."]


def test_bad_arguments_are_named() -> None:
    tokens, mask, attentions = _batch()
    similarity = _similarity()
    with pytest.raises(ValueError, match="attentions"):
        similarity.update(tokens, mask, [])
    with pytest.raises(ValueError, match="layer 2"):
        similarity.update(tokens, mask, [attentions[0], attentions[1][:, :, :-1]])
    similarity.update(tokens, mask, attentions)
    with pytest.raises(ValueError, match="same heads"):
        similarity.update(tokens, mask, attentions[:1])
    with pytest.raises(ValueError, match="threshold"):
        _similarity(threshold=1.0)


def test_tokenizer_without_amino_acids_is_refused() -> None:
    vocabulary = {"<unk>": 0, "<pad>": 1, "A": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(ValueError, match="C, D"):
        AttentionSimilarity(tokenizer)


def test_pairs_are_ranked_among_all_that_have_a_similarity() -> None:
    similarity = _similarity()
    tokens, mask, attentions = _batch(layers=3)
    similarity.update(tokens, mask, attentions)
    every = similarity.top_pairs(190)
    ranked = similarity.pair_ranks([f"{pair.second}{pair.first}" for pair in every])
    assert [pair.rank for pair in ranked] == list(range(1, 191))
    assert {pair.of for pair in ranked} == {190}
    assert [pair.similarity for pair in ranked] == [pair.similarity for pair in every]
    assert [f"{p.first}{p.second}" for p in similarity.pair_ranks()] == ["DE", "FY", "IV", "KR"]


def test_a_pair_without_a_similarity_has_no_rank() -> None:
    similarity = _similarity()
    tokens, mask, attentions = _batch(layers=3)
    # Tryptophan, the 19th amino acid, never occurs.
    similarity.update(tokens.masked_fill(tokens == FIRST + 18, FIRST), mask, attentions)
    missing, there = similarity.pair_ranks(["FW", "DE"])
    assert missing.rank is None
    assert math.isnan(missing.similarity)
    assert there.rank is not None
    assert missing.of == there.of == 171


def test_embeddings_are_compared_without_their_mean() -> None:
    model, tokenizer = make_model()
    ids = residue_ids(tokenizer, AMINO_ACIDS)
    generator = np.random.default_rng(0)
    factors = np.linalg.cholesky(_positive(load_reference_matrix("BLOSUM62", AMINO_ACIDS)))
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[ids] = torch.tensor(factors[:, :16], dtype=torch.float32)
    before = embedding_similarity(model, tokenizer)
    vectors = factors[:, :16] - factors[:, :16].mean(0)
    np.testing.assert_allclose(before, np.corrcoef(np.c_[vectors, -vectors]), atol=1e-5)
    with torch.no_grad():
        weight[ids] += torch.tensor(generator.normal(0, 5, 16), dtype=torch.float32)
    np.testing.assert_allclose(embedding_similarity(model, tokenizer), before, atol=1e-4)


def test_one_that_lies_at_the_mean_has_no_similarity() -> None:
    model, tokenizer = make_model()
    ids = residue_ids(tokenizer, AMINO_ACIDS)
    weight = model.get_input_embeddings().weight
    weight.data[ids] = 0
    weight.data[ids[1], 0], weight.data[ids[2], 0] = 1, -1
    similarity = embedding_similarity(model, tokenizer)
    assert similarity[1, 2] == -1
    assert np.isnan(similarity[0]).all()
    assert np.isnan(similarity[:, 3]).all()
    assert [(p.first, p.second) for p in top_pairs(similarity)] == [tuple(AMINO_ACIDS[1:3])]
    known, unknown = pair_ranks(similarity, (AMINO_ACIDS[1:3], AMINO_ACIDS[:2]))
    assert (known.rank, known.of) == (1, 1)
    assert unknown.rank is None


def _positive(matrix: np.ndarray) -> np.ndarray:
    """The nearest matrix of inner products, and a little more."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0.1)) @ vectors.T
