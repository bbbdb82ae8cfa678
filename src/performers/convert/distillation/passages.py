"""Passages of a text or FASTA file, as inputs of a model."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

__all__ = ["check_known", "encode", "is_gzip", "special_tokens", "text_windows"]

_GZIP_MAGIC = b"\x1f\x8b"
# Where a piece of a file is cut, the last word's tokens may be other than those of the whole file.
_MARGIN = 64


def text_windows(
    tokenizer: Any, text: str | Path, length: int, count: int, *, skip: int = 0
) -> Tensor:
    """Cut a text file into consecutive inputs of one length.

    Each window is a passage between the special tokens that the tokenizer puts around a text, such
    as ``[CLS]`` and ``[SEP]``. A FASTA file (its first character is ``>``) is read residue by
    residue; its sequences follow one another with the tokenizer's separator between them.
    Either may be compressed by gzip. Only as much of the file is read as the windows need.

    ``skip`` windows are passed over first. Returns token ids ``(count, length)``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A number is out of range, the file is too short or not UTF-8, or most of it is
            unknown to the tokenizer.
    """
    if tokenizer is None:
        raise ValueError("tokenizer is None: the model's folder has no tokenizer files")
    path = Path(text)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file")
    before, after = special_tokens(tokenizer)
    body = length - len(before) - len(after)
    if body < 1 or count < 1 or skip < 0:
        raise ValueError(
            f"length must exceed the {len(before) + len(after)} special tokens, count be at least "
            f"1 and skip at least 0, got length={length}, count={count}, skip={skip}"
        )
    needed = (skip + count) * body
    ids = torch.tensor(_token_ids(tokenizer, path, needed), dtype=torch.long)
    if len(ids) < needed:
        raise ValueError(
            f"{path} has {len(ids)} tokens, enough for {len(ids) // body} windows of {length}; "
            f"{skip + count} were asked for: pass a longer text or ask for less"
        )
    passages = ids[skip * body : needed].view(count, body)
    check_known(tokenizer, path, passages)
    edges = [torch.tensor(edge, dtype=torch.long).expand(count, -1) for edge in (before, after)]
    return torch.cat([edges[0], passages, edges[1]], dim=1)


def check_known(tokenizer: Any, path: str | Path, ids: Tensor) -> None:
    """Refuse a file of which the tokenizer knows less than half."""
    unknown = tokenizer.unk_token_id
    if unknown is not None and (share := float((ids == unknown).double().mean())) > 0.5:
        raise ValueError(
            f"{path}: {share:.0%} of the tokens are unknown to the tokenizer; a model of proteins "
            "needs a FASTA file, a model of text needs text in its language"
        )


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed by gzip."""
    with path.open("rb") as file:
        return file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before a text, and those that it puts after it."""
    bare = encode(tokenizer, "A")
    full = list(tokenizer("A").input_ids)
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise ValueError("tokenizer changes a text's tokens when it adds special tokens; unsupported")


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a whole text, whatever length the model was made for."""
    return list(
        tokenizer(
            text, add_special_tokens=False, truncation=False, padding=False, verbose=False
        ).input_ids
    )


def _token_ids(tokenizer: Any, path: Path, needed: int) -> Sequence[int]:
    """At least ``needed`` ids from the start of a file, or all that it has."""
    characters = 8 * (needed + _MARGIN)
    while True:
        try:
            with _opened(path) as file:
                piece = file.read(characters)
                ended = not file.read(1)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
        ids = encode(tokenizer, _spaced(tokenizer, piece) if piece[:1] == ">" else piece)
        if ended or len(ids) >= needed + _MARGIN:
            return ids
        characters *= 2


def _opened(path: Path) -> TextIO:
    if is_gzip(path):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _spaced(tokenizer: Any, fasta: str) -> str:
    """The residues of a FASTA file, one word each, with separators between the sequences."""
    separator = tokenizer.sep_token or tokenizer.eos_token or ""
    sequences: list[list[str]] = []
    for line in fasta.splitlines():
        if line.startswith(">"):
            sequences.append([])
        else:
            sequences[-1].extend(letter for letter in line.upper() if letter.isalpha())
    return f" {separator} ".join(" ".join(residues) for residues in sequences if residues)
