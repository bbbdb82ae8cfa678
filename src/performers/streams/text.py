"""Folders of texts as tokens on disk, and the bytes of files as tokens."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from performers.app.errors import UserError

SUFFIX = ".txt"
_SHOWN = 3
_HEAD = 8192
_PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """Tokens ``start`` to ``stop`` of a file, read as one text of ``size`` bytes."""

    path: Path
    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Texts:
    """Texts whose tokens, of type ``dtype``, stay on disk; a slice of one is read at a time.

    Each has two tokens at least.
    """

    documents: tuple[Document, ...]
    dtype: str = "u1"

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each text."""
        return np.array([len(document) for document in self.documents], dtype=np.int64)

    @property
    def size(self) -> int:
        """Bytes of all texts."""
        return sum(document.size for document in self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of all texts."""
        return int(self.lengths.sum())

    def read(self, document: int, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens ``start`` to ``stop`` of a text, fewer where it ends before."""
        found = self.documents[document]
        stop = min(stop, len(found))
        mapped = np.memmap(found.path, dtype=self.dtype, mode="r")
        return np.array(mapped[found.start + start : found.start + stop], dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of where texts begin."""
        digest = hashlib.sha256(self.dtype.encode())
        for document in self.documents:
            digest.update(len(document).to_bytes(8, "little"))
            mapped = np.memmap(document.path, dtype=self.dtype, mode="r")
            for first in range(document.start, document.stop, _PIECE):
                digest.update(mapped[first : min(first + _PIECE, document.stop)].tobytes())
        return digest.hexdigest()

    def split(self, share: float, seed: int) -> tuple[Texts, Texts]:
        """Texts to train on, and texts with about a share of all tokens to validate on.

        Whole texts are drawn with the seed; of a single one it is the end.
        """
        if len(self.documents) == 1:
            only = self.documents[0]
            held = int(share * len(only))
            if held < 2 or len(only) - held < 2:
                return self, replace(self, documents=())
            cut, size = only.stop - held, round(only.size * held / len(only))
            begun = replace(only, stop=cut, size=only.size - size)
            ended = replace(only, start=cut, size=size)
            return replace(self, documents=(begun,)), replace(self, documents=(ended,))
        left, taken = share * self.tokens, set[int]()
        for index in np.random.default_rng(seed).permutation(len(self.documents)).tolist():
            if len(self.documents[index]) <= left:
                taken.add(index)
                left -= len(self.documents[index])
        kept, held_out = list[Document](), list[Document]()
        for index, document in enumerate(self.documents):
            (held_out if index in taken else kept).append(document)
        return replace(self, documents=tuple(kept)), replace(self, documents=tuple(held_out))


def is_text(path: Path) -> bool:
    """True for a file with the suffix of texts, or a folder that holds one."""
    if path.is_dir():
        return any(map(_is_listed, path.rglob("*")))
    return path.suffix.lower() == SUFFIX


def _is_listed(path: Path) -> bool:
    return path.suffix.lower() == SUFFIX and not path.is_dir()


def find_texts(paths: Iterable[Path]) -> list[Path]:
    """The files of texts among paths and in folders, in order of their names within each.

    All entries of a folder with the suffix are listed, also those that are no files.

    Raises:
        UserError: A path does not exist or is no text, or a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            within = sorted(file for file in path.rglob("*") if _is_listed(file))
            if not within:
                raise UserError(f"{path} holds no {SUFFIX} files; give a folder of texts")
            files += within
        elif not path.exists():
            raise UserError(f"{path} does not exist; give {SUFFIX} files or folders of them")
        elif not is_text(path) or not path.is_file():
            raise UserError(
                f"{path} is no {SUFFIX} file; give texts alone, or sequences (FASTA) alone"
            )
        else:
            files.append(path)
    counts = Counter(file.resolve() for file in files)
    doubled = [file for file, count in counts.items() if count > 1]
    if doubled:
        raise UserError(f"{min(doubled)} is given more than once; name each text once")
    return files


def read_bytes(files: Sequence[Path], report: Callable[[str], None]) -> Texts:
    """Texts as bytes, straight from their files; each kind of file that is left out is reported.

    Raises:
        UserError: No file can be used.
    """
    left_out: LeftOut = {}
    documents = [
        Document(file, 0, size, size) for file in files if (size := usable_bytes(file, left_out))
    ]
    report_left_out(left_out, documents, len(files), report)
    return Texts(tuple(documents))


LeftOut = dict[str, list[str]]
"""Names of files that are left out, by the reason."""


def listed(names: Sequence[str]) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def usable_bytes(file: Path, left_out: LeftOut) -> int:
    """Bytes of a file that can be read as text; 0 for any other, which is added."""
    size = file.stat().st_size if file.is_file() else 0
    if not file.is_file():
        kind = "no regular files"
    elif not os.access(file, os.R_OK):
        kind = "not readable"
    elif not size:
        kind = "empty"
    elif size == 1:
        kind = "of one byte, which has no next one to predict"
    else:
        with file.open("rb") as source:
            if b"\0" not in source.read(_HEAD):
                return size
        kind = "binary or UTF-16 (they have zero bytes)"
    left_out.setdefault(kind, []).append(file.name)
    return 0


def report_left_out(
    left_out: LeftOut, documents: Sequence[Document], files: int, report: Callable[[str], None]
) -> None:
    """Report what is left out of so many files; raises UserError if nothing else is left."""
    lines = [
        f"{len(names)} of {files} files left out as {kind}: {listed(names)}"
        for kind, names in left_out.items()
    ]
    if not documents:
        raise UserError(f"there is no text to read; {'; '.join(lines)}")
    for line in lines:
        report(line)
