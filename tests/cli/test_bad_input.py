"""What every command says to FASTA files that it cannot use, and to those that it can."""

import gzip

import numpy as np
import pytest

from tests.cli.commands import arrays, refusal, run
from tests.proteins.runs import flags, proteins

WHOLE = gzip.compress(b">a\n" + b"MKTLLW" * 200 + b"\n", mtime=0)

BAD = {
    "missing": (None, ": no such file; check the path"),
    "empty": (b"", ": the file is empty"),
    "blank": (b"\n\n", ": the file is empty"),
    "directory": ("directory", ": this is a directory"),
    "text": (b"MKTLLV\n", ":1: not FASTA: the first line must begin with '>'"),
    "binary": (b">a\nMK\x00\xff\xfe\x01\n", ":2: binary data"),
    "truncated-gzip": (WHOLE[:-12], "the gzip data end too early"),
    "corrupt-gzip": (WHOLE[:20] + b"\x00" * 8 + WHOLE[28:], "the gzip data are corrupt"),
    "illegal-letter": (b">a\nMKT\n>b\nMKT\nM1T\n", ":5: illegal letter '1'"),
    "gap": (b">a\nMK-T\n", ":2: illegal letter '-' in a sequence; remove the gaps"),
    "stop-inside": (b">a\nMK*T\n", ":2: illegal letter '*'"),
    "zero-length": (b">a\nMKT\n>b\n>c\nMKT\n", ":3: the record 'b' has no residues"),
    "no-name": (b">\nMKT\n", ":1: the header has no name"),
    "utf-16": (">a\nMKT\n".encode("utf-16"), ": this is UTF-16 text"),
}


@pytest.fixture(params=BAD, ids=str)
def bad(request, tmp_path):
    content, words = BAD[request.param]
    path = tmp_path / "input.fasta"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    return path, words


def assert_names_the_file(line, path, words):
    assert line.startswith(str(path))
    assert words in line
    assert "; " in line, "it ends with what to do"


def test_train(bad, tmp_path):
    output = tmp_path / "output"
    assert_names_the_file(refusal("train", bad[0], "--output", output, *flags()), *bad)
    assert not output.exists()


def test_train_on_good_and_validate_on_bad(bad, fasta, tmp_path):
    output = tmp_path / "output"
    line = refusal("train", fasta, "--validation", bad[0], "--output", output, *flags())
    assert_names_the_file(line, *bad)
    assert not output.exists()


def test_evaluate(bad, masked):
    assert_names_the_file(refusal("evaluate", masked, bad[0], "--json"), *bad)


def test_embed(bad, masked, tmp_path):
    output = tmp_path / "output.npz"
    assert_names_the_file(refusal("embed", masked, bad[0], "--output", output), *bad)
    assert not output.exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_report(bad, masked, tmp_path):
    output = tmp_path / "output"
    assert_names_the_file(refusal("report", masked, bad[0], "--output", output), *bad)
    assert not output.exists()


def test_the_second_of_two_files_is_named(fasta, masked, tmp_path):
    assert "none.fasta: no such file" in refusal("evaluate", masked, fasta, tmp_path / "none.fasta")


def test_odd_but_legal_input_is_read_and_counted(masked, tmp_path):
    plain, odd = tmp_path / "plain.fasta", tmp_path / "odd.fasta.gz"
    sequences = proteins(3)
    plain.write_text("".join(f">p\n{letters}\n" for letters in [*sequences, "MKXU"]))
    text = "".join(f">p\r\n{letters.lower()}*\r\n" for letters in sequences) + ">p\r\nMKXU"
    odd.write_bytes(gzip.compress(text.encode()))
    _, lines = run("embed", masked, plain, "--output", tmp_path / "plain.npz")
    assert lines[0] == (
        "non-standard letters kept: U 1, X 1; 3 records repeat the name of an earlier one"
    )
    _, lines = run("embed", masked, odd, "--output", tmp_path / "odd.npz")
    assert lines[0] == (
        f"{sum(map(len, sequences))} lower-case letters read as upper case; 3 trailing '*' removed;"
        " non-standard letters kept: U 1, X 1; 3 records repeat the name of an earlier one"
    )
    expected, found = arrays(tmp_path / "plain.npz"), arrays(tmp_path / "odd.npz")
    assert found.keys() == {"names", "lengths", "embeddings"}
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_odd_input_trains(tmp_path):
    path = tmp_path / "odd.fasta"
    path.write_bytes("".join(f">p\r\n{s.lower()}*\r\n" for s in proteins(10)).encode())
    _, lines = run("train", path, "--output", tmp_path / "model", *flags(steps=1))
    assert "trailing '*' removed" in lines[0]
    assert "9 records repeat the name" in lines[0]


def test_ordinary_input_has_nothing_to_tell(fasta, masked):
    _, lines = run("evaluate", masked, fasta)
    assert all(line.startswith("evaluating: ") for line in lines)


def test_nucleotides_are_noticed(masked, tmp_path):
    path = tmp_path / "dna.fasta"
    path.write_text(">gene\n" + "ACGT" * 60 + "\n")
    _, lines = run("evaluate", masked, path)
    assert "looks like DNA or RNA" in lines[0]
