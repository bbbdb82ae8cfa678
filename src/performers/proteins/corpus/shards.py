"""Token files: shards that are memory-mapped, so that a corpus of any size opens at once.

A split of a corpus is a folder of shards. Shard n is three files: ``00000.tokens.npy`` (uint8, the
token ids of all its sequences, each with its begin and end token), ``00000.offsets.npy`` (int64,
where each sequence starts, and the end), and ``00000.names.txt`` (a name a line). Plain NumPy
arrays: ``numpy.load(path, mmap_mode="r")`` reads them anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.app.errors import UserError
from performers.app.files import read_json
from performers.proteins.inputs.tokenizer import AMBIGUOUS, AMINO_ACIDS, SPECIAL_TOKENS
from performers.proteins.options import SplitOptions
from performers.proteins.probe.labels import read_groups

Tokens = npt.NDArray[np.uint8]
Lengths = npt.NDArray[np.int64]

FORMAT = "performers-corpus-1"
VOCABULARY = (*SPECIAL_TOKENS, *AMINO_ACIDS, *AMBIGUOUS)

_BOS, _EOS = SPECIAL_TOKENS.index("<bos>"), SPECIAL_TOKENS.index("<eos>")
_FIRST_RESIDUE = len(SPECIAL_TOKENS)
_LETTERS = np.frombuffer((AMINO_ACIDS + AMBIGUOUS).encode(), dtype=np.uint8)
_IDS = np.zeros(256, dtype=np.uint8)
_IDS[_LETTERS] = np.arange(_FIRST_RESIDUE, len(VOCABULARY), dtype=np.uint8)
# Bytes that stand for the tokens around a sequence, and the tokens' in decoded text.
_IDS[[1, 2]] = _BOS, _EOS
_SYMBOLS = np.full(256, ord("?"), dtype=np.uint8)
_SYMBOLS[_FIRST_RESIDUE : len(VOCABULARY)] = _LETTERS


def encode(sequences: Sequence[str]) -> tuple[Tokens, Lengths]:
    """Tokens of the sequences of records, one after another, and the number of tokens of each."""
    text = "".join(f"\1{sequence}\2" for sequence in sequences)
    tokens = _IDS[np.frombuffer(text.encode("ascii"), dtype=np.uint8)]
    return tokens, np.array([len(sequence) + 2 for sequence in sequences], dtype=np.int64)


def decode(tokens: Tokens) -> str:
    """Letters of tokens, with a ``?`` for each that is no residue."""
    return _SYMBOLS[tokens].tobytes().decode("ascii")


class ShardWriter:
    """The shards of one split, written as sequences come; closed once they have so many tokens."""

    def __init__(self, folder: Path, shard_tokens: int = SplitOptions.shard_tokens) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._shard_tokens = folder, shard_tokens
        self._shards: list[dict[str, Any]] = []
        # Of the open shard. Names are lines of a file: a third of the memory of as many strings.
        self._names: list[bytes] = []
        self._tokens: list[Tokens] = []
        self._lengths: list[Lengths] = []
        self._size = 0

    def extend(self, names: Sequence[str], tokens: Tokens, lengths: Lengths) -> None:
        """Add sequences: their names, their tokens one after another, and the tokens of each."""
        ends = np.cumsum(lengths)
        first = begin = 0
        while first < len(names):
            room = self._shard_tokens - self._size
            last = min(int(np.searchsorted(ends, begin + room)) + 1, len(names))
            end = int(ends[last - 1])
            self._names.append("".join(f"{name}\n" for name in names[first:last]).encode())
            # Copies, so that a shard does not hold all that its pieces were cut from.
            self._tokens.append(tokens[begin:end].copy())
            self._lengths.append(lengths[first:last].copy())
            self._size += end - begin
            first, begin = last, end
            if self._size >= self._shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        tokens, lengths = np.concatenate(self._tokens), np.concatenate(self._lengths)
        offsets = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        name = f"{len(self._shards):05d}"
        np.save(self._folder / f"{name}.tokens.npy", tokens)
        np.save(self._folder / f"{name}.offsets.npy", offsets)
        with (self._folder / f"{name}.names.txt").open("wb") as file:
            file.writelines(self._names)
        digest = hashlib.sha256(tokens.data).hexdigest()
        self._shards.append(
            {"name": name, "sequences": lengths.size, "tokens": tokens.size, "sha256": digest}
        )
        self._names, self._tokens, self._lengths, self._size = [], [], [], 0

    def close(self) -> dict[str, Any]:
        """Write the last shard.

        Returns:
            The split's entry in the manifest: ``sequences``, ``residues``, ``tokens``, and of each
            of ``shards`` its ``name``, ``sequences``, ``tokens`` and ``sha256`` of the tokens.
        """
        if self._names:
            self._close_shard()
        sequences = sum(shard["sequences"] for shard in self._shards)
        tokens = sum(shard["tokens"] for shard in self._shards)
        return {
            "sequences": sequences,
            "residues": tokens - 2 * sequences,
            "tokens": tokens,
            "shards": self._shards,
        }


class TokenShards(Sequence[Tokens]):
    """The sequences of one split, as read-only views of memory-mapped files.

    ``entry`` is that of the split in the manifest.

    Raises:
        UserError: A file is missing, or its size differs from that in the manifest.
    """

    def __init__(self, folder: Path, entry: dict[str, Any]) -> None:
        self.folder, self.entry = folder, entry
        self._tokens, self._offsets = [], []
        for shard in entry["shards"]:
            try:
                tokens = np.load(folder / f"{shard['name']}.tokens.npy", mmap_mode="r")
                offsets = np.load(folder / f"{shard['name']}.offsets.npy", mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{folder}: shard {shard['name']} cannot be read ({error}); prepare the corpus "
                    "again"
                ) from error
            if tokens.size != shard["tokens"] or offsets.size != shard["sequences"] + 1:
                raise UserError(
                    f"{folder}: shard {shard['name']} is not the one in the manifest; prepare the "
                    "corpus again"
                )
            self._tokens.append(tokens)
            self._offsets.append(offsets)
        counts = [shard["sequences"] for shard in entry["shards"]]
        self._starts = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each sequence, begin and end included, (sequences,)."""
        if not self._offsets:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([np.diff(offsets) for offsets in self._offsets])

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets = self._offsets[shard]
        place = index - int(self._starts[shard])
        return self._tokens[shard][int(offsets[place]) : int(offsets[place + 1])]

    def sequence(self, index: int) -> str:
        """One protein as letters."""
        return decode(self[index][1:-1])

    @cached_property
    def names(self) -> list[str]:
        """The name of each sequence."""
        return [name for shard in self.entry["shards"] for name in self._shard_names(shard)]

    def _shard_names(self, shard: Mapping[str, Any]) -> list[str]:
        return (self.folder / f"{shard['name']}.names.txt").read_text(encoding="utf-8").split()

    def named(self) -> Iterator[tuple[str, Tokens]]:
        """Yield the name and the tokens of each sequence, with one shard's names in memory."""
        index = 0
        for shard in self.entry["shards"]:
            for name in self._shard_names(shard):
                yield name, self[index]
                index += 1

    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the shards."""
        joined = "".join(shard["sha256"] for shard in self.entry["shards"])
        return hashlib.sha256(joined.encode()).hexdigest()


class Corpus:
    """A folder that ``performers data`` wrote.

    Raises:
        UserError: The folder is not a corpus, or one of another format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json(folder / "manifest.json")
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise UserError(f"{folder} is not a corpus of format {FORMAT}; prepare it again")
        if manifest.get("vocabulary") != list(VOCABULARY):
            raise UserError(f"{folder} was made with another vocabulary; prepare it again")
        self.manifest: dict[str, Any] = manifest

    def split(self, name: str) -> TokenShards:
        """One of ``"train"``, ``"validation"``, ``"test"``, ``"ood"``.

        Raises:
            UserError: The corpus has no such split.
        """
        if name not in self.manifest["splits"]:
            known = ", ".join(self.manifest["splits"])
            raise UserError(f"{self.folder} has no split {name!r}; it has {known}")
        return TokenShards(self.folder / name, self.manifest["splits"][name])

    def families(self, split: str) -> list[str]:
        """Family of each protein of a split: the representative of its cluster.

        Raises:
            UserError: The corpus has no table of clusters, or a protein is not in it.
        """
        table = self.folder / "clusters.tsv"
        clusters, names = read_groups(table), self.split(split).names
        unknown = next((name for name in names if name not in clusters), None)
        if unknown is not None:
            raise UserError(f"{table} lacks {unknown}; prepare it again")
        return [clusters[name] for name in names]


def is_corpus(path: Path) -> bool:
    """Return True for a folder that ``performers data`` wrote."""
    return path.is_dir() and (path / "manifest.json").is_file()
