"""The cluster of a protein: named by its header, or looked up in a table on disk."""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from performers.app.errors import UserError
from performers.app.files import replacement
from performers.proteins.corpus.splitting import Draws, draws
from performers.proteins.inputs.streams import compression, decompressed, open_bytes

_UNIREF = re.compile(r"(UniRef(?:50|90|100))_\S+")
# Columns of UniProt's idmapping_selected.tab, and its first and its tenth, counted from 0.
_SELECTED_COLUMNS, _UNIREF50_COLUMN = 22, 9
_LINES = 1 << 18
_BUCKETS = 256
# A member, and the place of its cluster's name in the file of names.
_PAIR = np.dtype([("member", "<u8"), ("place", "<u8")])


def header_clusters(names: Sequence[str]) -> list[str]:
    """Clusters of UniRef50, each with one sequence, named as the cluster.

    Raises:
        UserError: A name is not that of a cluster of UniRef50.
    """
    for name in names:
        match = _UNIREF.fullmatch(name)
        if match is None:
            raise UserError(
                f"the record {name} names no cluster; expected UniRef50_ and an identifier, as in "
                "uniref50.fasta.gz; for other sequences use performers data trembl with --clusters"
            )
        if match[1] != "UniRef50":
            raise UserError(
                f"the record {name} is of {match[1]}, whose clusters have relatives in each other; "
                "give UniRef50 alone, or use performers data trembl with a --clusters table of the "
                "UniRef50 cluster of each"
            )
    return list(names)


class TableClusters:
    """Clusters of a table, kept sorted on disk: memory does not grow with its lines.

    The table has two columns, cluster and member; or is UniProt's ``idmapping_selected.tab`` or
    ``idmapping.dat``, whose UniRef50 clusters are taken. It may be compressed. Its sorted copy in
    the folder ``work``, 16 bytes and a name for each line, is made once.

    Raises:
        UserError: A line has other columns, a cluster is named by several words, or a member is in
            two clusters.
    """

    def __init__(self, table: Path, work: Path) -> None:
        self._table = table
        pairs, names = work / "pairs.bin", work / "clusters.txt"
        if not pairs.exists():
            work.mkdir(parents=True, exist_ok=True)
            _sort(table, pairs, names)
        if not pairs.stat().st_size:
            raise UserError(f"{table} names no cluster of a protein; give a table that does")
        self._pairs = np.memmap(pairs, _PAIR, "r")
        with names.open("rb") as text:
            self._names = mmap.mmap(text.fileno(), 0, access=mmap.ACCESS_READ)

    def __call__(self, names: Sequence[str]) -> list[str]:
        """The cluster of each sequence.

        Raises:
            UserError: The table has no line for one.
        """
        wanted = _keys(names)
        order = np.argsort(wanted)
        rows = np.empty(len(names), dtype=np.int64)
        rows[order] = np.searchsorted(self._pairs["member"], wanted[order])
        found = self._pairs[np.minimum(rows, len(self) - 1)]
        absent = found["member"] != wanted
        if absent.any():
            raise UserError(
                f"{self._table} names no cluster for {names[int(absent.argmax())]}; give the table "
                "of the same release (proteins of fewer than 11 residues are in no cluster of "
                "UniRef50: --min-length 11 leaves them out)"
            )
        starts = found["place"].tolist()
        return [self._names[place : self._names.find(b"\n", place)].decode() for place in starts]

    def __len__(self) -> int:
        """Members in the table."""
        return len(self._pairs)


def _keys(names: Sequence[str]) -> Draws:
    return draws(names, 0, "members")


def _sort(table: Path, pairs_file: Path, names_file: Path) -> None:
    """Write the names of clusters, and the pairs in the order of their members."""
    buckets = [pairs_file.with_name(f"bucket-{number:03d}.tmp") for number in range(_BUCKETS)]
    for bucket in buckets:
        bucket.unlink(missing_ok=True)
    rows = _rows(table)
    with names_file.open("wb") as names:
        while batch := list(islice(rows, _LINES)):
            places: dict[str, int] = {}
            end = names.tell()
            for _, cluster in batch:
                if cluster not in places:
                    places[cluster] = end
                    end += names.write(f"{cluster}\n".encode())
            pairs = np.empty(len(batch), dtype=_PAIR)
            pairs["member"] = _keys([member for member, _ in batch])
            pairs["place"] = [places[cluster] for _, cluster in batch]
            number = pairs["member"] >> np.uint64(56)
            order = np.argsort(number, kind="stable")
            ends = np.searchsorted(number[order], np.arange(1, _BUCKETS))
            for bucket, share in zip(buckets, np.split(pairs[order], ends), strict=True):
                with bucket.open("ab") as file:
                    share.tofile(file)
    with replacement(pairs_file) as temporary, temporary.open("wb") as sorted_pairs:
        for bucket in filter(Path.exists, buckets):
            pairs = np.sort(np.fromfile(bucket, dtype=_PAIR), order="member")
            same = pairs["member"][1:] == pairs["member"][:-1]
            if same.any():
                with names_file.open("rb") as names:
                    names.seek(int(pairs["place"][int(same.argmax())]))
                    cluster = names.readline().decode().strip()
                raise UserError(
                    f"{table} lists a member of {cluster} twice; remove one of its lines"
                )
            pairs.tofile(sorted_pairs)
            bucket.unlink()


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """Yield each member with its cluster."""
    try:
        with open_bytes(table) as raw:
            columns = 0
            for number, line in enumerate(decompressed(raw, compression(raw.peek(8)[:8])), start=1):
                fields = line.decode(errors="replace").rstrip("\r\n").split("\t")
                columns = columns or len(fields)
                if len(fields) != columns or columns not in (2, 3, _SELECTED_COLUMNS):
                    raise UserError(
                        f"{table}:{number}: expected two columns, cluster and member, or those of "
                        f"UniProt's idmapping_selected.tab or idmapping.dat, got {len(fields)}"
                    )
                if columns == 2:
                    cluster, member = fields
                elif columns == 3:
                    member, kind, cluster = fields
                    cluster = cluster if kind == "UniRef50" else ""
                else:
                    member, cluster = fields[0], fields[_UNIREF50_COLUMN]
                if len(cluster.split()) > 1:
                    raise UserError(
                        f"{table}:{number}: the cluster {cluster!r} has more than one word, which "
                        "a header family=NAME cannot name; write it without spaces"
                    )
                if cluster:
                    yield member, cluster
    except (EOFError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        reason = str(error) or "it ends too early"
        raise UserError(f"{table} is damaged ({reason}); copy it again") from error
