"""A model's attention over proteins: maps, scores, similarity."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import build_protein_tokenizer
from performers.proteins.reading.analysis import analyse_model

TOKENIZER = build_protein_tokenizer(closed=True)
PROTEIN = ProteinRecord("P1", "a protein", "MKTAYIAKQRXQISFVKSHFSRQ")


def bert(attention="eager", **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(
        BertConfig(
            **{**sizes, **options},
            vocab_size=31,
            intermediate_size=16,
            initializer_range=0.5,
            max_position_embeddings=64,
            attn_implementation=attention,
        )
    )


def sequences(count, shortest=5, longest=90):
    generator = np.random.default_rng(0)
    letters = list("ACDEFGHIKLMNPQRSTVWY")
    lengths = generator.integers(shortest, longest, count)
    return ["".join(generator.choice(letters, size=length)) for length in lengths]


def test_maps_are_the_attention_of_the_model_between_residues():
    model = bert()
    analysis = analyse_model(model, TOKENIZER, sequences(3), protein=PROTEIN)
    assert analysis.labels == PROTEIN.sequence
    assert analysis.problem == ""
    tokens = TOKENIZER(PROTEIN.sequence, return_tensors="pt")
    with torch.no_grad():
        expected = model.eval()(**tokens, output_attentions=True).attentions
    assert len(analysis.maps) == 2
    for drawn, weights in zip(analysis.maps, expected, strict=True):
        np.testing.assert_allclose(drawn, weights[0, :, 1:-1, 1:-1].numpy(), atol=1e-6)
    assert len(analysis.scores.heads) == 8


def test_crops_to_the_length_asked_for_and_to_the_positions_of_the_model():
    protein = ProteinRecord("long", "", "ACDEFGHIKL" * 10)
    drawn = sequences(10)
    asked = analyse_model(bert(), TOKENIZER, drawn, protein=protein, max_length=30)
    assert len(asked.labels) == 28
    assert asked.cropped == sum(len(sequence) > 28 for sequence in drawn)
    assert asked.similarity["all"].occurrences.sum() == sum(min(len(s), 28) for s in drawn)
    limited = analyse_model(bert(), TOKENIZER, drawn, protein=protein, max_length=4096)
    assert limited.max_length == 64
    assert len(limited.labels) == 62


def test_reports_progress_and_leaves_the_model_as_it_was():
    model = bert().train()
    seen: list[tuple[int, int]] = []
    analyse_model(
        model,
        TOKENIZER,
        sequences(5),
        protein=PROTEIN,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(4, 5), (5, 5)]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyse_model(model, TOKENIZER, sequences(5), protein=PROTEIN, progress=stop)
    assert model.training


def test_causal_attention_is_measured_against_causal_uniform_attention():
    both, causal = (
        analyse_model(bert(is_decoder=flag), TOKENIZER, ["MK"], protein=PROTEIN).scores
        for flag in (False, True)
    )
    length = len(PROTEIN.sequence)
    assert both.uniform.mean_distance == pytest.approx((length**2 - 1) / (3 * length))
    assert causal.uniform.mean_distance == pytest.approx((length - 1) / 4)


def test_so_many_sequences_are_drawn():
    analysis = analyse_model(bert(), TOKENIZER, sequences(20), protein=PROTEIN, max_sequences=4)
    assert (analysis.sequences, analysis.available) == (4, 20)


def test_what_cannot_be_read_is_told():
    fused = analyse_model(bert("sdpa"), TOKENIZER, sequences(3), protein=PROTEIN)
    assert "no attention weights" in fused.problem
    assert (fused.maps, fused.scores, fused.similarity) == ((), None, {})
