"""BLAST databases are read as they were written."""

import pytest

from performers.app.errors import UserError
from tests.tools.blast_files import write_blast
from tools.blast import main, read_blast_database

RECORDS = [
    ("P1|GO:1,GO:2", "MKV"),
    ("Q2", "ACDEFGHIKLMNPQRSTVWYXBZUOJ"),
    ("R3|" + "GO:0000001," * 40, "W*W-"),
]


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
