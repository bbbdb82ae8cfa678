"""FASTA files: every rule of the policy, with the exact line in every complaint."""

import gzip
import io
import os
import random
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from performers.proteins.inputs.fasta import (
    FastaError,
    LetterReport,
    ProteinRecord,
    iter_fasta,
    read_fasta,
    write_fasta,
)

TWO = b">a first protein\nMKT\nLLV\n>b\nACDE\n"


@pytest.fixture
def file(tmp_path):
    def make(content, name="in.fasta"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return make


def complaint(path):
    with pytest.raises(FastaError) as caught:
        read_fasta(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(path))
    assert "; " in message, "a complaint ends with what to do"
    return message[len(str(path)) :]


def sequences(path):
    return [record.sequence for record in read_fasta(path)[0]]


def test_reads_names_descriptions_and_sequences(file):
    records, report = read_fasta(file(TWO))
    assert records == [
        ProteinRecord("a", "first protein", "MKTLLV"),
        ProteinRecord("b", "", "ACDE"),
    ]
    assert report == LetterReport(records=2, residues=10)
    assert report.summary() is None


def test_every_letter_of_the_alphabet_is_legal_and_the_odd_ones_are_counted(file):
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    records, report = read_fasta(file(b">a\n" + alphabet + b"\n>b\nXX\n"))
    assert records[0].sequence == alphabet.decode()
    assert report.ambiguous == {"X": 3, "B": 1, "Z": 1, "U": 1, "O": 1, "J": 1}
    assert "X 3" in report.summary()


def test_lower_case_is_upper_cased_and_counted(file):
    records, report = read_fasta(file(b">a lower Case\nmKt\nllx\n"))
    assert records[0] == ProteinRecord("a", "lower Case", "MKTLLX")
    assert report.lower_case == 5
    assert "5 lower-case" in report.summary()


@pytest.mark.parametrize("text", [b">a\nMK*\n", b">a\nMK\n*\n", b">a\nMK *\n\n", b">a\nMK*"])
def test_a_final_stop_is_removed_and_counted(file, text):
    records, report = read_fasta(file(text + b"\n>b\nAC\n"))
    assert [record.sequence for record in records] == ["MK", "AC"]
    assert report.stops_removed == 1
    assert report.residues == 4
    assert "1 trailing '*'" in report.summary()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b">a\nMK*T\n", 2),
        (b">a\nMKT\n\nM*\n\nT\n", 4),
        (b">a\nMK**\n", 2),
        (b">a\nMK*\n*\n", 2),
        (b">a\nMK\n*\n>b\nA\n>c\nA*A", 7),
    ],
)
def test_a_stop_inside_a_sequence_is_an_error_at_its_line(file, text, line):
    message = complaint(file(text))
    assert message.startswith(f":{line}: ")
    assert "'*'" in message


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        ("-", "gaps"),
        (".", "gaps"),
        ("7", "numbers"),
        ("?", "A to Z"),
        ("é", "A to Z"),
        ("ß", "A to Z"),
        (";", "A to Z"),
        (">", "first character of its line"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_an_illegal_letter_is_an_error_with_line_letter_and_remedy(file, bad, remedy, end):
    lines = ["", ">a", "MKT", "", "LLV", ">b", f"AC{bad}D", ">c", "AC"]
    message = complaint(file(end.join(lines).encode()))
    assert message.startswith(":7: ")
    assert ascii(bad) in message
    assert remedy in message


def test_spaces_inside_and_around_lines_are_ignored(file):
    assert sequences(file(b">a\n  MK T\tL \n \t \n LV\n")) == ["MKTLLV"]


@pytest.mark.parametrize(
    "variant",
    [
        TWO.replace(b"\n", b"\r\n"),
        TWO.replace(b"\n", b"\r"),
        TWO.rstrip(b"\n"),
        b"\n\n" + TWO.replace(b"\n", b"\n\n"),
        b"\xef\xbb\xbf" + TWO,
        b"\xef\xbb\xbf\r\n" + TWO.replace(b"\n", b"\r\n"),
    ],
    ids=["windows", "macintosh", "no final newline", "blank lines", "mark", "mark and windows"],
)
def test_line_ends_blank_lines_and_marks_do_not_matter(file, variant):
    expected = read_fasta(file(TWO))
    assert read_fasta(file(variant, "variant.fasta")) == expected
    assert read_fasta(file(gzip.compress(variant), "variant.gz")) == expected


def test_gzip_is_told_by_content_not_by_name(file):
    expected = sequences(file(TWO))
    assert sequences(file(gzip.compress(TWO), "plain.fasta")) == expected
    assert sequences(file(TWO, "not_really.gz")) == expected
    both = gzip.compress(TWO) + gzip.compress(TWO)
    assert sequences(file(both, "two_members.gz")) == 2 * expected


@pytest.mark.parametrize("end", [b"", b"\n", b"*\n", b"\n>c\nMK\n"])
def test_a_record_without_residues_is_an_error_at_its_header(file, end):
    message = complaint(file(b">a\nMKT\n\n>empty one\n\n" + end))
    assert message.startswith(":4: ")
    assert "'empty'" in message


def test_a_header_without_a_name_is_an_error_at_its_line(file):
    assert complaint(file(b">a\nMKT\n> \nMKT\n")).startswith(":3: ")


def test_missing_file_and_directory(tmp_path):
    assert "no such file" in complaint(tmp_path / "absent.fasta")
    assert "directory" in complaint(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b" \r\n\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)]
)
def test_an_empty_file_is_an_error(file, content):
    assert "empty" in complaint(file(content))


@pytest.mark.parametrize(
    "content", [b"\n\nid,sequence\na,MKT\n", b"MKT\n>a\nMKT\n", b"\n\n >a\nM\n"]
)
def test_a_file_that_is_not_fasta_is_an_error(file, content):
    message = complaint(file(content))
    assert "must begin with '>'" in message
    assert message.startswith(":3: " if content.startswith(b"\n") else ":1: ")


def test_binary_files_are_an_error(file):
    noise = random.Random(0).randbytes(5000)
    for content in [noise, b"\x89PNG\r\n\x1a\n" + noise, b"PK\x03\x04" + noise, b"\x00" * 50]:
        assert "binary" in complaint(file(content))
    assert complaint(file(b">a\nMKT\n>b caf\xe9\nMKT\n")).startswith(":3: binary data or text that")
    assert complaint(file(b">a\nMKT\nMK\x00\n")).startswith(":3: binary")
    assert "UTF-16" in complaint(file(TWO.decode().encode("utf-16")))


def test_a_truncated_gzip_is_an_error_wherever_it_ends(file):
    whole = gzip.compress(b">a\n" + b"MKTLLV\n" * 50)
    for length in [2, 5, 12, len(whole) // 2, len(whole) - 1]:
        assert "too early" in complaint(file(whole[:length]))


def test_a_corrupt_gzip_is_an_error(file):
    whole = bytearray(gzip.compress(TWO))
    checksum, method = bytearray(whole), bytearray(whole)
    checksum[-6] ^= 0xFF
    method[2] = 0
    trailing = whole + b"trailing"
    body = whole[:10] + b"\xff" * 40 + whole[-8:]
    with pytest.raises(zlib.error):
        gzip.decompress(bytes(body))
    for content in [checksum, method, trailing, body]:
        assert "corrupt" in complaint(file(bytes(content)))


def test_a_file_that_may_not_be_read(file, monkeypatch):
    path = file(TWO)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    # Permissions themselves do not bind a superuser.
    monkeypatch.setattr(type(path), "open", refuse)
    assert "Permission denied" in complaint(path)


def test_duplicate_names_are_kept_and_counted_over_all_files(file):
    first = file(b">a\nMK\n>a again\nML\n>b\nMM\n")
    second = file(gzip.compress(b">b\nMN\n>c\nMP\n"), "second")
    records, report = read_fasta([first, str(second)])
    assert [record.name for record in records] == ["a", "a", "b", "b", "c"]
    assert report.duplicate_names == 2
    assert report.records == 5
    assert "2 records repeat" in report.summary()


def test_no_paths_is_an_error():
    with pytest.raises(ValueError, match="paths"):
        read_fasta([])


def test_a_very_long_record(file):
    long = "".join(random.Random(1).choices("ACDEFGHIKLMNPQRSTVWY", k=40_000))
    one_line = file(f">titin\n{long}\n".encode())
    wrapped = file(b"")
    write_fasta(wrapped, [ProteinRecord("titin", "", long)])
    assert sequences(one_line) == [long]
    assert sequences(wrapped) == [long]


@pytest.mark.parametrize(
    "sequence",
    [
        "ACGTN" * 40 + "ACGUU",
        "ACGT" * 500 + "R" + "ACGT" * 500,
        "ACGTRACGTYSWACGTACGTACGTACGTACGTACGTACGT" * 10,
        "N" * 5_000 + "ACGT" * 100 + "X" * 5_000,
        "AATTAATTAATTAATTGC" * 20,
    ],
    ids=["rna", "one ambiguous base", "several", "masked", "few of C and G"],
)
def test_nucleotides_are_suspected(file, sequence):
    assert "DNA or RNA" in read_fasta(file(f">a\n{sequence}\n".encode()))[1].summary()


@pytest.mark.parametrize(
    "sequence",
    [
        "ACGTN" * 40,
        "GAGAGS" * 60,
        "AATAATAATAATPATAATPA" * 20,
        "N" * 300,
        "G" * 300,
        "ACGT" * 50 + "DEFHIKLMNPQRSVWY" * 2,
    ],
    ids=["short", "silk", "antifreeze", "poly-N", "poly-G", "a sixth other letters"],
)
def test_proteins_are_not_taken_for_nucleotides(file, sequence):
    summary = read_fasta(file(f">a\n{sequence}\n".encode()))[1].summary()
    assert summary is None or "DNA" not in summary


def test_few_proteins_among_nucleotides_do_not_hide_them(file):
    genes = b"".join(b">g%d\n%s\n" % (n, b"ACGT" * 50) for n in range(20))
    report = read_fasta(file(genes + b">p\nMKTAYIAKQRQISFVKSHFSRQLEERLGLIE\n"))[1]
    assert report.summary().startswith("warning: 99.3% of the letters are ACGTU, N or X")


def test_streaming_yields_records_before_a_later_fault_and_counts_them(file):
    report = LetterReport()
    stream = iter_fasta(file(b">a\nmkt*\n>b\nMK\n>c\nM-K\n"), report)
    assert next(stream).sequence == "MKT"
    assert (report.records, report.residues, report.stops_removed) == (1, 3, 1)
    assert next(stream).name == "b"
    with pytest.raises(FastaError, match=":6: "):
        next(stream)
    assert report.records == 2


def test_reading_from_a_pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(gzip.compress(TWO),))
    writer.start()
    assert sequences(path) == ["MKTLLV", "ACDE"]
    writer.join()


words = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1)
records = st.builds(
    ProteinRecord,
    name=words,
    description=st.lists(words, max_size=3).map(" ".join),
    sequence=st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=200),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(records, min_size=1, max_size=5), st.integers(1, 90), st.booleans())
def test_what_is_written_is_read_back(tmp_path_factory, written, width, compressed):
    path = tmp_path_factory.mktemp("round") / ("out.fasta.gz" if compressed else "out.fasta")
    write_fasta(path, written, width)
    read, report = read_fasta(path)
    assert read == written
    assert report.records == len(written)
    assert path.read_bytes().startswith(b"\x1f\x8b" if compressed else b">")


def test_the_written_layout():
    handle = io.StringIO()
    write_fasta(handle, [ProteinRecord("a", "x y", "MKTLLVA"), ProteinRecord("b", "", "AC")], 3)
    assert handle.getvalue() == ">a x y\nMKT\nLLV\nA\n>b\nAC\n"
    assert not handle.closed


@pytest.mark.parametrize(
    "record",
    [
        ProteinRecord("", "", "MK"),
        ProteinRecord("a b", "", "MK"),
        ProteinRecord("a", "x\ny", "MK"),
        ProteinRecord("a", "", ""),
        ProteinRecord("a", "", "MK*"),
        ProteinRecord("a", "", "mk"),
        ProteinRecord("a", "", "MK\n"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, record):
    path = tmp_path / "out.fasta"
    path.write_text("before")
    with pytest.raises(ValueError, match="record"):
        write_fasta(path, [ProteinRecord("good", "", "MK"), record])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left behind"


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        yield ProteinRecord("a", "", "MK")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_fasta(tmp_path / "out.fasta", interrupted())
    assert list(tmp_path.iterdir()) == []


def test_writing_to_a_pipe_a_bad_folder_and_a_bad_width(tmp_path):
    write_fasta("/dev/null", [ProteinRecord("a", "", "MK")])
    with pytest.raises(OSError, match="absent"):
        write_fasta(tmp_path / "absent" / "out.fasta", [])
    with pytest.raises(OSError, match="directory"):
        write_fasta(tmp_path, [ProteinRecord("a", "", "MK")])
    with pytest.raises(ValueError, match="width"):
        write_fasta(tmp_path / "out.fasta", [], width=0)
