"""Token files: shards that are memory-mapped, so that a corpus of any size opens at once.

A split of a corpus is a folder of shards. Shard n is three files: ``00000.tokens.npy`` (uint8, the
token ids of all its sequences, each with its begin and end token), ``00000.offsets.npy`` (int64,
where each sequence starts, and the end), and ``00000.names.txt`` (a name a line). Plain NumPy
arrays: ``numpy.load(path, mmap_mode="r")`` reads them anywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from performers.app.errors import UserError
from performers.app.files import read_json
from performers.proteins.inputs.tokenizer import AMBIGUOUS, AMINO_ACIDS, SPECIAL_TOKENS
from performers.proteins.options import CorpusOptions

FORMAT = "performers-corpus-1"
SPLITS = ("train", "validation", "test", "ood")
VOCABULARY = (*SPECIAL_TOKENS, *AMINO_ACIDS, *AMBIGUOUS)

_BOS, _EOS = SPECIAL_TOKENS.index("<bos>"), SPECIAL_TOKENS.index("<eos>")
_FIRST_RESIDUE = len(SPECIAL_TOKENS)
_LETTERS = np.frombuffer((AMINO_ACIDS + AMBIGUOUS).encode(), dtype=np.uint8)
_IDS = np.full(256, 255, dtype=np.uint8)
_IDS[_LETTERS] = np.arange(_FIRST_RESIDUE, len(VOCABULARY), dtype=np.uint8)


def write_shards(
    folder: Path, records: Iterable[tuple[str, str]], shard_tokens: int = CorpusOptions.shard_tokens
) -> dict[str, Any]:
    """Write (name, sequence) records as shards.

    Args:
        folder: Where to; made if missing.
        records: Names without white space, and sequences of residue letters.
        shard_tokens: A shard is closed once it has so many tokens.

    Returns:
        The split's entry in the manifest: ``sequences``, ``residues``, ``tokens``, and of each of
        ``shards`` its ``name``, ``sequences``, ``tokens`` and ``sha256`` of the tokens.

    Raises:
        UserError: A sequence has a letter that is no residue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    names: list[str] = []
    parts: list[npt.NDArray[np.uint8]] = []
    size = 0

    def close() -> None:
        nonlocal size
        tokens = np.concatenate(parts)
        offsets = np.concatenate(([0], np.cumsum([part.size for part in parts], dtype=np.int64)))
        name = f"{len(shards):05d}"
        np.save(folder / f"{name}.tokens.npy", tokens)
        np.save(folder / f"{name}.offsets.npy", offsets)
        (folder / f"{name}.names.txt").write_text(
            "".join(f"{n}\n" for n in names), encoding="utf-8"
        )
        digest = hashlib.sha256(tokens.tobytes()).hexdigest()
        shards.append(
            {"name": name, "sequences": len(names), "tokens": tokens.size, "sha256": digest}
        )
        names.clear()
        parts.clear()
        size = 0

    for name, sequence in records:
        ids = _IDS[np.frombuffer(sequence.encode("ascii", errors="replace"), dtype=np.uint8)]
        if not ids.size or (ids == 255).any():
            raise UserError(f"{name} is empty or has a letter that is no residue: {sequence[:60]}")
        parts.append(np.concatenate(([_BOS], ids, [_EOS])).astype(np.uint8))
        names.append(name)
        size += parts[-1].size
        if size >= shard_tokens:
            close()
    if parts:
        close()
    sequences = sum(shard["sequences"] for shard in shards)
    tokens = sum(shard["tokens"] for shard in shards)
    return {
        "sequences": sequences,
        "residues": tokens - 2 * sequences,
        "tokens": tokens,
        "shards": shards,
    }


class TokenShards(Sequence[npt.NDArray[np.uint8]]):
    """The sequences of one split, as read-only views of memory-mapped files.

    Args:
        folder: The split's folder.
        entry: Its entry in the manifest.

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
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        index %= len(self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        offsets = self._offsets[shard]
        place = index - int(self._starts[shard])
        return self._tokens[shard][int(offsets[place]) : int(offsets[place + 1])]

    def sequence(self, index: int) -> str:
        """One protein as letters."""
        ids = np.asarray(self[index][1:-1])
        return _LETTERS[ids - _FIRST_RESIDUE].tobytes().decode("ascii")

    @cached_property
    def names(self) -> list[str]:
        """The name of each sequence."""
        files = [self.folder / f"{shard['name']}.names.txt" for shard in self.entry["shards"]]
        return [name for file in files for name in file.read_text(encoding="utf-8").split()]

    def fingerprint(self) -> str:
        """SHA-256 over the hashes of the shards."""
        joined = "".join(shard["sha256"] for shard in self.entry["shards"])
        return hashlib.sha256(joined.encode()).hexdigest()


class Corpus:
    """A folder that ``performers data`` wrote.

    Args:
        folder: The folder.

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


def is_corpus(path: Path) -> bool:
    """Return True for a folder that ``performers data`` wrote."""
    return path.is_dir() and (path / "manifest.json").is_file()
