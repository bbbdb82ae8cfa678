"""The public module: load, embed, score."""

from functools import cache

import numpy as np
import pytest
import torch

from performers import proteins as public
from performers.app.errors import UserError
from performers.proteins import model as module
from performers.proteins.scoring.embedding import embed_residues, embed_sequences
from tests.proteins.runs import make_model, make_model_folder, proteins


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("models") / "masked")


def test_a_loaded_model_embeds_and_scores(folder):
    model = public.load(folder, device="cpu")
    sequences = proteins(4)
    both = model.network, model.tokenizer
    np.testing.assert_array_equal(model.embed(sequences), embed_sequences(*both, sequences))
    records = [public.ProteinRecord("a", "", sequences[0])]
    (residues,) = model.embed(records, per_residue=True)
    np.testing.assert_array_equal(residues, *embed_residues(*both, sequences[:1]))
    (score,) = model.score([sequences[0].lower()], substitutions=True)
    assert score.log_odds.shape == (len(sequences[0]), 20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_model_computes_in_another_type(folder, dtype):
    sequences = proteins(3)
    model = public.load(folder, dtype=dtype)
    assert model.network.dtype == getattr(torch, dtype)
    exact = public.load(folder)
    vectors = model.embed(sequences)
    assert vectors.dtype == np.float32
    tolerance = 1e-4 if dtype == "float64" else 0.1
    np.testing.assert_allclose(vectors, exact.embed(sequences), atol=tolerance)
    (score,), (expected,) = model.score(sequences[:1]), exact.score(sequences[:1])
    assert score.mean == pytest.approx(expected.mean, abs=tolerance)


def test_the_model_that_ships_is_loaded_once(folder, monkeypatch):
    loaded = []

    def load():
        loaded.append(public.load(folder))
        return loaded[-1]

    monkeypatch.setattr(module, "load", load)
    monkeypatch.setattr(module, "_shipped", cache(module._shipped.__wrapped__))
    np.testing.assert_array_equal(public.embed(["MK"]), public.embed(["MK"]))
    assert public.score(["MK"])[0].log_likelihoods.shape == (2,)
    assert len(loaded) == 1


def test_what_cannot_be_read_is_refused(folder):
    model = public.load(folder)
    for wrong, words in ((["MK", "M-K"], r"proteins\[1\]"), ("MK", "one string"), ([], "none")):
        with pytest.raises(ValueError, match=words):
            model.embed(wrong)
    with pytest.raises(UserError, match=r"^device gpu is not available .* devices here are cpu"):
        public.load(folder, device="gpu")
    with pytest.raises(UserError, match=r"^device meta is not available"):
        public.load(folder, device="meta")
    with pytest.raises(UserError, match=r"^dtype must be one of float32"):
        public.load(folder, dtype="int8")
    with pytest.raises(UserError, match=r"^pooling has no use with per_residue"):
        model.embed(["MK"], per_residue=True, pooling="mean-sd")
    with pytest.raises(AttributeError):
        public.nothing  # noqa: B018


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_a_network_in_training_mode_is_run_in_evaluation_mode(objective, tmp_path):
    network, tokenizer = make_model(objective, hidden_dropout_prob=0.5)
    model = public.ProteinModel(network, tokenizer, tmp_path)

    def results():
        (score,) = model.score(["MKTAY"], substitutions=True)
        return [
            *(model.embed(["MKTAY"]), *model.embed(["MKTAY"], per_residue=True)),
            *(score.log_likelihoods, score.log_odds),
        ]

    expected = results()
    frozen = network.train().base_model.layers[0].eval()
    for found, exact in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(found, exact)
    assert network.training, "the mode is given back"
    assert not frozen.training, "and that of each module"
