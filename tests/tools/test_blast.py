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


def test_missing_part(tmp_path):
    write_blast(tmp_path / "db", RECORDS)
    (tmp_path / "db.phr").unlink()
    with pytest.raises(UserError, match=r"db\.phr is missing"):
        list(read_blast_database(tmp_path / "db"))


def test_other_version(tmp_path):
    write_blast(tmp_path / "db", RECORDS)
    index = (tmp_path / "db.pin").read_bytes()
    (tmp_path / "db.pin").write_bytes(b"\0\0\0\5" + index[4:])
    with pytest.raises(UserError, match="version 4"):
        list(read_blast_database(tmp_path / "db"))


@pytest.mark.parametrize(("end", "kept"), [(".pin", 60), (".psq", 10), (".phr", 10)])
def test_cut_short(tmp_path, end, kept):
    write_blast(tmp_path / "db", RECORDS)
    file = tmp_path / f"db{end}"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(UserError, match="cut short"):
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
