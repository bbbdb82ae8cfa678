"""BLAST databases of version 4, written by the format's description, are read."""

import struct

import pytest

from performers.app.errors import UserError
from tools.blast import main, read_blast_database

ALPHABET = "-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"
RECORDS = [
    ("P1|GO:1,GO:2", "MKV"),
    ("Q2", "ACDEFGHIKLMNPQRSTVWYXBZUOJ"),
    ("R3|" + "GO:0000001," * 40, "W*W-"),
]


def _ber_length(size):
    if size < 128:
        return bytes([size])
    digits = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([0x80 | len(digits)]) + digits


def write_blast(prefix, records):
    """Write ``prefix`` .pin, .phr and .psq with (title, sequence) records."""
    headers, residues = b"", b"\0"
    header_at, sequence_at = [0], [1]
    for title, sequence in records:
        data = title.encode()
        headers += bytes.fromhex("30803080a0801a") + _ber_length(len(data)) + data + b"\0" * 8
        residues += bytes(ALPHABET.index(letter) for letter in sequence) + b"\0"
        header_at.append(len(headers))
        sequence_at.append(len(residues))
    index = struct.pack(">II", 4, 1)
    for text in (b"a title", b"2014-01-01"):
        index += struct.pack(">I", len(text)) + text
    total = sum(len(sequence) for _, sequence in records)
    longest = max(len(sequence) for _, sequence in records)
    index += struct.pack(">I", len(records)) + struct.pack("<Q", total) + struct.pack(">I", longest)
    index += struct.pack(f">{len(header_at)}I", *header_at)
    index += struct.pack(f">{len(sequence_at)}I", *sequence_at)
    for end, content in ((".pin", index), (".phr", headers), (".psq", residues)):
        prefix.with_name(prefix.name + end).write_bytes(content)


def test_records_come_back(tmp_path):
    write_blast(tmp_path / "db", RECORDS)
    assert list(read_blast_database(tmp_path / "db")) == RECORDS


@pytest.mark.parametrize(
    ("end", "change", "words"),
    [
        (".phr", None, r"db\.phr is missing"),
        (".pin", lambda content: b"\0\0\0\5" + content[4:], "version 4"),
        (".pin", lambda content: content[:60], "cut short"),
        (".psq", lambda content: content[:10], "cut short"),
        (".phr", lambda content: content[:10], "cut short"),
    ],
)
def test_files_that_are_refused(tmp_path, end, change, words):
    write_blast(tmp_path / "db", RECORDS)
    file = tmp_path / f"db{end}"
    content = file.read_bytes()
    file.unlink()
    if change is not None:
        file.write_bytes(change(content))
    with pytest.raises(UserError, match=words):
        list(read_blast_database(tmp_path / "db"))


def test_the_script_writes_fasta(tmp_path, capsys):
    write_blast(tmp_path / "db", RECORDS)
    for place in (tmp_path, tmp_path / "db"):
        main([str(place)])
        out, err = capsys.readouterr()
        assert out == f">P1\nMKV\n>Q2\n{RECORDS[1][1]}\n"
        assert err == "1 records left out\n"
    with pytest.raises(SystemExit, match=r"blast: .*none\.pin is missing"):
        main([str(tmp_path / "none")])
