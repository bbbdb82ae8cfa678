"""Sequences and models that ship: as the manifest says, split honestly, better than guessing."""

import gzip
import hashlib
import json
import re
from collections import Counter

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

DATA = pretrained_folder().parent
MANIFEST = json.loads((DATA / "manifest.json").read_text())
HEADER = re.compile(r">([A-Z0-9]+) family=([A-Z0-9]+)")
MODELS = (PRETRAINED, READS_RELATIVES)


def read(split):
    """[(accession, family, sequence)], by a parser that owes nothing to the package."""
    records = []
    for record in gzip.decompress(embedded_fasta(split).read_bytes()).decode().split("\n>"):
        header, _, body = record.partition("\n")
        match = HEADER.fullmatch(">" + header.removeprefix(">"))
        assert match, header
        lines = body.split()
        assert all(len(line) == 60 for line in lines[:-1])
        assert 1 <= len(lines[-1]) <= 60
        records.append((match[1], match[2], "".join(lines)))
    return records


@pytest.fixture(scope="module")
def records():
    return {split: read(split) for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_files_match_the_manifest(split, records):
    entry = MANIFEST["splits"][split]
    assert embedded_fasta(split).name == entry["file"] == f"{split}.fasta.gz"
    raw = embedded_fasta(split).read_bytes()
    assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
    assert hashlib.sha256(gzip.decompress(raw)).hexdigest() == entry["fasta_sha256"]
    # Neither a name (flag 8) nor a date: the same text gives the same bytes.
    assert raw[3] == 0
    assert raw[4:8] == bytes(4)
    assert len(records[split]) == entry["sequences"]
    assert sum(len(sequence) for _, _, sequence in records[split]) == entry["residues"]
    assert len({family for _, family, _ in records[split]}) == entry["families"]
    letters = set().union(*(sequence for _, _, sequence in records[split]))
    assert letters <= set("ACDEFGHIKLMNPQRSTVWYXBZUOJ")


def test_no_sequence_or_accession_occurs_twice(records):
    everything = [record for split in SPLITS for record in records[split]]
    for column in (0, 2):
        [(_, most)] = Counter(record[column] for record in everything).most_common(1)
        assert most == 1


def test_splits_share_families_and_ood_has_its_own(records):
    families = {split: {family for _, family, _ in records[split]} for split in SPLITS}
    assert families["train"] == families["validation"] == families["test"]
    assert not families["ood"] & families["train"]
    assert len(families["ood"]) >= 4
    assert len(families["train"]) >= 12
    assert not families["ood"] & set(MANIFEST["ood_families_rejected"])


def test_each_family_is_split_80_10_10(records):
    counts = {split: Counter(family for _, family, _ in records[split]) for split in SPLITS[:3]}
    for family in counts["train"]:
        total = sum(counts[split][family] for split in SPLITS[:3])
        assert total >= MANIFEST["selection"]["min_members"]
        for split in ("validation", "test"):
            assert abs(counts[split][family] - total / 10) <= 0.5


def test_size_and_attribution(records):
    assert set(MANIFEST["splits"]) == set(SPLITS)
    assert sum(embedded_fasta(split).stat().st_size for split in SPLITS) < 1_400_000
    residues = {split: MANIFEST["splits"][split]["residues"] for split in SPLITS}
    assert 1_300_000 <= sum(residues.values()) <= 2_300_000
    assert 0.08 <= residues["ood"] / sum(residues.values()) <= 0.3
    readme = (DATA / "README.md").read_text()
    for words in ("UniProtKB/Swiss-Prot", "2014_01", "CC BY 4.0", "The UniProt Consortium"):
        assert words in readme


@pytest.fixture(scope="module", params=MODELS)
def shipped(request):
    return load_model(pretrained_folder(request.param))


@pytest.fixture(scope="module")
def sequences():
    records, _ = read_fasta(embedded_fasta("ood"))
    return [record.sequence for record in records[::160]]


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
def test_it_is_small_and_its_card_is_of_these_weights(name):
    folder = pretrained_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10e6
    card = (folder / "README.md").read_text(encoding="utf-8")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert re.search(rf"\b{digest}\b", card)


def test_an_installation_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("performers.proteins.embedded._DATA", tmp_path)
    for missing in (pretrained_folder, lambda: embedded_fasta("ood")):
        with pytest.raises(FileNotFoundError, match="reinstall performers"):
            missing()


def test_unknown_split_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"train, validation, test, ood; got 'dev'"):
        embedded_fasta("dev")
