"""Sequences and models that ship: paths, sizes, and better than guessing."""

import gzip
import hashlib
import re

import pytest

from performers.proteins.embedded import (
    PRETRAINED,
    READS_RELATIVES,
    SPLITS,
    embedded_fasta,
    pretrained_folder,
)
from performers.proteins.inputs.fasta import read_fasta
from performers.proteins.inputs.relatives import Relatives
from performers.proteins.model_folder import load_model, reads_families
from performers.proteins.scoring.embedding import embed_sequences
from performers.proteins.scoring.evaluation import evaluate_model

MODELS = (PRETRAINED, READS_RELATIVES)


@pytest.fixture(scope="module", params=MODELS)
def shipped(request):
    return load_model(pretrained_folder(request.param))


@pytest.fixture(scope="module")
def sequences():
    records, _ = read_fasta(embedded_fasta("ood"))
    return [record.sequence for record in records[::160]]


@pytest.mark.parametrize("name", MODELS)
def test_it_is_small(name):
    assert sum(path.stat().st_size for path in pretrained_folder(name).iterdir()) < 10e6


def test_it_predicts_better_than_frequencies(shipped, sequences):
    metrics = evaluate_model(*shipped, sequences, max_length=512)
    assert metrics["accuracy"] > metrics["baseline_accuracy"]
    assert metrics["perplexity"] < metrics["baseline_perplexity"]


def test_it_embeds_sequences_of_any_length(shipped):
    vectors = embed_sequences(*shipped, ["M", "MKV" * 10, "MKVLAADE" * 150])
    assert vectors.shape == (3, shipped[0].config.hidden_size)
    assert abs(vectors).max() < 100


def test_relatives_tell_of_hidden_residues():
    """With three of them a model that reads them finds twice as many at least."""
    folder = pretrained_folder(READS_RELATIVES)
    assert reads_families(folder)
    model, tokenizer = load_model(folder)
    families = {}
    for record in read_fasta(embedded_fasta("ood"))[0]:
        families.setdefault(record.field("family"), []).append(record)
    proteins = [member for members in families.values() for member in members[:2]]
    others = [member for members in families.values() for member in members[4:7]]
    rows = Relatives(others, tokenizer, 1024).rows(proteins)
    sequences = [protein.sequence for protein in proteins]
    alone = evaluate_model(model, tokenizer, sequences, max_length=1024)
    read = evaluate_model(model, tokenizer, sequences, max_length=1024, relatives=rows)
    assert read["tokens"] == alone["tokens"]
    assert read["accuracy"] > 2 * alone["accuracy"]


@pytest.mark.parametrize("name", MODELS)
def test_the_card_is_of_these_weights(name):
    folder = pretrained_folder(name)
    card = (folder / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"\b{digest}\b", card)


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("performers.proteins.embedded._DATA", tmp_path)
    for missing in (
        pretrained_folder,
        lambda: pretrained_folder(READS_RELATIVES),
        lambda: embedded_fasta("ood"),
    ):
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
