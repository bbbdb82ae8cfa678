"""The protein sequences that ship with the library.

About 2 million residues of UniProtKB/Swiss-Prot (CC BY 4.0, The UniProt Consortium) in whole
families; `data/README.md` beside this file says how they were chosen.
"""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "validation", "test", "ood")
"""The names `embedded_fasta` takes. The first three share their families; `ood` has its own."""

_DATA = Path(__file__).resolve().parent / "data"


def embedded_fasta(split: str) -> Path:
    """Return the path of an embedded FASTA file, compressed with gzip.

    Each header reads `>ACCESSION family=NAME`: a UniProt accession, and the accession of the
    representative of its family.

    Args:
        split: one of `SPLITS`.

    Returns:
        Path of `<split>.fasta.gz` inside the installed package.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
        FileNotFoundError: the installation lacks the file.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    path = _DATA / f"{split}.fasta.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall performers")
    return path
