"""Training examples from a file: read a block at a time, parted from those that test the result."""

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

from performers.convert.distillation.passages import check_known, encode, is_gzip, special_tokens

__all__ = ["Example", "TextExamples", "TextSplits", "split_text"]

Example = dict[str, Tensor]
"""``input_ids`` and ``attention_mask``, int64 vectors; collated by ``batches.Collator``."""

_UTF8_MARK = b"\xef\xbb\xbf"
# Examples in a block of the file, and blocks whose examples are mixed with one another.
_BLOCK, _MIXED = 32, 16
_BYTES_PER_TOKEN = 4
# Bytes of a sequence and its header, at least.
_SHORTEST = 32
# How far a space is looked for before a text is cut between letters.
_LONGEST_WORD = 1 << 10
_SPACE = re.compile(rb"\s")
_PIECE = 1 << 16
# A seed has 32 bits; passes are counted below it.
_PASSES = 1 << 24


@dataclass(frozen=True)
class TextSplits:
    """Three parts of a file that share no token.

    Attributes:
        calibration: Examples to fit features to, spread over the part that is trained on.
        train: A stream of all others there, without end.
        test: Examples from the end of the file.
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
    """Examples of a text or FASTA file for calibration, training and testing.

    A text becomes windows of ``length`` tokens, each between the special tokens that the tokenizer
    puts around a text. A FASTA file (its first character is ``>``) becomes one example a sequence,
    read residue by residue and cut at ``length``. Either may be compressed by gzip; it is then
    unpacked to a temporary file. The file is read a block at a time, in whatever order examples
    are asked for, and no token ids are kept but those of calibration and test.

    The test part is the end of the file. Sequences of a FASTA file are not compared: relatives of
    test sequences may be among those trained on unless the file keeps them apart.

    Args:
        tokenizer: A transformers tokenizer.
        path: Path of the file.
        length: Tokens in an example, at most; special tokens included.
        calibration: Number of examples to calibrate on; may be 0.
        test: Number of examples to test on, or the share of the file's bytes, between 0 and 1.
        seed: Random seed of the order of training.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is None: the model's folder has no tokenizer files")
    if calibration < 0:
        raise ValueError(f"calibration must be at least 0, got {calibration}")
    if test < 1 and not (isinstance(test, float) and test > 0):
        raise ValueError(
            f"test must be a number of examples, at least 1, or a share between 0 and 1, got {test}"
        )
    file = _File(tokenizer, Path(path), length)
    begin, tested = _tail(file, test)
    train = TextExamples(file, begin, seed=seed)
    fitted = train.set_aside(calibration)
    if len(fitted) < calibration or next(iter(train), None) is None:
        raise ValueError(
            f"{path} has too little text: besides {len(tested)} test examples of {length} tokens "
            f"there must be more than {calibration}, for calibration and training; pass a longer "
            "file or ask for shorter or fewer examples"
        )
    check_known(tokenizer, path, torch.cat([example["input_ids"] for example in fitted + tested]))
    return TextSplits(fitted, train, tested)


class TextExamples(IterableDataset[Example]):
    """Examples from the beginning of a file, in an order drawn anew for every pass.

    Blocks of the file come in random order, and the examples of `_MIXED` blocks are mixed. The
    order depends on the seed alone, so that a run is resumed by skipping what it has seen. Workers
    of a ``DataLoader`` share the examples between them.

    Args:
        file: Where they come from.
        stop: The byte before which they lie.
        seed: Of the orders.
        passes: How often the whole is gone through; None: without end.
    """

    def __init__(self, file: _File, stop: int, *, seed: int = 0, passes: int | None = None) -> None:
        self.seed, self.passes = seed, passes
        self._file, self._stop = file, stop
        self._count = max(1, (stop - file.start) // (_BLOCK * file.body * _BYTES_PER_TOKEN))
        # Examples at the beginning of a block that are used for something else.
        self._aside: dict[int, int] = {}

    def set_aside(self, count: int) -> list[Example]:
        """Up to ``count`` examples, spread over the file, that training will not see."""
        taken: list[Example] = []
        blocks = min(count, self._count)
        chosen = [(2 * i + 1) * self._count // (2 * blocks) for i in range(blocks)]
        for number, block in enumerate(chosen):
            # What earlier blocks lacked falls to those that are left.
            share = -(-(count - len(taken)) // (blocks - number))
            found = self._examples(block)[:share]
            self._aside[block] = len(found)
            taken += found
        return taken

    def __iter__(self) -> Iterator[Example]:
        """Examples, pass after pass."""
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


class _File:
    """A file that can be cut at any of many places, each part tokenized by itself."""

    def __init__(self, tokenizer: Any, path: Path, length: int) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text file")
        self.path, self._tokenizer = path, tokenizer
        self._before, self._after = special_tokens(tokenizer)
        self.body = length - len(self._before) - len(self._after)
        if self.body < 1:
            raise ValueError(
                f"length must exceed the {len(self._before) + len(self._after)} special tokens, "
                f"got {length}"
            )
        self._open(path)
        self.size = self._plain.stat().st_size
        head = self._bytes(0, len(_UTF8_MARK) + 1)
        self.start = len(_UTF8_MARK) if head.startswith(_UTF8_MARK) else 0
        self.is_fasta = head[self.start : self.start + 1] == b">"

    def boundary(self, offset: int) -> int:
        """The first place at or after a byte where the file can be cut."""
        if offset <= self.start:
            return self.start
        if offset >= self.size:
            return self.size
        if self.is_fasta:
            return self._find(b"\n>", offset - 1)
        near = self._bytes(offset, offset + _LONGEST_WORD)
        # Tokenizers that keep spaces keep them before the word.
        if (space := _SPACE.search(near)) is not None:
            return offset + space.start()
        for place, byte in enumerate(near):
            # Not inside a character.
            if byte & 0xC0 != 0x80:
                return offset + place
        return self.size

    def examples(self, start: int, stop: int) -> list[Example]:
        """The examples of the bytes between two boundaries; what fills no window is left out."""
        try:
            text = self._bytes(start, stop).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not a UTF-8 text file: {error}") from error
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.is_fasta:
            rows = [self._residues(record) for record in f"\n{text}".split("\n>") if record]
            return [self._example(row) for row in rows if row]
        ids = encode(self._tokenizer, text) if text else []
        windows = range(0, len(ids) - self.body + 1, self.body)
        return [self._example(ids[begin : begin + self.body]) for begin in windows]

    def _residues(self, record: str) -> list[int]:
        letters = (x for line in record.split("\n")[1:] for x in line.upper() if x.isalpha())
        residues = " ".join(islice(letters, self.body))
        return encode(self._tokenizer, residues)[: self.body] if residues else []

    def _example(self, ids: list[int]) -> Example:
        row = torch.tensor([*self._before, *ids, *self._after], dtype=torch.long)
        return {"input_ids": row, "attention_mask": torch.ones_like(row)}

    def _find(self, mark: bytes, start: int) -> int:
        while start < self.size:
            piece = self._bytes(start, start + _PIECE)
            if (place := piece.find(mark)) >= 0:
                return start + place + 1
            start += _PIECE - 1
        return self.size

    def _bytes(self, start: int, stop: int) -> bytes:
        # Opened for each piece: workers that were forked would share a position in the file.
        with self._plain.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def _open(self, path: Path) -> None:
        self._plain = path
        if not is_gzip(path):
            return
        folder = tempfile.mkdtemp(prefix="performers-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._plain = Path(folder) / "plain"
        try:
            with gzip.open(path) as packed, self._plain.open("wb") as plain:
                shutil.copyfileobj(packed, plain)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error


def _tail(file: _File, test: int | float) -> tuple[int, list[Example]]:
    """Where the test part begins, and its examples."""
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
    # Sequences may be far shorter than an example: what is read in excess is lost to training.
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
