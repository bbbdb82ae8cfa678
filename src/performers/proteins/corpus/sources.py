"""Where a corpus comes from: a UniProt release, FASTA files, or BLAST databases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from performers.app.errors import UserError
from performers.proteins.corpus.blast import read_blast_database
from performers.proteins.corpus.download import describe_release, download
from performers.proteins.inputs.fasta import iter_fasta
from performers.proteins.inputs.tokenizer import AMBIGUOUS, AMINO_ACIDS
from performers.proteins.options import UNIPROT

UNIPROT_LICENCE = "CC BY 4.0, The UniProt Consortium (https://www.uniprot.org)"
_RESIDUES = frozenset(AMINO_ACIDS + AMBIGUOUS)
# UniProt's FASTA headers are db|ACCESSION|NAME.
_UNIPROT_NAME = re.compile(r"^(?:sp|tr)\|([^|\s]+)\|")


class Source(NamedTuple):
    """Sequences and where they are from.

    Attributes:
        files: FASTA files, or prefixes of BLAST databases.
        description: What the manifest says of it.
    """

    files: tuple[Path, ...]
    description: dict[str, Any]

    def records(self) -> Iterator[tuple[str, str]]:
        """Yield (accession or name, sequence)."""
        for path in self.files:
            if path.with_name(path.name + ".pin").is_file():
                for title, sequence in read_blast_database(path):
                    # A title is the accession, and whatever its makers wanted after a bar.
                    name = title.split("|")[0].strip()
                    if len(name.split()) != 1:
                        raise UserError(f"{path}: the title {title[:40]!r} begins with no name")
                    yield name, sequence
            else:
                for record in iter_fasta(path):
                    uniprot = _UNIPROT_NAME.match(record.name)
                    yield uniprot[1] if uniprot else record.name, record.sequence


def open_source(
    paths: Sequence[Path],
    downloads: Path,
    *,
    url: str | None = None,
    licence: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """Find the sequences, downloading them where none are given.

    Args:
        paths: FASTA files (plain or gzip), BLAST databases (the path without ``.pin``, or the
            ``.pin`` file), or folders with BLAST databases anywhere in them; empty: the current
            release of Swiss-Prot is downloaded from ``url``.
        downloads: Folder for a download. A file that is complete there is not asked for again.
        url: Of the FASTA file in a UniProt release; that of Swiss-Prot when None.
        licence: What the manifest says; UniProt's for a download when None, and otherwise that
            none was stated.
        progress: Called with bytes there and bytes in all while downloading.

    Raises:
        UserError: A path holds no sequences, or the download fails.
    """
    if not paths:
        address = url or UNIPROT
        path = downloads / address.rpartition("/")[2]
        # Which release it is of is known at the time of the download only.
        release_file = path.with_name(path.name + ".release")
        if not (path.exists() and release_file.exists()):
            expected = describe_release(address)
            download(address, path, expected, progress=progress)
            release_file.write_text(expected.version, encoding="utf-8")
        about = {
            "url": address,
            "release": release_file.read_text(encoding="utf-8"),
            "licence": licence or UNIPROT_LICENCE,
        }
        return Source((path,), {**about, "files": [fingerprint(path)]})
    if url is not None:
        raise UserError("--url is where Swiss-Prot is downloaded from without --source; give one")
    found = [file for path in paths for file in _sequence_files(path)]
    files = [
        fingerprint(psq if (psq := path.with_name(path.name + ".psq")).exists() else path, path)
        for path in found
    ]
    return Source(tuple(found), {"licence": licence or "not stated", "files": files})


def is_protein(sequence: str) -> bool:
    """Whether a sequence has residues and nothing else (BLAST databases may hold ``*`` and -)."""
    return bool(sequence) and _RESIDUES.issuperset(sequence)


def _sequence_files(path: Path) -> list[Path]:
    if path.suffix == ".pin":
        path = path.with_suffix("")
    if path.with_name(path.name + ".pin").is_file() or path.is_file():
        return [path]
    if path.is_dir():
        databases = sorted(index.with_suffix("") for index in path.rglob("*.pin"))
        if databases:
            return databases
        raise UserError(f"--source {path} has no BLAST database (.pin); name the FASTA files in it")
    raise UserError(f"--source {path} does not exist")


def fingerprint(file: Path, named: Path | None = None) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file, under the name of another if it belongs to that."""
    named = named or file
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:
            digest = hashlib.sha256()
            while block := handle.read(1 << 20):
                digest.update(block)
    return {
        "name": f"{named.parent.name}/{named.name}" if file != named else named.name,
        "bytes": file.stat().st_size,
        "sha256": digest.hexdigest(),
    }
