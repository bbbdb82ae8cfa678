"""Scores are the log-probabilities of the model itself, computed another way."""

import math

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import Relatives
from performers.proteins.inputs.tokenizer import AMINO_ACIDS, encode_sequences, residue_ids
from performers.proteins.scoring.likelihood import score_sequences
from tests.proteins.runs import log_probabilities, make_model

SEQUENCES = ["MKTAYIA", "W", "MXK"]
OTHERS = ["MKTAYLAKQK", "MRTAIARQ"]
COVERED = pytest.mark.parametrize(("batch_tokens", "others"), [(1, []), (22, []), (100, OTHERS)])


def read(model, tokenizer, tokens, others):
    """Log-probabilities at a protein's tokens, after relatives, in a row laid out by hand."""
    pieces = [*(encode_sequences(tokenizer, others)[::-1] if others else []), tokens]
    positions = np.concatenate([np.arange(len(piece)) for piece in pieces])
    found = log_probabilities(model, np.concatenate(pieces), positions if others else None)
    return found[-len(tokens) :].numpy()


def scores_of(model, tokenizer, sequences, others, **options):
    if others:
        records = [[ProteinRecord("x", "", x) for x in part] for part in (others, sequences)]
        options["relatives"] = Relatives(records[0], tokenizer, 100).rows(records[1])
    return score_sequences(model, tokenizer, sequences, substitutions=True, **options)


@COVERED
def test_a_masked_model_hides_one_residue_at_a_time(batch_tokens, others):
    model, tokenizer = make_model(position_window=1) if others else make_model()
    scores, one_pass = (
        scores_of(model, tokenizer, SEQUENCES, others, method=method, batch_tokens=batch_tokens)
        for method in (None, "one-pass")
    )
    ids = residue_ids(tokenizer, AMINO_ACIDS)
    for sequence, score, seen in zip(SEQUENCES, scores, one_pass, strict=True):
        tokens = encode_sequences(tokenizer, [sequence])[0].astype(np.int64)
        for place, residue in enumerate(sequence):
            hidden = tokens.copy()
            hidden[place + 1] = tokenizer.mask_token_id
            for found, row in ((score, hidden), (seen, tokens)):
                expected = read(model, tokenizer, row, others)[place + 1]
                own = expected[tokens[place + 1]]
                assert found.log_likelihoods[place] == pytest.approx(own, abs=1e-4)
                odds = expected[ids] - own if residue in AMINO_ACIDS else np.full(20, np.nan)
                np.testing.assert_allclose(found.log_odds[place], odds, atol=2e-4)


@COVERED
def test_a_causal_model_is_exact_and_compares_whole_proteins(batch_tokens, others):
    model, tokenizer = make_model("clm")
    seen = []
    options = {"batch_tokens": batch_tokens, "progress": lambda *done: seen.append(done)}
    scores = scores_of(model, tokenizer, SEQUENCES, others, **options)

    def log_likelihoods(sequence):
        tokens = encode_sequences(tokenizer, [sequence])[0].astype(np.int64)
        predicted = read(model, tokenizer, tokens, others)
        return predicted[np.arange(len(sequence)), tokens[1:-1]]

    for sequence, score in zip(SEQUENCES, scores, strict=True):
        expected = log_likelihoods(sequence)
        np.testing.assert_allclose(score.log_likelihoods, expected, atol=1e-4)
        assert score.log_likelihood == pytest.approx(sum(expected), abs=1e-3)
        assert score.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-3)
        for place, odds in enumerate(score.log_odds):
            mutants = [sequence[:place] + letter + sequence[place + 1 :] for letter in AMINO_ACIDS]
            odds_by_hand = [log_likelihoods(mutant).sum() - expected.sum() for mutant in mutants]
            if sequence[place] not in AMINO_ACIDS:
                odds_by_hand = np.full(20, np.nan)
            np.testing.assert_allclose(odds, odds_by_hand, atol=2e-4)
    assert seen[-1] == (sum(map(len, SEQUENCES)),) * 2


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
