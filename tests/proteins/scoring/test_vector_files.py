"""Files of embeddings give back what was written, appear when whole, and name every protein."""

import h5py
import numpy as np
import pyarrow.parquet
import pytest

from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.options import VECTOR_SUFFIXES
from performers.proteins.scoring.vector_files import open_vectors

RECORDS = [
    ProteinRecord("b", "", "MKT"),
    ProteinRecord("sp|P1|ONE_HUMAN", "first", "M"),
    ProteinRecord("b", "again", "W"),
    ProteinRecord("a/c", "", "MK"),
]
NAMES = ["b", "P1", "b", "a/c"]
LENGTHS = [3, 1, 1, 2]
POOLED = [np.arange(4, dtype=np.float32) / 3 + n for n in range(4)]
RESIDUES = [
    np.random.default_rng(n).normal(size=(length, 4)).astype(np.float32)
    for n, length in enumerate(LENGTHS)
]


def write(path, vectors, records=RECORDS):
    with open_vectors(path, per_residue=vectors[0].ndim == 2) as add:
        for record, vector in zip(records, [*vectors, None], strict=False):
            add(record, vector)
    return path


def cells(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


def lines_in(file, name):
    return file[name].tobytes().decode().split("\n")


BOTH = pytest.mark.parametrize("vectors", [POOLED, RESIDUES], ids=["proteins", "residues"])


@BOTH
def test_numpy(tmp_path, vectors):
    with np.load(write(tmp_path / "x.npz", vectors), allow_pickle=False) as file:
        assert set(file) == {"names", "headers", "lengths", "embeddings"}
        assert lines_in(file, "names") == NAMES
        assert lines_in(file, "headers")[1] == "sp|P1|ONE_HUMAN first"
        assert file["lengths"].tolist() == LENGTHS
        np.testing.assert_array_equal(
            file["embeddings"], np.concatenate([np.atleast_2d(vector) for vector in vectors])
        )


@BOTH
def test_parquet(tmp_path, vectors, monkeypatch):
    monkeypatch.setattr("performers.proteins.scoring.vector_files._ROW_GROUP", 10)
    path = write(tmp_path / "x.parquet", vectors)
    assert pyarrow.parquet.ParquetFile(path).num_row_groups > 1
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == ["name", "header", "length", "embedding"]
    assert table["name"].to_pylist() == NAMES
    assert table["length"].to_pylist() == LENGTHS
    assert table["embedding"].to_pylist() == [vector.tolist() for vector in vectors]
    assert "fixed_size_list<element: float>[4]" in str(table["embedding"].type)


@BOTH
def test_hdf5(tmp_path, vectors):
    with h5py.File(write(tmp_path / "x.h5", vectors)) as file:
        assert list(file) == ["b", "P1", "b#2", "a_c"]
        for data, record, vector in zip(file.values(), RECORDS, vectors, strict=True):
            assert data.shape == vector.shape
            np.testing.assert_array_equal(data[()], vector)
            assert dict(data.attrs) == {"header": record.header, "length": len(record.sequence)}


def test_text(tmp_path):
    rows = cells(write(tmp_path / "x.tsv", POOLED))
    assert rows[0] == ["name", "length", *(f"channel_{n}" for n in range(4))]
    assert [row[:2] for row in rows[1:]] == [
        [n, str(x)] for n, x in zip(NAMES, LENGTHS, strict=True)
    ]
    np.testing.assert_array_equal(np.array([r[2:] for r in rows[1:]], np.float32), POOLED)
    rows = cells(write(tmp_path / "y.tsv", RESIDUES))
    assert rows[0][:3] == ["name", "position", "residue"]
    assert [row[:3] for row in rows[1:4]] == [["b", "1", "M"], ["b", "2", "K"], ["b", "3", "T"]]
    found = np.array([row[3:] for row in rows[1:]], np.float32)
    np.testing.assert_array_equal(found, np.concatenate(RESIDUES))


def interrupted():
    yield RECORDS[0]
    raise KeyboardInterrupt


@pytest.mark.parametrize("suffix", VECTOR_SUFFIXES)
def test_an_interrupted_file_does_not_appear(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt):
        write(path, [POOLED[0]], interrupted())
    assert path.read_bytes() == b"before"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_one_long_name_does_not_lengthen_the_others(tmp_path):
    names = [*(f"p{n}" for n in range(500)), "n" * 20_000, "protéine"]
    records = [ProteinRecord(name, "", "MKT") for name in names]
    path = write(tmp_path / "x.npz", np.zeros((len(names), 1), np.float32), records)
    with np.load(path) as file:
        assert lines_in(file, "names") == names
    # Twice, as name and as header; eight bytes a length and four a vector; headers of arrays.
    text = 2 * sum(len(name.encode()) + 1 for name in names)
    assert path.stat().st_size < text + 12 * len(names) + 2000
