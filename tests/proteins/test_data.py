"""The committed sequences are the ones the manifest describes, and their splits are honest."""

import gzip
import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "src" / "performers" / "proteins" / "data"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
SHARED = ("train", "validation", "test")
SPLITS = (*SHARED, "ood")
HEADER = re.compile(r">([A-Z0-9]+) family=([A-Z0-9]+)")


def read(split):
    """[(accession, family, sequence)], by a parser that owes nothing to the package."""
    records = []
    for record in gzip.decompress((DATA / f"{split}.fasta.gz").read_bytes()).decode().split("\n>"):
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
    raw = (DATA / entry["file"]).read_bytes()
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
    counts = {split: Counter(family for _, family, _ in records[split]) for split in SHARED}
    for family in counts["train"]:
        total = sum(counts[split][family] for split in SHARED)
        assert total >= MANIFEST["selection"]["min_members"]
        for split in ("validation", "test"):
            assert abs(counts[split][family] - total / 10) <= 0.5


def test_size_and_attribution(records):
    assert set(MANIFEST["splits"]) == set(SPLITS)
    assert sum((DATA / f"{split}.fasta.gz").stat().st_size for split in SPLITS) < 1_400_000
    residues = {split: MANIFEST["splits"][split]["residues"] for split in SPLITS}
    assert 1_300_000 <= sum(residues.values()) <= 2_300_000
    assert 0.08 <= residues["ood"] / sum(residues.values()) <= 0.3
    readme = (DATA / "README.md").read_text()
    for words in ("UniProtKB/Swiss-Prot", "2014_01", "CC BY 4.0", "The UniProt Consortium"):
        assert words in readme
