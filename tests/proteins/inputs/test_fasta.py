"""FASTA files: every rule of the policy, with the exact line in every complaint."""

import gzip
import io
import random

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
WHOLE = gzip.compress(b">a\n" + b"MKTLLV\n" * 50, mtime=0)
NOISE = random.Random(0).randbytes(5000)


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


def damaged(place, value):
    content = bytearray(WHOLE)
    content[place] = value
    return bytes(content)


REFUSED = {
    "stop inside": (b">a\nMK*T\n", ":2: illegal letter '*'"),
    "stop, then residues": (b">a\nMKT\n\nM*\n\nT\n", ":4: illegal letter '*'"),
    "two stops": (b">a\nMK**\n", ":2: illegal letter '*'"),
    "two lines of stops": (b">a\nMK*\n*\n", ":2: illegal letter '*'"),
    "stop in the last": (b">a\nMK\n*\n>b\nA\n>c\nA*A", ":7: illegal letter '*'"),
    "no residues": (b">a\nMKT\n\n>empty one\n\n", ":4: no residues in the record 'empty'"),
    "only a stop": (b">a\nMKT\n>empty one\n*\n", ":3: no residues in the record 'empty'"),
    "none before another": (b">empty one\n>c\nMK\n", ":1: no residues in the record 'empty'"),
    "no name": (b">a\nMKT\n> \nMKT\n", ":3: the header has no name"),
    "empty": (b"", ": the file is empty"),
    "blank": (b" \r\n\n", ": the file is empty"),
    "a mark": (b"\xef\xbb\xbf", ": the file is empty"),
    "an empty gzip": (gzip.compress(b"", mtime=0), ": the file is empty"),
    "a table": (b"\n\nid,sequence\na,MKT\n", ":3: not FASTA: the first line must begin with '>'"),
    "text before": (b"MKT\n>a\nMKT\n", ":1: not FASTA: the first line must begin with '>'"),
    "an indented header": (b"\n\n >a\nM\n", ":3: not FASTA: the first line must begin with '>'"),
    "noise": (NOISE, ": binary data"),
    "an image": (b"\x89PNG\r\n\x1a\n" + NOISE, ": binary data"),
    "zeros": (b"\x00" * 50, ":1: binary data"),
    "latin-1": (b">a\nMKT\n>b caf\xe9\nMKT\n", ":3: binary data or text that is not UTF-8"),
    "a zero": (b">a\nMKT\nMK\x00\n", ":3: binary data"),
    "utf-16": (TWO.decode().encode("utf-16"), ": this is UTF-16 text"),
    "a start of gzip": (WHOLE[:5], "gzip data end too early"),
    "checksum": (damaged(-6, WHOLE[-6] ^ 0xFF), "gzip data are corrupt"),
    "method": (damaged(2, 0), "gzip data are corrupt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_named_with_its_line(file, name):
    content, words = REFUSED[name]
    message = complaint(file(content))
    if words.startswith(": binary"):
        assert words[2:] in message
    else:
        assert words in message
        assert not words.startswith(":") or message.startswith(words)


@pytest.mark.parametrize(
    ("bad", "remedy"),
    [
        *[(letter, "gaps") for letter in "-."],
        ("7", "numbers"),
        *[(letter, "A to Z") for letter in "?éß;"],
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


def test_files_that_cannot_be_opened(file, tmp_path, monkeypatch):
    assert "no such file" in complaint(tmp_path / "absent.fasta")
    assert "directory" in complaint(tmp_path)
    with pytest.raises(ValueError, match="paths"):
        read_fasta([])
    path = file(TWO)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    # Permissions themselves do not bind a superuser.
    monkeypatch.setattr(type(path), "open", refuse)
    assert "Permission denied" in complaint(path)


def test_reads_names_descriptions_and_sequences(file):
    records, report = read_fasta(file(TWO))
    assert records == [
        ProteinRecord("a", "first protein", "MKTLLV"),
        ProteinRecord("b", "", "ACDE"),
    ]
    assert report == LetterReport(records=2, residues=10, longest=6)
    assert report.summary() is None


def test_odd_letters_are_read_and_counted(file):
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    records, report = read_fasta(file(b">a\n" + alphabet + b"\n>b\nXX\n"))
    assert records[0].sequence == alphabet.decode()
    assert report.ambiguous == {"X": 3, "B": 1, "Z": 1, "U": 1, "O": 1, "J": 1}
    assert "X 3" in report.summary()
    records, report = read_fasta(file(b">a lower Case\nmKt\nllx\n"))
    assert records[0] == ProteinRecord("a", "lower Case", "MKTLLX")
    assert report.lower_case == 5
    assert "5 lower-case" in report.summary()


@pytest.mark.parametrize("text", [b">a\nMK*\n", b">a\nMK\n*\n", b">a\nMK *\n\n", b">a\nMK*"])
def test_a_final_stop_is_removed_and_counted(file, text):
    records, report = read_fasta(file(text + b"\n>b\nAC\n"))
    assert [record.sequence for record in records] == ["MK", "AC"]
    assert (report.stops_removed, report.residues) == (1, 4)
    assert "1 trailing '*'" in report.summary()


@pytest.mark.parametrize(
    "variant",
    [
        TWO.replace(b"\n", b"\r\n"),
        TWO.replace(b"\n", b"\r"),
        TWO.rstrip(b"\n"),
        b"\n\n" + TWO.replace(b"\n", b"\n\n"),
        TWO.replace(b"MKT", b"  M K\tT ").replace(b"LLV", b" \n \t \nLL V"),
        b"\xef\xbb\xbf" + TWO,
        b"\xef\xbb\xbf\r\n" + TWO.replace(b"\n", b"\r\n"),
    ],
    ids=["windows", "macintosh", "no final newline", "blank", "spaces", "mark", "mark and windows"],
)
def test_line_ends_white_space_and_marks_do_not_matter(file, variant):
    expected = read_fasta(file(TWO))
    assert read_fasta(file(variant, "variant.fasta")) == expected
    assert read_fasta(file(gzip.compress(variant), "variant.gz")) == expected


def test_duplicate_names_are_kept_and_counted_over_all_files(file):
    first = file(b">a\nMK\n>a again\nML\n>b\nMM\n")
    second = file(gzip.compress(b">b\nMN\n>c\nMP\n"), "second")
    records, report = read_fasta([first, str(second)])
    assert [record.name for record in records] == ["a", "a", "b", "b", "c"]
    assert (report.duplicate_names, report.records) == (2, 5)
    assert "2 records repeat" in report.summary()


NUCLEOTIDES = {
    "rna": "ACGTN" * 40 + "ACGUU",
    "one ambiguous base": "ACGT" * 500 + "R" + "ACGT" * 500,
    "several": "ACGTRACGTYSWACGTACGTACGTACGTACGTACGTACGT" * 10,
    "masked": "N" * 5_000 + "ACGT" * 100 + "X" * 5_000,
    "few of C and G": "AATTAATTAATTAATTGC" * 20,
    "a protein among many": "ACGT" * 1000 + "MKTAYIAKQRQISFVKSHFSRQLEERLGLIE",
}
PROTEINS = {
    "short": "ACGTN" * 40,
    "silk": "GAGAGS" * 60,
    "antifreeze": "AATAATAATAATPATAATPA" * 20,
    "poly-N": "N" * 300,
    "poly-G": "G" * 300,
    "a sixth other letters": "ACGT" * 50 + "DEFHIKLMNPQRSVWY" * 2,
}


@pytest.mark.parametrize("name", [*NUCLEOTIDES, *PROTEINS])
def test_nucleotides_are_suspected_and_proteins_are_not(file, name):
    sequence = {**NUCLEOTIDES, **PROTEINS}[name]
    summary = read_fasta(file(f">a\n{sequence}\n".encode()))[1].summary()
    assert ("DNA or RNA" in (summary or "")) is (name in NUCLEOTIDES)


def test_streaming_yields_records_before_a_later_fault_and_counts_them(file):
    report = LetterReport()
    stream = iter_fasta(file(b">a\nmkt*\n>b\nMK\n>c\nM-K\n"), report)
    assert next(stream).sequence == "MKT"
    assert (report.records, report.residues, report.stops_removed) == (1, 3, 1)
    assert next(stream).name == "b"
    with pytest.raises(FastaError, match=":6: "):
        next(stream)
    assert report.records == 2


words = st.text("aZ09|_.;=>é\u0301中😀", min_size=1)
records = st.builds(
    ProteinRecord,
    name=words,
    description=st.lists(words, max_size=3).map(" ".join),
    sequence=st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=1, max_size=100),
)


@settings(max_examples=20)
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
        *[(name, "", "MK") for name in ("", "a b")],
        ("a", "x\ny", "MK"),
        *[("a", "", sequence) for sequence in ("", "MK*", "mk", "MK\n")],
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, record):
    path = tmp_path / "out.fasta"
    path.write_text("before")
    with pytest.raises(ValueError, match="record"):
        write_fasta(path, [ProteinRecord("good", "", "MK"), ProteinRecord(*record)])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path], "nothing half-written is left behind"


def test_writing_is_interrupted_to_a_pipe_or_to_a_bad_place(tmp_path):
    def interrupted():
        yield ProteinRecord("a", "", "MK")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_fasta(tmp_path / "out.fasta", interrupted())
    assert list(tmp_path.iterdir()) == []
    write_fasta("/dev/null", [ProteinRecord("a", "", "MK")])
    for place, words in ((tmp_path / "absent" / "out.fasta", "absent"), (tmp_path, "directory")):
        with pytest.raises(OSError, match=words):
            write_fasta(place, [ProteinRecord("a", "", "MK")])
    with pytest.raises(ValueError, match="width"):
        write_fasta(tmp_path / "out.fasta", [], width=0)
