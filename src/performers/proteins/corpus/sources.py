"""Sources of a corpus: a UniProt release, or FASTA files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from performers.app.errors import UserError
from performers.app.files import sha256
from performers.app.progress import Progress
from performers.proteins.corpus.download import download
from performers.proteins.options import UNIPROT

UNIPROT_LICENCE = "CC BY 4.0, The UniProt Consortium (https://www.uniprot.org)"
# UniProt's FASTA headers are db|ACCESSION|NAME.
_UNIPROT_NAME = re.compile(r"^(?:sp|tr)\|([^|\s]+)\|")


class Source(NamedTuple):
    """Sequences and their origin.

    Attributes:
        files: FASTA files.
        description: What the manifest says of it.
    """

    files: tuple[Path, ...]
    description: dict[str, Any]


def protein_name(word: str) -> str:
    """The accession in the first word of a header of UniProt; other words as they are."""
    uniprot = _UNIPROT_NAME.match(word)
    return uniprot[1] if uniprot else word


def open_source(
    paths: Sequence[Path],
    downloads: Path,
    *,
    url: str | None = None,
    licence: str | None = None,
    progress: Progress | None = None,
) -> Source:
    """Find the sequences, downloading them where none are given.

    Args:
        paths: FASTA files; empty: the current release of Swiss-Prot is downloaded.
        downloads: Folder for a download. A file that is complete there is not asked for again.
        url: Another FASTA file in a UniProt release to download.
        licence: Licence for the manifest; by default UniProt's for a download, and otherwise that
            none was stated.
        progress: Called with bytes there and bytes in all while downloading.

    Raises:
        UserError: A path is no file, or the download fails.
    """
    if not paths:
        address = url or UNIPROT
        path = downloads / address.rpartition("/")[2]
        # The release is known at the time of the download only.
        release_file = path.with_name(path.name + ".release")
        if not (path.exists() and release_file.exists()):
            release_file.write_text(download(address, path, progress=progress), encoding="utf-8")
        about = {
            "url": address,
            "release": release_file.read_text(encoding="utf-8"),
            "licence": licence or UNIPROT_LICENCE,
        }
        return Source((path,), {**about, "files": [fingerprint(path)]})
    if url is not None:
        raise UserError("--url is where Swiss-Prot is downloaded from without --source; give one")
    return given_source(paths, licence=licence, flag="--source ")


def given_source(paths: Sequence[Path], *, licence: str | None = None, flag: str = "") -> Source:
    """The sequences of files; messages begin with ``flag``.

    Raises:
        UserError: A path is no regular file, or two files are the same.
    """
    for path in paths:
        if not path.exists():
            raise UserError(f"{flag}{path} does not exist")
        if path.is_dir():
            raise UserError(f"{flag}{path} is a folder; name the FASTA files in it")
        if not path.is_file():
            raise UserError(f"{flag}{path} is no regular file, and is read twice; write it to one")
    files = [fingerprint(path) for path in paths]
    hashes = [file["sha256"] for file in files]
    for number, digest in enumerate(hashes):
        if digest in hashes[:number]:
            same = paths[hashes.index(digest)]
            raise UserError(f"{flag}{paths[number]} has the content of {same}; name it once")
    return Source(tuple(paths), {"licence": licence or "not stated", "files": files})


def fingerprint(file: Path) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file."""
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": sha256(file)}
