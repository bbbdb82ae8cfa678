"""``performers data``: corpora as streams, in parts, from the command line."""

import shutil

import pytest

from tests.cli.commands import refusal, run
from tests.proteins.corpus import stand_in
from tests.proteins.corpus.test_parts import trembl, uniref
from tests.proteins.corpus.test_shards import write_corpus

FRACTIONS = [f"--{split}-fraction=0.1" for split in ("validation", "test", "ood")]


@pytest.fixture(autouse=True)
def mmseqs(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(stand_in.install(tmp_path / "bin")), prepend=":")


def test_parts_and_the_whole(tmp_path):
    path = uniref(tmp_path)
    whole, lines = run("data", "uniref50", path, "--output", tmp_path / "whole", *FRACTIONS)
    assert "reading sequences" in lines
    parts = [tmp_path / "1", tmp_path / "2"]
    for part in parts:
        command = ["data", "uniref50", path, "--part", f"{part.name}/2", "--output", part]
        out, lines = run(*command, *FRACTIONS)
        assert out == ""
        assert lines[-1].startswith(f"part {part.name} of 2 is in ")
        assert "is not empty" in refusal(*command, *FRACTIONS)
        run(*command, *FRACTIONS, "--resume")
    merged = ["data", "merge", *parts, "--output", tmp_path / "merged"]
    assert run(*merged)[0] == whole
    assert "is not empty" in refusal(*merged)
    assert "the corpus is there already" in run(*merged, "--resume")[1]
    line = refusal("data", "merge", *parts, "--output", parts[0], "--resume")
    assert "is one of the parts" in line


def test_what_is_refused(tmp_path):
    path, table = trembl(tmp_path)
    out = ["--output", tmp_path / "out"]
    for arguments, words in (
        (["trembl", path], "--clusters is missing: TrEMBL's headers name no cluster"),
        (["trembl", path, "--clusters", table, "--part", "3/2"], "parts are counted from 1 to 2"),
        (["uniref50", tmp_path / "none"], "none does not exist"),
        (["uniref50", "-"], "- does not exist"),
        (["uniref50", path, "--part", "1/2"], "the record S000 names no cluster"),
        (["trembl", path, "--clusters", tmp_path / "no"], "is no file; check the path"),
    ):
        assert words in refusal("data", *arguments, *out)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_relatives_are_found_for_each_protein(tmp_path):
    """In the stand-in for mmseqs, relatives begin or end with the same four residues."""
    proteins = tmp_path / "proteins.fasta"
    proteins.write_text(">sp|P1|A one\nMKTAYIAKQR\n>P2\nGGGGSSSS\n>P3\nCCCCWWWW\n")
    others = {
        "same": "MKTAYIAKQR",
        "part": "MKTAYIA",
        "near": "MKTAVIAKHR",
        "far": "LLLLAKQR",
        "other": "GGGGTTTT",
        "none": "HHHHHHHH",
    }
    split = [*others.items()]
    corpus = write_corpus(tmp_path / "corpus", {"train": split[:4], "test": split[4:]})
    out = tmp_path / "relatives.fasta"
    command = ["data", "relatives", proteins, "--among", corpus, "--output", out]
    _, lines = run(*command)
    found = [">near family=sp|P1|A", ">far family=sp|P1|A residues=1-8", ">other family=P2"]
    assert [line for line in out.read_text().splitlines() if line[0] == ">"] == found
    # Of P1's ten residues it lacks the first two.
    assert out.read_text().splitlines()[3] == "XXLLLLAKQR"
    assert f"3 relatives in {out}" in lines
    assert "no relative of 1: P3; leave them out of what reads relatives" in lines
    more = tmp_path / "more.fasta"
    more.write_text(">near\nMKTAVVVV\n>copy\nMKTAVIAKHR\n>long\nGGHHIIKKLLMMAKQR\n")
    run(*command, "--among", more)
    lines = out.read_text().splitlines()
    long = ">long family=sp|P1|A residues=7-16"
    assert [line for line in lines if line[0] == ">"] == [*found[:2], found[0], long, found[2]]
    assert lines[lines.index(long) + 1] == "KKLLMMAKQR"
    run(*command, "--among", more, "--most", 1)
    assert [line for line in out.read_text().splitlines() if line[0] == ">"] == found[::2]
    assert "none does not exist" in refusal(*command, "--among", tmp_path / "none")
    proteins.write_text(proteins.read_text() + ">P2\nAAAA\n")
    _, lines = run(*command, code=2)
    assert "'P2' is the name of several proteins" in lines[-1]


def test_relatives_stand_beside_the_residues_that_they_are_aligned_with(tmp_path):
    """The stand-in aligns nothing with ``W``."""
    proteins, others, out = (tmp_path / f"{name}.fasta" for name in ("p", "others", "out"))
    proteins.write_text(">P4\nDDDDEWEEE\n")
    others.write_text(">less\nDDDDFFFFGG\n>more\nDDDDWEGEEE\n")
    run("data", "relatives", proteins, "--among", others, "--output", out)
    assert out.read_text().splitlines() == [
        ">less family=P4 residues=1-8",
        "DDDDFXFFF",
        ">more family=P4 residues=1-9",
        "DDDDEXGEE",
    ]
