"""Folders of texts as tokens on disk: the bytes of the files, or subwords written once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from performers.app.errors import UserError
from performers.app.files import replacement, write_json

SUFFIX = ".txt"
BYTES = 256
"""Size of the vocabulary of bytes."""

_SHOWN = 3
_HEAD = 8192
_PIECE = 1 << 20


@dataclass(frozen=True)
class Document:
    """A part of a file of tokens that is read as one text.

    Attributes:
        path: File of unsigned integers of ``dtype``.
        start: First token.
        stop: Token after the last one.
        size: Bytes of the text.
    """

    path: Path
    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Texts:
    """Texts whose tokens stay on disk; a slice of one is read at a time.

    Attributes:
        documents: The texts, each with two tokens at least.
        dtype: Type of the tokens in the files.
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
        wanted, taken = share * self.tokens, set[int]()
        for index in np.random.default_rng(seed).permutation(len(self.documents)).tolist():
            if sum(len(self.documents[i]) for i in taken) + len(self.documents[index]) > wanted:
                continue
            taken.add(index)
        kept, held_out = list[Document](), list[Document]()
        for index, document in enumerate(self.documents):
            (held_out if index in taken else kept).append(document)
        return replace(self, documents=tuple(kept)), replace(self, documents=tuple(held_out))


def is_text(path: Path) -> bool:
    """True for a file with the suffix of texts, or a folder that holds one."""
    if path.is_dir():
        return any(path.rglob(f"*{SUFFIX}"))
    return path.suffix.lower() == SUFFIX


def find_texts(paths: Iterable[Path]) -> list[Path]:
    """The files of texts among paths and in folders, in order of their names within each.

    Raises:
        UserError: A path does not exist or is no text, or a folder holds none.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            within = sorted(file for file in path.rglob(f"*{SUFFIX}") if file.is_file())
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
    doubled = {file.resolve() for file in files if files.count(file) > 1}
    if doubled:
        raise UserError(f"{min(doubled)} is given more than once; name each text once")
    return files


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Tokenizer whose 256 tokens are the bytes, numbered by their values."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[x]: x for x in range(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for a `byte_tokenizer`, also one that was saved."""
    letters = bytes_to_unicode()
    return tokenizer.get_vocab() == {letters[value]: value for value in range(BYTES)}


def load_tokenizer(path: Path, max_length: int) -> PreTrainedTokenizerBase:
    """Load a tokenizer of subwords from a ``tokenizer.json`` or the folder of a model.

    Raises:
        UserError: There is no tokenizer, or it cannot be read.
    """
    if not path.exists():
        raise UserError(f"--tokenizer {path} does not exist; give a tokenizer.json or its folder")
    try:
        if path.is_dir():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        else:
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:
        # The tokenizers library raises the base class itself.
        if type(error) is not Exception and not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--tokenizer {path} cannot be read ({reason}); give a tokenizer.json or its folder"
        ) from error
    tokenizer.model_max_length = max_length
    return tokenizer


def read_bytes(files: Sequence[Path], report: Callable[[str], None]) -> Texts:
    """Texts as bytes, straight from their files.

    Args:
        files: Files of texts.
        report: Called with a line for each kind of file that is left out.

    Raises:
        UserError: No file can be used.
    """
    kinds = _Kinds()
    documents = []
    for file in files:
        size = file.stat().st_size
        if kinds.usable(file, size):
            documents.append(Document(file, 0, size, size))
    return Texts(tuple(kinds.checked(documents, files, report)))


def write_subwords(
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    report: Callable[[str], None],
) -> Texts:
    """Texts as subwords, which are written to a folder once and read from it from then on.

    A text is encoded in pieces of about 1 MB that end with a line.

    Args:
        files: Files of texts in UTF-8.
        tokenizer: The tokenizer.
        folder: Receives ``tokens.bin`` and ``tokens.json``.
        report: As in `read_bytes`.

    Raises:
        UserError: No file can be used.
    """
    dtype = "<u2" if len(tokenizer) <= 1 << 16 else "<u4"
    source = hashlib.sha256(f"{sorted(tokenizer.get_vocab().items())}".encode())
    for file in files:
        source.update(f"{file}\0{file.stat().st_size}\0{file.stat().st_mtime_ns}\n".encode())
    data, index = folder / "tokens.bin", folder / "tokens.json"
    if data.exists() and index.exists():
        known = json.loads(index.read_text(encoding="utf-8"))
        if known["source"] == source.hexdigest() and data.stat().st_size == known["size"]:
            for line in known["left_out"]:
                report(line)
            found = [Document(data, *entry) for entry in known["documents"]]
            return Texts(tuple(found), dtype)
    folder.mkdir(parents=True, exist_ok=True)
    kinds, lines = _Kinds(), list[str]()
    documents, place = [], 0
    with replacement(data) as temporary, temporary.open("wb") as out:
        for file in files:
            size = file.stat().st_size
            if not kinds.usable(file, size):
                continue
            begun = place
            try:
                for piece in _pieces(file):
                    encoded = tokenizer(piece, add_special_tokens=False, verbose=False)
                    ids = np.asarray(encoded["input_ids"], dtype=dtype)
                    out.write(ids.tobytes())
                    place += len(ids)
            except UnicodeDecodeError as error:
                out.seek(begun * np.dtype(dtype).itemsize)
                out.truncate()
                place = begun
                kinds.add("not UTF-8 text", file, f" at byte {error.start:,}")
                continue
            if place - begun < 2:
                kinds.add("of fewer than two tokens", file)
            documents.append(Document(data, begun, place, size))
        documents = [document for document in documents if len(document) > 1]
        kinds.checked(documents, files, lines.append)
    entries = [(document.start, document.stop, document.size) for document in documents]
    write_json(
        index,
        {
            "source": source.hexdigest(),
            "size": data.stat().st_size,
            "left_out": lines,
            "documents": entries,
        },
    )
    for line in lines:
        report(line)
    return Texts(tuple(documents), dtype)


def _pieces(file: Path) -> Iterator[str]:
    """Text of a file in pieces of about 1 MB that end with a line, or else before a space."""
    rest, place = b"", 0
    with file.open("rb") as source:
        while block := source.read(_PIECE):
            rest += block
            if len(block) < _PIECE:
                break
            cut = rest.rfind(b"\n") + 1 or max(rest.rfind(b" "), 0)
            if cut:
                yield _decoded(rest[:cut], place)
                rest, place = rest[cut:], place + cut
    if rest:
        yield _decoded(rest, place)


def _decoded(block: bytes, place: int) -> str:
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnicodeDecodeError(
            error.encoding, error.object, error.start + place, error.end + place, error.reason
        ) from error


class _Kinds:
    """Files that are left out, by the reason."""

    def __init__(self) -> None:
        self.files: dict[str, list[str]] = {}

    def add(self, kind: str, file: Path, where: str = "") -> None:
        self.files.setdefault(kind, []).append(f"{file.name}{where}")

    def usable(self, file: Path, size: int) -> bool:
        """True for a file that can be read as text; any other is added."""
        if not os.access(file, os.R_OK):
            self.add("not readable", file)
        elif not size:
            self.add("empty", file)
        elif size == 1:
            self.add("of one byte, which has no next one to predict", file)
        else:
            with file.open("rb") as source:
                binary = b"\0" in source.read(_HEAD)
            if not binary:
                return True
            self.add("binary or UTF-16 (they have zero bytes)", file)
        return False

    def checked(
        self, documents: list[Document], files: Sequence[Path], report: Callable[[str], None]
    ) -> list[Document]:
        """Report what is left out; raises UserError if nothing else is left."""
        lines = []
        for kind, names in self.files.items():
            shown = ", ".join(names[:_SHOWN])
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names)} of {len(files)} files left out as {kind}: {shown}{more}")
        if not documents:
            raise UserError(f"there is no text to read; {'; '.join(lines)}")
        for line in lines:
            report(line)
        return documents
