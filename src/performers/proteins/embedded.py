"""Protein sequences and two protein language models that ship with the library.

The sequences are about 2 million residues of UniProtKB/Swiss-Prot (CC BY 4.0, The UniProt
Consortium) in whole families; `data/README.md` says how they were chosen.
"""

from __future__ import annotations

import os
from pathlib import Path

PRETRAINED = "performers-protein-small"
"""Name of the model of single proteins, which commands take in the place of a folder."""

READS_RELATIVES = "performers-protein-relatives"
"""Likewise of the model that reads a protein with relatives."""

SPLITS = ("train", "validation", "test", "ood")
"""The names `embedded_fasta` takes. The first three share their families; `ood` has its own."""

_DATA = Path(__file__).resolve().parent / "data"


def embedded_fasta(split: str) -> Path:
    """Return the path of an embedded FASTA file, compressed with gzip.

    Each header reads `>ACCESSION family=NAME`: a UniProt accession, and the accession of the
    representative of its family.

    Raises:
        ValueError: `split` is not one of `SPLITS`.
        FileNotFoundError: The installation lacks the file.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")
    path = _DATA / f"{split}.fasta.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; reinstall performers")
    return path


def pretrained_folder(name: str = PRETRAINED) -> Path:
    """Return the folder of a model that ships, for ``load_model``.

    Its README is the model card.

    Raises:
        FileNotFoundError: The installation lacks the model.
    """
    folder = _DATA / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is missing; reinstall performers")
    return folder


def model_folder(path: str | os.PathLike[str]) -> Path:
    """Return the folder of a model, which may be the name of one that ships."""
    folder = Path(path)
    ships = str(folder) in (PRETRAINED, READS_RELATIVES) and not folder.exists()
    return pretrained_folder(str(folder)) if ships else folder
