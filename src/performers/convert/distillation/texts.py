"""Examples from text and FASTA files: read a block at a time, test examples kept apart."""

from __future__ import annotations

import gzip
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

Example = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, int64 vectors; collated by ``batches.Collator``."""

_GZIP_MARK, _UTF8_MARK = b"\x1f\x8b", b"\xef\xbb\xbf"
# Examples in a block of the file, and blocks whose examples are mixed with one another.
_BLOCK, _MIXED = 32, 16
_BYTES_PER_TOKEN = 4
# Minimum bytes of a sequence and its header.
_SHORTEST = 32
# A word longer than this many bytes may be cut.
_LONGEST_WORD = 1 << 10
_SPACE = re.compile(rb"\s")
_PIECE = 1 << 16
# Seeds have 32 bits; passes are counted below them.
_PASSES = 1 << 24


@dataclass(frozen=True)
class TextSplits:
    """Examples from parts of a file that share no token.

    Those of ``calibration`` are spread over the part of ``train``, an endless stream; those of
    ``test`` are the end of the file.
    """

    calibration: list[Example]
    train: TextExamples
    test: list[Example]


def split_text(
    tokenizer: Any,
    path: str | Path,
    length: int,
    *,
    calibration: int = 16,
    test: int | float = 32,
    seed: int = 0,
) -> TextSplits:
    """Split a text or FASTA file into examples for calibration, training and testing.

    A text becomes windows of ``length`` tokens, each between the special tokens that the tokenizer
    puts around a text. A FASTA file (its first character is ``>``) becomes one example per
    sequence, with a word for each residue, cut at ``length``. A file compressed by gzip is
    decompressed to a temporary one. The file is read a block at a time, and only the token ids of
    calibration and test are kept.

    ``length`` includes special tokens. ``test`` is the number of test examples, or their share of
    the file between 0 and 1; ``seed`` sets the order of training. Sequences of a FASTA file are not
    compared: relatives of test sequences may be in the training part unless the file keeps them
    apart.
    """
    if test < 1 and not (isinstance(test, float) and test > 0):
        raise ValueError(
            f"test must be a number of examples, at least 1, or a share between 0 and 1, got {test}"
        )
    file = TextFile(tokenizer, Path(path), length)
    begin, tested = _tail(file, test)
    train = TextExamples(file, begin, seed=seed)
    fitted = train.set_aside(calibration)
    if len(fitted) < calibration or next(iter(train), None) is None:
        raise ValueError(
            f"{path} has too little text: besides {len(tested)} test examples of {length} tokens "
            f"there must be more than {calibration}, for calibration and training; pass a longer "
            "file or ask for shorter or fewer examples"
        )
    file.check_known(torch.cat([example["input_ids"] for example in fitted + tested]))
    return TextSplits(fitted, train, tested)


class TextExamples(IterableDataset[Example]):
    """Examples from the beginning of a file, in a new order for every pass.

    Blocks of the file come in random order, and the examples of `_MIXED` blocks are mixed. The
    order depends on the seed alone, so that a run resumes by skipping examples. Workers of a
    ``DataLoader`` share the examples between them. Without ``passes`` the stream has no end.
    """

    passes: int | None = None

    def __init__(self, file: TextFile, stop: int, *, seed: int) -> None:
        self.seed = seed
        self._file, self._stop = file, stop
        self._count = max(1, (stop - file.start) // (_BLOCK * file.body * _BYTES_PER_TOKEN))
        # Number of examples at the beginning of a block that `set_aside` took.
        self._aside: dict[int, int] = {}

    def set_aside(self, count: int) -> list[Example]:
        """Take up to ``count`` examples, spread over the file, out of the stream."""
        taken: list[Example] = []
        blocks = min(count, self._count)
        chosen = [(2 * i + 1) * self._count // (2 * blocks) for i in range(blocks)]
        for number, block in enumerate(chosen):
            # Later blocks make up for earlier ones with too few examples.
            share = -(-(count - len(taken)) // (blocks - number))
            found = self._examples(block)[:share]
            self._aside[block] = len(found)
            taken += found
        return taken

    def __iter__(self) -> Iterator[Example]:
        """Iterate over the examples, pass after pass."""
        worker = get_worker_info()
        stream = self._stream()
        return stream if worker is None else islice(stream, worker.id, None, worker.num_workers)

    def _stream(self) -> Iterator[Example]:
        number = 0
        while self.passes is None or number < self.passes:
            generator = torch.Generator().manual_seed(self.seed * _PASSES + number)
            order = torch.randperm(self._count, generator=generator).tolist()
            empty = True
            for first in range(0, self._count, _MIXED):
                mixed = [
                    example
                    for block in order[first : first + _MIXED]
                    for example in self._examples(block)[self._aside.get(block, 0) :]
                ]
                for index in torch.randperm(len(mixed), generator=generator).tolist():
                    empty = False
                    yield mixed[index]
            if empty:
                return
            number += 1

    def _examples(self, block: int) -> list[Example]:
        start, size = self._file.start, self._stop - self._file.start
        edges = [start + size * place // self._count for place in (block, block + 1)]
        # The last block ends where the test part begins, which is a boundary.
        return self._file.examples(*(min(self._file.boundary(edge), self._stop) for edge in edges))


class TextFile:
    """A file that can be cut at many places, each part tokenized by itself."""

    def __init__(self, tokenizer: Any, path: Path, length: int) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer is None: the model's folder has no tokenizer files")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text file")
        self.path, self._source, self._tokenizer = path, path, tokenizer
        self.before, self.after = self._special_tokens()
        special = len(self.before) + len(self.after)
        self.body = length - special
        if self.body < 1:
            raise ValueError(f"length must exceed the {special} special tokens, got {length}")
        if self._bytes(0, len(_GZIP_MARK)) == _GZIP_MARK:
            self._source = self._decompressed()
        self.size = self._source.stat().st_size
        head = self._bytes(0, len(_UTF8_MARK) + 1)
        self.start = len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0
        self.is_fasta = head[self.start : self.start + 1] == b">"

    def _decompressed(self) -> Path:
        """A temporary copy of a compressed file, which is deleted with this object."""
        folder = tempfile.mkdtemp(prefix="performers-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        plain = Path(folder) / "plain"
        try:
            with gzip.open(self.path) as packed, plain.open("wb") as copy:
                shutil.copyfileobj(packed, copy)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.path} is a damaged gzip file: {error}") from error
        return plain

    def boundary(self, offset: int) -> int:
        """Find the first place at or after a byte where the file can be cut."""
        if offset <= self.start:
            return self.start
        if offset >= self.size:
            return self.size
        if self.is_fasta:
            for start in range(offset - 1, self.size, _PIECE - 1):
                if (place := self._bytes(start, start + _PIECE).find(b"\n>")) >= 0:
                    return start + place + 1
            return self.size
        following = self._bytes(offset, offset + _LONGEST_WORD)
        # Tokenizers that keep spaces keep them before the word.
        if (space := _SPACE.search(following)) is not None:
            return offset + space.start()
        # Not within a character.
        places = (place for place, byte in enumerate(following) if byte & 0xC0 != 0x80)
        return offset + next(places, self.size - offset)

    def examples(self, start: int, stop: int) -> list[Example]:
        """Examples between two boundaries, without the incomplete window at the end."""
        text = self._text(start, stop)
        if self.is_fasta:
            words = (" ".join(x[: self.body]) for x in self._sequences(text))
            rows = [self._encode(x)[: self.body] for x in words]
        else:
            ids = self._encode(text)
            ends = range(self.body, len(ids) + 1, self.body)
            rows = [ids[end - self.body : end] for end in ends]
        examples = [torch.tensor([*self.before, *row, *self.after]) for row in rows]
        return [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in examples]

    def tokens(self, stop: int) -> list[int]:
        """Token ids up to a boundary, with separators between sequences."""
        text = self._text(self.start, stop)
        if self.is_fasta:
            separator = self._tokenizer.sep_token or self._tokenizer.eos_token or ""
            text = f" {separator} ".join(" ".join(x) for x in self._sequences(text))
        return self._encode(text)

    def check_known(self, ids: Tensor) -> None:
        """Refuse a file with a majority of tokens that are unknown to the tokenizer."""
        unknown = self._tokenizer.unk_token_id
        if unknown is not None and (share := float((ids == unknown).double().mean())) > 0.5:
            raise ValueError(
                f"{self.path}: {share:.0%} of the tokens are unknown to the tokenizer; a model of "
                "proteins needs a FASTA file, a model of text needs text in its language"
            )

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before a text, and those after it."""
        bare, full = self._encode("A"), list(self._tokenizer("A").input_ids)
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        raise ValueError(
            "tokenizer changes a text's tokens when it adds special tokens; unsupported"
        )

    def _encode(self, text: str) -> list[int]:
        """Ids of a text, without a limit on their number."""
        if not text:
            return []
        options = {"add_special_tokens": False, "truncation": False, "padding": False}
        return list(self._tokenizer(text, verbose=False, **options).input_ids)

    def _sequences(self, text: str) -> list[list[str]]:
        """Residues of the sequences of a text, empty ones left out."""
        lines = (record.split("\n")[1:] for record in f"\n{text}".split("\n>"))
        sequences = ([x for x in "".join(each).upper() if x.isalpha()] for each in lines)
        return [residues for residues in sequences if residues]

    def _text(self, start: int, stop: int) -> str:
        try:
            text = self._bytes(start, stop).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not a UTF-8 text file: {error}") from error
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def _bytes(self, start: int, stop: int) -> bytes:
        # Opened for each piece: forked workers would share a position in the file.
        with self._source.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)


def _tail(file: TextFile, test: int | float) -> tuple[int, list[Example]]:
    """Start of the test part, and its examples."""
    if test < 1:
        begin = file.boundary(file.size - int(test * (file.size - file.start)))
        examples = file.examples(begin, file.size)
        if not examples:
            raise ValueError(
                f"{file.path} has too little text: no test example in its last {test:.1%}; pass a "
                "longer file, a larger share or a number of examples"
            )
        return begin, examples
    count = int(test)
    # Sequences may be far shorter than an example, and an excess is lost to training.
    reach = count * (_SHORTEST if file.is_fasta else file.body + 1)
    while True:
        begin = file.boundary(max(file.start, file.size - reach))
        examples = file.examples(begin, file.size)
        if len(examples) >= count:
            return begin, examples[-count:]
        if begin == file.start:
            raise ValueError(
                f"{file.path} has too little text: {len(examples)} examples, and {count} were "
                "asked for to test on alone; pass a longer file or ask for shorter or fewer"
            )
        reach += reach // 2 + 1
