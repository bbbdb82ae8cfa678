"""Scores are the log-probabilities of the model itself, computed another way."""

import math

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences, residue_ids
from performers.proteins.scoring.likelihood import score_sequences
from tests.proteins.runs import log_probabilities, make_model

SEQUENCES = ["MKTAYIA", "W", "MXK"]


@pytest.mark.parametrize("batch_tokens", [1, 22])
def test_a_causal_model_is_exact(batch_tokens):
    model, tokenizer = make_model("clm")
    seen = []
    scores = score_sequences(
        model,
        tokenizer,
        SEQUENCES,
        batch_tokens=batch_tokens,
        progress=lambda *done: seen.append(done),
    )
    for sequence, score in zip(SEQUENCES, scores, strict=True):
        tokens = encode_sequences(tokenizer, [sequence])[0].tolist()
        expected = [
            float(log_probabilities(model, tokens[: n + 1])[-1, tokens[n + 1]])
            for n in range(len(sequence))
        ]
        np.testing.assert_allclose(score.log_likelihoods, expected, atol=1e-4)
        assert score.log_likelihood == pytest.approx(sum(expected), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-3)
    assert seen[-1] == (sum(map(len, SEQUENCES)),) * 2


@pytest.mark.parametrize("batch_tokens", [1, 22])
def test_a_masked_model_hides_one_residue_at_a_time(batch_tokens):
    model, tokenizer = make_model()
    options = {"substitutions": True, "batch_tokens": batch_tokens}
    scores = score_sequences(model, tokenizer, SEQUENCES, **options)
    one_pass = score_sequences(model, tokenizer, SEQUENCES, method="one-pass", **options)
    ids = residue_ids(tokenizer, AMINO_ACIDS)
    for sequence, score, seen in zip(SEQUENCES, scores, one_pass, strict=True):
        tokens = encode_sequences(tokenizer, [sequence])[0].astype(np.int64)
        for place, residue in enumerate(sequence):
            hidden = tokens.copy()
            hidden[place + 1] = tokenizer.mask_token_id
            for found, row in ((score, hidden), (seen, tokens)):
                expected = log_probabilities(model, row)[place + 1]
                own = float(expected[tokens[place + 1]])
                assert found.log_likelihoods[place] == pytest.approx(own, abs=1e-4)
                odds = (
                    expected[ids].numpy() - own if residue in AMINO_ACIDS else np.full(20, np.nan)
                )
                np.testing.assert_allclose(found.log_odds[place], odds, atol=1e-4)


def test_substitutions_of_a_causal_model_compare_whole_proteins():
    model, tokenizer = make_model("clm")
    sequence = "MKX"
    options = {"batch_tokens": 30}
    (score,) = score_sequences(model, tokenizer, [sequence], substitutions=True, **options)
    assert score.log_odds.shape == (3, 20)
    assert np.isnan(score.log_odds[2]).all()
    for place in (0, 1):
        mutants = [sequence[:place] + letter + sequence[place + 1 :] for letter in AMINO_ACIDS]
        expected = [
            mutant.log_likelihood - score.log_likelihood
            for mutant in score_sequences(model, tokenizer, mutants)
        ]
        np.testing.assert_allclose(score.log_odds[place], expected, atol=1e-4)
        assert score.log_odds[place][AMINO_ACIDS.index(sequence[place])] == 0


def test_what_cannot_be_scored_is_refused():
    causal, masked = make_model("clm"), make_model()
    with pytest.raises(UserError, match=r"^method is for masked models"):
        score_sequences(*causal, ["MK"], method="masked")
    with pytest.raises(UserError, match=r"^method must be one of masked, one-pass"):
        score_sequences(*masked, ["MK"], method="fast")
    with torch.no_grad():
        masked[0].lm_head.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        score_sequences(*masked, ["MK"])
