"""Read Swiss-Prot from the BLAST databases of Debian's package `metastudent-data`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

DATABASES = ("BPO", "MFO", "CCO")
_NCBI_ALPHABET = b"-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"
_LETTERS = frozenset("ACDEFGHIKLMNPQRSTVWYXBZUOJ")
# A definition line starts SEQUENCE OF SEQUENCE { [0] VisibleString ... }, all of indefinite length.
_DEFLINE_START = bytes.fromhex("30803080a0801a")


def read_blast_database(prefix: Path) -> Iterator[tuple[str, str]]:
    """Yield (accession, sequence) from a version 4 protein BLAST database.

    Args:
        prefix: path without the `.pin`, `.phr` and `.psq` endings.

    Yields:
        The text before `|` in each title, and the sequence in upper-case letters.

    Raises:
        ValueError: a file is not laid out as expected.
    """
    index, headers, residues = (
        prefix.with_name(prefix.name + end).read_bytes() for end in (".pin", ".phr", ".psq")
    )
    if index[:8] != bytes.fromhex("0000000400000001"):
        raise ValueError(
            f"{prefix}.pin: expected a version 4 protein BLAST index, it starts with "
            f"{index[:8].hex()}; pass --source the dataset_201401 folder"
        )
    position = 8
    for _ in ("title", "date"):
        position += 4 + int.from_bytes(index[position : position + 4], "big")
    count = int.from_bytes(index[position : position + 4], "big")
    position += 4 + 8 + 4  # count, residues in all, longest sequence
    offsets = np.frombuffer(index, ">u4", 2 * (count + 1), position).reshape(2, -1).tolist()
    header_at, sequence_at = offsets
    letters = bytes.maketrans(bytes(range(len(_NCBI_ALPHABET))), _NCBI_ALPHABET)
    for i in range(count):
        header = headers[header_at[i] : header_at[i + 1]]
        if not header.startswith(_DEFLINE_START):
            raise ValueError(f"{prefix}.phr: record {i} does not start as a definition line")
        at = len(_DEFLINE_START)
        # BER: one byte of length, or 0x80 + the number of length bytes that follow.
        at += 1 if header[at] < 0x80 else 1 + (header[at] & 0x7F)
        accession = header[at : header.index(b"|", at)].decode("ascii")
        yield (
            accession,
            residues[sequence_at[i] : sequence_at[i + 1] - 1].translate(letters).decode("ascii"),
        )


def distinct_sequences(source: Path) -> dict[str, str]:
    """Return {accession: sequence}, each distinct sequence once, sorted by accession.

    Of several accessions with one sequence the first in alphabetical order is kept.
    """
    first: dict[str, str] = {}
    for name in DATABASES:
        for accession, sequence in read_blast_database(source / name / "goasp.fasta"):
            if not sequence or not _LETTERS.issuperset(sequence):
                continue
            known = first.get(sequence)
            if known is None or accession < known:
                first[sequence] = accession
    return dict(sorted((accession, sequence) for sequence, accession in first.items()))
