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


@pytest.fixture(scope="module")
def computed():
    """A model with its tokenizer, sequences, all their features and the steps reported."""
    model, sequences, seen = make_model(), [*proteins(6), "M" * 300], []
    found = probe_features(
        *model, sequences, report=lambda name, done, total, log: seen.append((name, total))
    )
    dense = {name: x if isinstance(x, np.ndarray) else x.toarray() for name, x in found.items()}
    return model, sequences, dense, set(seen)


def test_features_come_in_the_order_asked_for(computed):
    model, sequences, found, seen = computed
    assert tuple(found) == PROBE_FEATURES
    assert [matrix.shape for matrix in found.values()] == [(7, n) for n in (17, 17, 21, 401, 8001)]
    np.testing.assert_array_equal(found["embeddings"][:, :-1], embed_sequences(*model, sequences))
    assert seen == {("computing embeddings", 7), ("computing random-weights", 7)}
    chosen = probe_features(*model, sequences, features=["composition", "embeddings"])
    assert list(chosen) == ["composition", "embeddings"]


def test_all_features_know_the_length(computed):
    """Without it the mean of residues is behind what merely counts letters, or the reverse."""
    _, sequences, found, _ = computed
    expected = np.log([len(sequence) / 300 for sequence in sequences])
    for name, matrix in found.items():
        np.testing.assert_allclose(matrix[:, -1], expected, atol=1e-6, err_msg=name)
    assert np.isfinite(log_lengths([""])).all()


def test_words_are_square_roots_of_shares(computed):
    _, sequences, found, _ = computed
    for k, name in enumerate(("composition", "dipeptides", "tripeptides"), start=1):
        shares = kmer_frequencies(sequences, k)
        shares = shares.toarray() if k == 3 else shares
        np.testing.assert_allclose(found[name][:, :-1] ** 2, shares, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(found[name][:, :-1], axis=1), 1.0, atol=1e-6)


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
