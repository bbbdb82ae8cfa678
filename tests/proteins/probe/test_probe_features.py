"""Features of proteins: words of amino acids, embeddings, random weights."""

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.probe.features import (
    feature_notes,
    kmer_frequencies,
    log_lengths,
    probe_features,
    untrained,
)
from performers.proteins.probe.options import PROBE_FEATURES
from performers.proteins.scoring.embedding import embed_sequences
from tests.proteins.runs import make_model, proteins

ODD = ["MXKM", "A", "XX", "ACDACD", "LBZUOJL"]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_words_are_counted_as_by_hand(k):
    sequences = [*proteins(5), *ODD]
    found = kmer_frequencies(sequences, k)
    assert found.shape == (len(sequences), 20**k)
    dense = found.toarray() if k == 3 else found
    for row, sequence in zip(dense, sequences, strict=True):
        words = [sequence[i : i + k] for i in range(len(sequence) - k + 1)]
        words = [word for word in words if set(word) <= set(AMINO_ACIDS)]
        expected = np.zeros(20**k)
        for word in words:
            place = sum(AMINO_ACIDS.index(c) * 20 ** (k - 1 - i) for i, c in enumerate(word))
            expected[place] += 1 / len(words)
        np.testing.assert_allclose(row, expected, atol=1e-6)


def test_no_sequence_has_no_rows():
    assert kmer_frequencies([], 1).shape == (0, 20)
    assert kmer_frequencies([], 3).shape == (0, 8000)


def test_features_come_in_the_order_asked_for():
    model, tokenizer = make_model()
    sequences = proteins(6)
    seen = []
    found = probe_features(
        model,
        tokenizer,
        sequences,
        report=lambda name, done, total, log: seen.append((name, total)),
    )
    assert tuple(found) == PROBE_FEATURES
    np.testing.assert_array_equal(
        found["embeddings"][:, :-1], embed_sequences(model, tokenizer, sequences)
    )
    assert [matrix.shape for matrix in found.values()] == [
        (6, 17),
        (6, 17),
        (6, 21),
        (6, 401),
        (6, 8001),
    ]
    assert set(seen) == {("computing embeddings", 6), ("computing random-weights", 6)}
    chosen = probe_features(model, tokenizer, sequences, features=["composition", "embeddings"])
    assert list(chosen) == ["composition", "embeddings"]


def test_all_features_know_the_length():
    """Without it the mean of residues is behind what merely counts letters, or the reverse."""
    model, tokenizer = make_model()
    sequences = [*proteins(6), "M" * 300]
    expected = np.log([len(sequence) / 300 for sequence in sequences])
    for name, matrix in probe_features(model, tokenizer, sequences).items():
        dense = matrix if isinstance(matrix, np.ndarray) else matrix.toarray()
        np.testing.assert_allclose(dense[:, -1], expected, atol=1e-6, err_msg=name)
    assert np.isfinite(log_lengths([""])).all()


@pytest.mark.parametrize(("name", "k"), [("composition", 1), ("dipeptides", 2), ("tripeptides", 3)])
def test_words_are_square_roots_of_shares(name, k):
    model, tokenizer = make_model()
    sequences = [*proteins(5), "MKMKMKMK"]
    matrix = probe_features(model, tokenizer, sequences, features=[name])[name]
    shares = kmer_frequencies(sequences, k)
    if k == 3:
        matrix, shares = matrix.toarray(), shares.toarray()
    np.testing.assert_allclose(matrix[:, :-1] ** 2, shares, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(matrix[:, :-1], axis=1), 1.0, atol=1e-6)


def test_notes_say_what_the_features_are():
    notes = feature_notes(["embeddings", "random-weights"], seed=7)
    assert any("logarithm of the length" in note for note in notes)
    assert any("one draw of weights (seed 7)" in note for note in notes)
    assert len(feature_notes(["composition"])) == 1


def test_random_weights_are_the_seed_s_and_the_model_stays():
    model, _ = make_model("clm", attention="favor-relu")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = untrained(model, 1), untrained(model, 1), untrained(model, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(first) is type(model)
    assert not first.training
    ours, same, others = (m.state_dict() for m in (first, again, other))
    assert ours.keys() == before.keys()
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    name = next(name for name in ours if name.endswith("weight") and ours[name].ndim == 2)
    assert not torch.equal(ours[name], others[name])
    assert not torch.equal(ours[name], before[name])
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_embeddings_of_a_diverged_model_are_refused():
    model, tokenizer = make_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="embeddings hold values that are not finite"):
        probe_features(model, tokenizer, ["MK"])
