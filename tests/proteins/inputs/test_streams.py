"""Compressed FASTA files and standard input, whole and damaged."""

import bz2
import gzip
import io
import lzma
import os
import sys
import threading

import pytest
import zstandard

from performers.proteins.inputs.fasta import FastaError, LetterReport, iter_fasta, read_fasta
from performers.proteins.inputs.streams import rereadable
from tests.proteins.runs import proteins

TEXT = "".join(f">p{n}\n{letters}\n" for n, letters in enumerate(proteins(200))).encode()
COMPRESS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_files_are_read_like_plain_ones(tmp_path, kind):
    # Names do not tell.
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed.fasta"
    plain.write_bytes(TEXT)
    half = len(TEXT) // 2
    # Members one after another are one file.
    packed.write_bytes(COMPRESS[kind](TEXT[:half]) + COMPRESS[kind](TEXT[half:]))
    assert read_fasta(packed) == read_fasta(plain)


@pytest.mark.parametrize("kind", COMPRESS)
def test_damaged_files_are_refused(tmp_path, kind):
    path, whole = tmp_path / "x", COMPRESS[kind](TEXT)
    for length in (8, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FastaError, match=f"the {kind} data end too early; copy"):
            read_fasta(path)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    with pytest.raises(
        FastaError, match=f"the {kind} data (are corrupt|end too early)|illegal|bina"
    ):
        read_fasta(path)


@pytest.mark.parametrize("kind", COMPRESS)
def test_what_follows_is_refused_or_a_frame(tmp_path, kind):
    """Records of a later frame at fault do not vanish; zeros between frames are padding."""
    path, whole = tmp_path / "x", COMPRESS[kind](TEXT)
    path.write_bytes(whole + bytes(8) + whole + bytes(70_000) + whole)
    assert len(read_fasta(path)[0]) == 3 * TEXT.count(b">")
    for rest in (b"!" + whole[1:], b"rest"):
        path.write_bytes(whole + rest)
        with pytest.raises(FastaError, match=f"the {kind} data are corrupt"):
            read_fasta(path)
    path.write_bytes(whole + whole[:3])
    with pytest.raises(FastaError, match=f"the {kind} data end too early"):
        read_fasta(path)


def test_standard_input_is_named_and_left_open(monkeypatch):
    text = io.TextIOWrapper(io.BufferedReader(io.BytesIO(gzip.compress(b">a\nMKT\n>b\nM-K\n"))))
    monkeypatch.setattr(sys, "stdin", text)
    with pytest.raises(
        FastaError, match=r"^standard input:4: illegal letter '-' in the record 'b'"
    ):
        read_fasta("-")
    assert not text.closed


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_can_be_read_twice(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(lzma.compress(TEXT),))
    writer.start()
    with rereadable([pipe]) as ((copy, name),):
        writer.join()
        assert name == str(pipe)
        records = list(iter_fasta(copy))
        assert list(iter_fasta(copy)) == records
    assert not copy.exists()
    writer = threading.Thread(target=pipe.write_bytes, args=(lzma.compress(TEXT),))
    writer.start()
    assert read_fasta(pipe)[0] == records
    writer.join()


def test_records_at_fault_are_skipped_and_counted(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_text(">a\nmKT\n>b\nMK-\nL-L\n>empty\n>c\nM*\nK\n>\nMK\n>d\nAC*\n>e\n---\nMK\n>f\nMK")
    records, report = read_fasta(path, skip_invalid=True)
    assert [(r.name, r.sequence) for r in records] == [("a", "MKT"), ("d", "AC"), ("f", "MK")]
    assert (report.records, report.residues, report.lower_case) == (3, 7, 1)
    assert {problem: count for problem, (count, _) in report.skipped.items()} == {
        "illegal letter '-'": 2,
        "no residues": 1,
        "illegal letter '*' (a stop) before the end": 1,
        "the header has no name": 1,
    }
    assert report.skips().startswith(
        f"5 records skipped: illegal letter '-' 2 (first at {path}:4), no residues 1 (first at "
    )
    path.write_bytes(b">a\nMKT\n>b\nM\x00K\n")
    with pytest.raises(FastaError, match="binary"):
        read_fasta(path, skip_invalid=True)
    assert LetterReport().skips() is None


@pytest.mark.parametrize(
    ("name", "accession"),
    [
        ("sp|P12345|AATM_RABIT", "P12345"),
        ("tr|A0A0|X", "A0A0"),
        ("ref|NP_1.1|", "NP_1.1"),
        ("P12345", "P12345"),
        ("UniRef50_P1", "UniRef50_P1"),
        # The chain tells one from another.
        ("pdb|1ABC|A", "pdb|1ABC|A"),
    ],
)
def test_accessions(tmp_path, name, accession):
    path = tmp_path / "x.fasta"
    path.write_text(f">{name} of  something\nMKT\n")
    (record,), _ = read_fasta(path)
    assert (record.accession, record.header) == (accession, f"{name} of  something")
