"""Sequences and model that ship: paths, size, and better than guessing on proteins never seen."""

import gzip
import hashlib
import re

import pytest

from performers.proteins.embedded import SPLITS, embedded_fasta, pretrained_folder
from performers.proteins.inputs.fasta import read_fasta
from performers.proteins.model_folder import load_model
from performers.proteins.scoring.embedding import embed_sequences
from performers.proteins.scoring.evaluation import evaluate_model


@pytest.fixture(scope="module")
def shipped():
    return load_model(pretrained_folder())


@pytest.fixture(scope="module")
def sequences():
    records, _ = read_fasta(embedded_fasta("ood"))
    return [record.sequence for record in records[::80]]


def test_it_is_small():
    assert sum(path.stat().st_size for path in pretrained_folder().iterdir()) < 10e6


def test_it_predicts_better_than_frequencies(shipped, sequences):
    metrics = evaluate_model(*shipped, sequences, max_length=512)
    assert metrics["accuracy"] > metrics["baseline_accuracy"]
    assert metrics["perplexity"] < metrics["baseline_perplexity"]


def test_it_embeds_sequences_of_any_length(shipped):
    vectors = embed_sequences(*shipped, ["M", "MKV" * 10, "MKVLAADE" * 150])
    assert vectors.shape == (3, shipped[0].config.hidden_size)
    assert abs(vectors).max() < 100


def test_the_card_is_of_these_weights():
    folder = pretrained_folder()
    card = (folder / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"\b{digest}\b", card)


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("performers.proteins.embedded._DATA", tmp_path)
    for missing in (pretrained_folder, lambda: embedded_fasta("ood")):
        with pytest.raises(FileNotFoundError, match="reinstall performers"):
            missing()


@pytest.mark.parametrize("split", SPLITS)
def test_each_split_is_a_gzipped_fasta(split):
    path = embedded_fasta(split)
    assert path.name == f"{split}.fasta.gz"
    with gzip.open(path, "rt") as lines:
        assert next(lines).startswith(">")


def test_unknown_split_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"train, validation, test, ood; got 'dev'"):
        embedded_fasta("dev")
    with pytest.raises(ValueError, match="split must be one of"):
        embedded_fasta("../data/train")
