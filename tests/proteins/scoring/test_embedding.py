"""One vector a sequence: the mean over its residues, alone or in a batch."""

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import encode_sequences
from performers.proteins.scoring.embedding import embed_residues, embed_sequences
from tests.proteins.runs import make_model, proteins


@pytest.mark.parametrize(
    ("objective", "attention"), [("mlm", "favor-softmax"), ("clm", "favor-relu"), ("mlm", "exact")]
)
def test_a_vector_is_the_mean_over_the_residues_of_the_last_layer(objective, attention):
    """And then their standard deviation, where it is asked for."""
    model, tokenizer = make_model(objective, attention=attention)
    sequences = [*proteins(15), "M", "XXBZ"]
    means = embed_sequences(model, tokenizer, sequences, batch_tokens=100)
    both = embed_sequences(model, tokenizer, sequences, pooling="mean-sd", batch_tokens=100)
    assert (means.shape, both.shape, means.dtype) == ((17, 16), (17, 32), np.float32)
    np.testing.assert_allclose(both[:, :16], means, atol=2e-5)
    for sequence, mean, spread in zip(sequences, means, both[:, 16:], strict=True):
        tokens = torch.from_numpy(encode_sequences(tokenizer, [sequence])[0])[None].long()
        with torch.no_grad():
            hidden = model.base_model(tokens).last_hidden_state[0, 1:-1].numpy()
        np.testing.assert_allclose(mean, hidden.mean(0), atol=2e-5)
        np.testing.assert_allclose(spread, hidden.std(0), atol=2e-5)
    assert (both[15, 16:] == 0).all(), "one residue has no spread"


def test_what_cannot_be_embedded_is_refused():
    model, tokenizer = make_model(position_embedding="learned", max_length=20)
    assert embed_sequences(model, tokenizer, ["M" * 18]).shape == (1, 16)
    with pytest.raises(UserError, match="cannot read 21"):
        embed_sequences(model, tokenizer, ["MK", "M" * 19])
    with pytest.raises(UserError, match=r"^pooling must be one of mean, mean-sd; got 'max'"):
        embed_sequences(model, tokenizer, ["MK"], pooling="max")


@pytest.mark.parametrize("pooling", ["mean", "mean-sd"])
def test_batching_does_not_matter(pooling):
    model, tokenizer = make_model()
    sequences = proteins(20)
    together, seen = embed_sequences(model, tokenizer, sequences, pooling=pooling), []
    one = {"batch_tokens": 1, "progress": lambda *done: seen.append(done)}
    apart = embed_sequences(model, tokenizer, sequences, pooling=pooling, **one)
    assert seen == sorted(set(seen))
    assert seen[-1] == (20, 20)
    np.testing.assert_allclose(together, apart, atol=2e-5)
    turned = embed_sequences(model, tokenizer, sequences[::-1], pooling=pooling)
    np.testing.assert_allclose(together, turned[::-1], atol=2e-5)
    assert len(np.unique(together.round(4), axis=0)) == 20


@pytest.mark.parametrize("attention", ["favor-softmax", "favor-relu"])
def test_a_protein_of_40000_residues_is_read_whole(attention):
    model, tokenizer = make_model(
        attention=attention, num_hidden_layers=1, num_features=16, hidden_size=8
    )
    titin = "".join(proteins(count=1, shortest=40_000, longest=40_000))
    (vector,) = embed_sequences(model, tokenizer, [titin])
    (changed,) = embed_sequences(model, tokenizer, [titin[:-5000] + "W" * 5000])
    assert np.isfinite(vector).all()
    assert np.abs(vector - changed).max() > 1e-4


def test_residues_of_a_layer_are_its_hidden_states():
    model, tokenizer = make_model()
    sequences = ["MKTAYIAK", "W"]
    for layer, state in ((0, 0), (-2, 1), (2, 2), (None, 2)):
        residues = embed_residues(model, tokenizer, sequences, layer=layer, batch_tokens=50)
        means = embed_sequences(model, tokenizer, sequences, layer=layer)
        for sequence, vectors, mean in zip(sequences, residues, means, strict=True):
            tokens = torch.from_numpy(encode_sequences(tokenizer, [sequence])[0])[None].long()
            with torch.no_grad():
                hidden = model.base_model(tokens, output_hidden_states=True).hidden_states[state]
            np.testing.assert_allclose(vectors, hidden[0, 1:-1].numpy(), atol=2e-5)
            np.testing.assert_allclose(vectors.mean(0), mean, atol=2e-5)
    with pytest.raises(UserError, match=r"^layer must be 0 .* to 2 .* got 3"):
        embed_residues(model, tokenizer, sequences, layer=3)
