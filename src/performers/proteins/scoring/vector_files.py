r"""Files of embeddings, written a protein at a time: NumPy, Parquet, HDF5 and text.

Each names a protein by its accession; all but ``.tsv`` keep the whole header:

- ``.npz``: ``names`` and ``headers`` (texts, a protein a line, as arrays of bytes in UTF-8, since
  an array of strings would take the longest one's space for every one), ``lengths`` (int64) and
  ``embeddings`` (float32), ``(proteins, width)``, or ``(residues, width)`` of all proteins
  one after another::

      with np.load("proteins.npz") as file:
          names = file["names"].tobytes().decode().split("\n")
          vectors = file["embeddings"]

- ``.parquet``: columns ``name``, ``header``, ``length`` and ``embedding``, a list of float32, or a
  list of such lists.
- ``.h5``: a data set a protein, ``(width,)`` or ``(residues, width)`` of float32, with ``header``
  and ``length`` as attributes. Names are unique there, and a ``/`` would be a folder: it becomes
  ``_``, and further proteins of a name get ``#2``, ``#3`` at its end.
- ``.tsv``: ``name``, ``length`` and a column a channel; of residues ``name``, ``position``,
  ``residue`` and a column a channel.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from performers.app.files import replacement
from performers.proteins.inputs.records import ProteinRecord

Write: TypeAlias = Callable[[ProteinRecord, npt.NDArray[np.float32]], None]
"""Writes a protein's vector ``(width,)``, or its residues' ``(residues, width)``."""

_ROW_GROUP = 1 << 22


@contextmanager
def open_vectors(path: Path, *, per_residue: bool = False) -> Iterator[Write]:
    """Context of a file of embeddings, which appears when it is whole.

    Args:
        path: The file; its suffix, one of ``VECTOR_SUFFIXES``, is its format.
        per_residue: Proteins have a vector a residue.

    Raises:
        ImportError: The package of the format is missing.
    """
    make = _FORMATS[path.suffix.lower()]
    with replacement(path) as temporary, make(temporary, per_residue) as write:
        yield write


@contextmanager
def _npz(path: Path, per_residue: bool) -> Iterator[Write]:
    names: list[str] = []
    headers: list[str] = []
    lengths: list[int] = []
    width = 0
    # The size of an array comes before it, and is known at the end.
    with tempfile.TemporaryFile(dir=path.parent) as raw:

        def write(record: ProteinRecord, vectors: npt.NDArray[np.float32]) -> None:
            nonlocal width
            names.append(record.accession)
            headers.append(record.header)
            lengths.append(len(record.sequence))
            width = vectors.shape[-1]
            raw.write(np.ascontiguousarray(vectors, dtype="<f4").data)

        yield write
        arrays: dict[str, npt.NDArray[Any]] = {
            "names": np.frombuffer("\n".join(names).encode(), dtype=np.uint8),
            "headers": np.frombuffer("\n".join(headers).encode(), dtype=np.uint8),
            "lengths": np.array(lengths, dtype=np.int64),
        }
        rows = sum(lengths) if per_residue else len(lengths)
        shape = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        with zipfile.ZipFile(path, "w") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array)
            raw.seek(0)
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, shape)
                shutil.copyfileobj(raw, member, 1 << 20)


@contextmanager
def _parquet(path: Path, per_residue: bool) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    rows: list[tuple[ProteinRecord, npt.NDArray[np.float32]]] = []
    size = 0
    writer: Any = None

    def flush() -> None:
        nonlocal writer, size
        vectors = np.concatenate([np.atleast_2d(vector) for _, vector in rows])
        column = pyarrow.FixedSizeListArray.from_arrays(
            pyarrow.array(vectors.ravel()), vectors.shape[1]
        )
        lengths = [len(record.sequence) for record, _ in rows]
        if per_residue:
            column = pyarrow.ListArray.from_arrays(
                pyarrow.array(np.cumsum([0, *lengths]), pyarrow.int32()), column
            )
        table = pyarrow.table(
            {
                "name": pyarrow.array([record.accession for record, _ in rows]),
                "header": pyarrow.array([record.header for record, _ in rows]),
                "length": pyarrow.array(lengths, pyarrow.int64()),
                "embedding": column,
            }
        )
        if writer is None:
            writer = parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        rows.clear()
        size = 0

    def write(record: ProteinRecord, vectors: npt.NDArray[np.float32]) -> None:
        nonlocal size
        rows.append((record, vectors))
        size += vectors.size
        if size >= _ROW_GROUP:
            flush()

    try:
        yield write
        if rows:
            flush()
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _hdf5(path: Path, per_residue: bool) -> Iterator[Write]:
    import h5py

    repeats: dict[str, int] = {}
    with h5py.File(path, "w", track_order=True) as file:

        def write(record: ProteinRecord, vectors: npt.NDArray[np.float32]) -> None:
            plain = name = record.accession.replace("/", "_")
            while name in file or name == ".":
                repeats[plain] = repeats.get(plain, 1) + 1
                name = f"{plain}#{repeats[plain]}"
            data = file.create_dataset(name, data=vectors)
            data.attrs["header"] = record.header
            data.attrs["length"] = len(record.sequence)

        yield write


@contextmanager
def _tsv(path: Path, per_residue: bool) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        first = True

        def write(record: ProteinRecord, vectors: npt.NDArray[np.float32]) -> None:
            nonlocal first
            if first:
                leading = ["name", "position", "residue"] if per_residue else ["name", "length"]
                channels = [f"channel_{number}" for number in range(vectors.shape[-1])]
                file.write("\t".join([*leading, *channels]) + "\n")
                first = False
            # NumPy's text of a float32 is the shortest that gives it back.
            for position, values in enumerate(np.atleast_2d(vectors).astype(str), 1):
                leading = [record.accession, str(len(record.sequence))]
                if per_residue:
                    leading = [record.accession, str(position), record.sequence[position - 1]]
                file.write("\t".join([*leading, *values]) + "\n")

        yield write


_FORMATS: dict[str, Callable[[Path, bool], AbstractContextManager[Write]]] = {
    ".npz": _npz,
    ".parquet": _parquet,
    ".h5": _hdf5,
    ".tsv": _tsv,
}
