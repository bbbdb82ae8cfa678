"""Blocks: the proteins of a part of the input as tokens, each with its cluster and two draws.

A block of FASTA text (`iter_fasta_blocks`) becomes one file, whatever part of the input it is read
for: the blocks of all parts are those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from performers.app.errors import UserError
from performers.app.files import read_json, replacement, write_json
from performers.app.progress import Progress
from performers.proteins.corpus.shards import Lengths, Tokens, decode, encode
from performers.proteins.corpus.sources import protein_name
from performers.proteins.corpus.splitting import Draws, draws
from performers.proteins.inputs.fasta import iter_fasta_blocks
from performers.proteins.inputs.records import ProteinRecord

FORMAT = "performers-corpus-part-1"
_PART, _SETTINGS = "part.json", "settings.json"

FindClusters = Callable[[Sequence[str]], list[str]]
"""Names of the clusters of proteins."""


class Part(NamedTuple):
    """One of several parts of the input, counted from 1."""

    number: int
    of: int

    @classmethod
    def read(cls, text: str) -> Part:
        """Read ``i/n``.

        Raises:
            UserError: The text is not of this form, or i is not from 1 to n.
        """
        first, _, last = text.partition("/")
        if not (first.isdecimal() and last.isdecimal()):
            raise UserError(f"--part must be i/n, such as 1/8 for the first of eight; got {text}")
        part = cls(int(first), int(last))
        if not 1 <= part.number <= part.of:
            raise UserError(f"--part {text}: parts are counted from 1 to {part.of}")
        return part

    def has(self, file: int, block: int) -> bool:
        """Membership of a block of a file in this part."""
        return (file + block) % self.of == self.number - 1


class Block:
    """The proteins of one block, read from its file when they are asked for.

    ``lengths`` are the tokens of each protein, ``cluster_draws`` the draws of their clusters, and
    ``split_draws`` those that decide their splits, if their clusters are not held out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def _read(self, name: str) -> npt.NDArray[Any]:
        try:
            with np.load(self.path) as arrays:
                return arrays[name]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{self.path} cannot be read ({error}); delete it and make its part again with "
                "--resume"
            ) from error

    def _lines(self, name: str) -> list[str]:
        text = self._read(name).tobytes().decode()
        return text.split("\n") if text else []

    names = cached_property[list[str]](lambda self: self._lines("names"))
    # Not written where each protein is named as its cluster.
    clusters = cached_property[list[str]](lambda self: self._lines("clusters") or self.names)
    lengths = cached_property[Lengths](lambda self: self._read("lengths"))
    tokens = cached_property[Tokens](lambda self: self._read("tokens"))
    cluster_draws = cached_property[Draws](lambda self: self._read("cluster_draws"))
    split_draws = cached_property[Draws](lambda self: self._read("split_draws"))

    def counts(self) -> dict[str, int]:
        """Counts of what was read."""
        names = ("records", "left_out", "residues")
        return dict(zip(names, self._read("counts").tolist(), strict=True))

    def chosen(self, mask: npt.NDArray[np.bool_]) -> tuple[list[str], Tokens, Lengths]:
        """Names, tokens and lengths of some of the proteins."""
        tokens = self.tokens[np.repeat(mask, self.lengths)]
        return list(compress(self.names, mask.tolist())), tokens, self.lengths[mask]

    def records(
        self, mask: npt.NDArray[np.bool_], *, described: bool = False
    ) -> Iterator[ProteinRecord]:
        """Yield some of the proteins; ``described`` by ``family=`` and their cluster."""
        letters = decode(self.tokens)
        ends = np.cumsum(self.lengths)
        for i in np.flatnonzero(mask).tolist():
            sequence = letters[int(ends[i] - self.lengths[i]) + 1 : int(ends[i]) - 1]
            description = f"family={self.clusters[i]}" if described else ""
            yield ProteinRecord(self.names[i], description, sequence)


def write_part(
    folder: Path,
    files: Sequence[Path],
    part: Part,
    settings: Mapping[str, Any],
    open_clusters: Callable[[], FindClusters],
    *,
    by_cluster: bool,
    progress: Progress | None = None,
) -> None:
    """Write the blocks of a part of the input; those that are there already, and whole, are kept.

    ``settings``, which decide the corpus, are recorded. ``open_clusters`` is called if there are
    blocks to write, and ``progress`` with the bytes that were read and the bytes in all. With
    ``by_cluster`` the split of a cluster is drawn, not that of each protein.

    Raises:
        UserError: The input cannot be used, or the folder holds another part.
    """
    wanted = {"format": FORMAT, "part": list(part), **settings}
    folder.mkdir(parents=True, exist_ok=True)
    record_settings(folder / _SETTINGS, wanted, f"{folder} holds a part")
    if (folder / _PART).exists():
        damaged = _damaged(folder)
        if not damaged:
            return
        (folder / _PART).unlink()
        for path in damaged:
            path.unlink(missing_ok=True)
    find = open_clusters()
    total, before = sum(path.stat().st_size for path in files), 0

    def block_file(number: int, block: int) -> Path:
        return folder / f"{number:04d}-{block:07d}.npz"

    def is_missing(number: int, block: int) -> bool:
        return part.has(number, block) and not block_file(number, block).exists()

    for number, path in enumerate(files):
        for block, records, done in iter_fasta_blocks(path, partial(is_missing, number)):
            try:
                _write_block(block_file(number, block), records, settings, find, by_cluster)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            del records
            if progress is not None:
                progress(before + done, total)
        before += path.stat().st_size
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.npz"))}
    write_json(folder / _PART, {"blocks": sizes})


def record_settings(file: Path, wanted: Mapping[str, Any], holder: str) -> None:
    """Record what decides the content of a folder, or check it against an earlier record.

    Raises:
        UserError: They differ; the message begins with ``holder``.
    """
    if file.exists() and read_json(file) != wanted:
        raise UserError(
            f"{holder} with other options or data; repeat those, or give another --output"
        )
    write_json(file, wanted)


def _write_block(
    path: Path,
    records: Sequence[ProteinRecord],
    settings: Mapping[str, Any],
    find: FindClusters,
    by_cluster: bool,
) -> None:
    seed, min_length = settings["options"]["seed"], settings["options"]["min_length"]
    kept = [record for record in records if len(record.sequence) >= min_length]
    names = [protein_name(record.name) for record in kept]
    found = find(names)
    tokens, lengths = encode([record.sequence for record in kept])
    counts = (len(records), len(records) - len(kept), tokens.size - 2 * len(kept))
    with replacement(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            names=_bytes(names),
            clusters=_bytes([] if found == names else found),
            tokens=tokens,
            lengths=lengths,
            cluster_draws=draws(found, seed, "clusters"),
            split_draws=draws(found if by_cluster else names, seed, "sequences"),
            counts=np.array(counts),
        )


def _bytes(names: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer("\n".join(names).encode(), dtype=np.uint8)


def open_parts(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Path]]:
    """Open the folders of all parts of one input, in any order.

    Returns:
        What decides the corpus, as `write_part` recorded it, and the files of the blocks, in the
        order of the input.

    Raises:
        UserError: A folder is no part or not finished, was made with other options or of other
            data than the first, is there twice or is missing, or lacks a block.
    """
    if not folders:
        raise UserError("expected the folders of the parts, got none; name them")
    settings = [_settings(folder) for folder in folders]
    seen: dict[int, Path] = {}
    for folder, one in zip(folders, settings, strict=True):
        _refuse_difference(folders[0], settings[0], folder, one)
        number = one["part"][0]
        if number in seen:
            raise UserError(
                f"{seen[number]} and {folder} are both part {number} of {one['part'][1]}; name "
                "each part once"
            )
        seen[number] = folder
    of = settings[0]["part"][1]
    absent = [f"{number}/{of}" for number in range(1, of + 1) if number not in seen]
    if absent:
        raise UserError(
            f"of {of} parts {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing; "
            "name the folders of all, and make with --part those that there are not"
        )
    paths = [path for folder in folders for path in _blocks(folder)]
    common = {key: value for key, value in settings[0].items() if key not in ("format", "part")}
    return common, sorted(paths, key=lambda path: path.name)


def _settings(folder: Path) -> dict[str, Any]:
    if not (folder / _SETTINGS).is_file():
        raise UserError(f"{folder} is not a part of a corpus; name folders made with --part")
    settings: dict[str, Any] = read_json(folder / _SETTINGS)
    if settings.get("format") != FORMAT:
        raise UserError(f"{folder} is not a part of format {FORMAT}; make it again")
    if not (folder / _PART).is_file():
        raise UserError(f"{folder} is not finished; run its command again with --resume")
    return settings


def _refuse_difference(
    first: Path, expected: Mapping[str, Any], folder: Path, got: Mapping[str, Any]
) -> None:
    def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
        others = {key: settings[key] for key in settings if key not in ("part", "options")}
        return {"number of parts": settings["part"][1], **settings["options"], **others}

    one, other = plain(expected), plain(got)
    for key in one.keys() | other.keys():
        if one.get(key) != other.get(key):
            values = f"{one.get(key)} and {other.get(key)}"
            raise UserError(
                f"{first} and {folder} are parts of different corpora: their {key} differs "
                f"({values}); make all parts with one command"
            )


def _blocks(folder: Path) -> list[Path]:
    damaged = _damaged(folder)
    if damaged:
        raise UserError(
            f"{damaged[0]} is missing or cut short; copy the part again, or run its command again "
            "with --resume"
        )
    return [folder / name for name in read_json(folder / _PART)["blocks"]]


def _damaged(folder: Path) -> list[Path]:
    """Files of a finished part that are missing or cut short."""
    sizes: dict[str, int] = read_json(folder / _PART)["blocks"]
    return [
        path
        for name, size in sizes.items()
        if not (path := folder / name).is_file() or path.stat().st_size != size
    ]
