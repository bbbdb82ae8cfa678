"""Write protein BLAST databases of version 4 as FASTA, without BLAST.

The name of a record is its title up to the first bar. Records with other symbols than residues are
left out.

Usage:
    python tools/blast.py unpacked/usr/share/metastudent-data > swissprot.fasta
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from performers.app.errors import UserError
from performers.proteins.inputs.tokenizer import AMBIGUOUS, AMINO_ACIDS

_ALPHABET = b"-ABCDEFGHIKLMNPQRSTVWXYZU*OJ"
_RESIDUES = frozenset(AMINO_ACIDS + AMBIGUOUS)
_VERSION_4_PROTEIN = bytes.fromhex("0000000400000001")
# A definition line starts SEQUENCE OF SEQUENCE { [0] VisibleString ... }, all of indefinite length.
_TITLE_START = bytes.fromhex("30803080a0801a")


def read_blast_database(prefix: Path) -> Iterator[tuple[str, str]]:
    """Title and sequence, in upper-case letters, of every record of a protein BLAST database.

    Args:
        prefix: Path without the ``.pin``, ``.phr`` and ``.psq`` endings.

    Raises:
        UserError: A file is missing or not laid out as version 4 says.
    """
    paths = [prefix.with_name(prefix.name + end) for end in (".pin", ".phr", ".psq")]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing; a BLAST database needs .pin, .phr and .psq")
    index, headers, residues = (path.read_bytes() for path in paths)
    if index[:8] != _VERSION_4_PROTEIN:
        raise UserError(
            f"{paths[0]}: expected the index of a protein BLAST database of version 4, it starts "
            f"with {index[:8].hex()}; write the database out as FASTA (blastdbcmd -entry all) and "
            "give that"
        )
    header_at, sequence_at = _offsets(paths[0], index)
    if header_at[-1] > len(headers) or sequence_at[-1] > len(residues):
        raise UserError(f"{prefix}: the .phr or .psq file is cut short; copy the database again")
    letters = bytes.maketrans(bytes(range(len(_ALPHABET))), _ALPHABET)
    for i in range(len(header_at) - 1):
        title = _title(headers[header_at[i] : header_at[i + 1]])
        if title is None:
            raise UserError(f"{paths[1]}: record {i} has no title where one is expected")
        # A zero byte ends each sequence.
        sequence = residues[sequence_at[i] : sequence_at[i + 1] - 1]
        yield title, sequence.translate(letters).decode("ascii")


def is_protein(sequence: str) -> bool:
    """Return True for a sequence of one residue or more and of nothing else."""
    return bool(sequence) and _RESIDUES.issuperset(sequence)


def _offsets(path: Path, index: bytes) -> tuple[list[int], list[int]]:
    position = 8
    try:
        for _ in ("title", "date"):
            position += 4 + int.from_bytes(index[position : position + 4], "big")
        count = int.from_bytes(index[position : position + 4], "big")
        position += 4 + 8 + 4  # count, residues in all, longest sequence
        table = np.frombuffer(index, ">u4", 2 * (count + 1), position).reshape(2, -1)
    except ValueError as error:
        raise UserError(f"{path} is cut short; copy the database again") from error
    return table[0].tolist(), table[1].tolist()


def _title(header: bytes) -> str | None:
    if not header.startswith(_TITLE_START):
        return None
    at = len(_TITLE_START)
    # BER: one byte of length, or 0x80 + the number of length bytes that follow.
    if header[at] < 0x80:
        length, at = header[at], at + 1
    else:
        more = header[at] & 0x7F
        length = int.from_bytes(header[at + 1 : at + 1 + more], "big")
        at += 1 + more
    return header[at : at + length].decode("ascii", errors="replace")


def main(arguments: Sequence[str] | None = None) -> None:
    paths = [Path(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    if not paths:
        sys.exit("usage: blast.py FOLDER_OR_PREFIX... > proteins.fasta")
    left_out = 0
    try:
        for path in paths:
            inside = sorted(path.rglob("*.pin")) if path.is_dir() else []
            for prefix in [index.with_suffix("") for index in inside] or [path]:
                for title, sequence in read_blast_database(prefix):
                    if is_protein(sequence):
                        print(f">{title.split('|')[0].strip()}\n{sequence}")
                    else:
                        left_out += 1
    except UserError as error:
        sys.exit(f"blast: {error}")
    print(f"{left_out:,} records left out", file=sys.stderr)


if __name__ == "__main__":
    main()
