"""Searches for relatives with mmseqs2: between clusters of a corpus, and of given proteins."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from performers.app.errors import UserError
from performers.app.files import replacement
from performers.proteins.corpus.blocks import Block
from performers.proteins.corpus.mmseqs import Hit, Mmseqs
from performers.proteins.corpus.splitting import Clusters, draws
from performers.proteins.inputs.fasta import write_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.relatives import overlap_whole

# A quick search drops the candidates with close relatives, which are most of them.
_QUICK_SENSITIVITY = 1.0
# One relative is enough to drop a cluster; not all hits of the prefilter are relatives.
_HITS_PER_QUERY = 50


class RelativesSearch:
    """Searches for relatives of clusters in other clusters, each kept for a run that goes on.

    ``blocks`` gives all proteins, in any number of passes, of as many ``clusters``; ``members`` are
    those of each cluster that may be held out. ``options`` are those of the corpus: seed,
    sensitivity and e-value. ``report`` is called with a line as each search begins.
    """

    def __init__(
        self,
        mmseqs: Mmseqs,
        blocks: Callable[[], Iterable[Block]],
        members: Clusters,
        clusters: int,
        options: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self._mmseqs, self._blocks, self._members = mmseqs, blocks, members
        self._clusters, self._options, self._report = clusters, options, report
        self._cluster_of = {m: name for name, group in members.items() for m in group}
        self.record: list[dict[str, Any]] = []
        self._searches = 0

    def __call__(
        self, held: Sequence[str], others: Sequence[str] | None, thorough: bool
    ) -> list[str]:
        """Names of the clusters of ``held`` with a relative in ``others``, or in all others."""
        most = self._options["sensitivity"]
        sensitivity = most if thorough else min(_QUICK_SENSITIVITY, most)
        if not thorough and sensitivity == most:
            return []
        pairs = self._search(held, others, sensitivity, _HITS_PER_QUERY, first_only=True)
        related = {self._cluster_of[query] for query, _ in pairs}
        self.record.append(
            {
                "sensitivity": sensitivity,
                "clusters": len(held),
                "in_clusters": self._clusters - len(held) if others is None else len(others),
                "related": len(related),
            }
        )
        return [name for name in held if name in related]

    def among(self, held: Sequence[str]) -> list[tuple[str, str]]:
        """All relations between members of these clusters."""
        count = sum(len(self._members[name]) for name in held)
        return self._search(held, held, self._options["sensitivity"], count) if held else []

    def _search(
        self,
        held: Sequence[str],
        others: Sequence[str] | None,
        sensitivity: float,
        max_hits: int,
        *,
        first_only: bool = False,
    ) -> list[tuple[str, str]]:
        self._searches += 1
        file = self._mmseqs.work / f"relatives-{self._searches}.tsv"
        if not file.exists():
            count = self._clusters - len(held) if others is None else len(others)
            self._report(
                f"looking for relatives of {len(held):,} clusters in {count:,} (mmseqs2, "
                f"sensitivity {sensitivity:g})"
            )
            self._write("queries.fasta", held)
            self._write("targets.fasta", held if others is None else others, others is None)
            hits = self._mmseqs.search(
                "queries.fasta",
                "targets.fasta",
                sensitivity=sensitivity,
                max_evalue=self._options["max_evalue"],
                max_hits=max_hits,
                first_only=first_only,
            )
            write_pairs(file, ((query, target) for query, target, *_ in hits if query != target))
        return list(read_pairs(file))

    def _write(self, name: str, clusters: Sequence[str], all_others: bool = False) -> None:
        """Write the members of these clusters, or of all others, as FASTA."""
        wanted = draws(clusters, self._options["seed"], "clusters")

        def records() -> Iterator[ProteinRecord]:
            for block in self._blocks():
                mask = np.isin(block.cluster_draws, wanted, invert=all_others)
                if mask.any():
                    yield from block.records(mask)

        write_fasta(self._mmseqs.work / name, records(), 10**9)


def find_relatives(
    proteins: Sequence[ProteinRecord],
    among: Callable[[], Iterable[tuple[str, str]]],
    output: Path,
    *,
    most: int,
    sensitivity: float,
    max_evalue: float,
    threads: int,
    memory: int,
) -> list[int]:
    """Write the relatives of proteins as FASTA, with ``family=NAME`` of the protein in each header.

    Those of a protein come in the order of their e-values, each sequence once, as the residues
    beside the protein's (`beside`), since models compare residues at like positions. The protein
    itself, or one that holds it or is a part of it, is left out.

    ``among`` gives the names and sequences to search, in any number of passes, ``most`` is the
    number of relatives of a protein at most, and the rest are arguments of mmseqs2.

    Returns:
        The number of relatives of each protein.

    Raises:
        UserError: mmseqs2 is not installed, or nothing is there to search.
    """
    with tempfile.TemporaryDirectory(dir=output.absolute().parent) as folder:
        work = Path(folder)
        mmseqs = Mmseqs(work, threads, memory)

        for name, sequences in (
            ("queries.fasta", (protein.sequence for protein in proteins)),
            ("targets.fasta", (sequence for _, sequence in among())),
        ):
            numbered = (ProteinRecord(f"n{i}", "", x) for i, x in enumerate(sequences))
            write_fasta(work / name, numbered, 10**9)
        hits = mmseqs.search(
            "queries.fasta",
            "targets.fasta",
            sensitivity=sensitivity,
            max_evalue=max_evalue,
            # Room for copies and parts of the protein.
            max_hits=max(300, 2 * most),
            residues=True,
        )
        found: list[list[Hit]] = [[] for _ in proteins]
        for hit in hits:
            found[int(hit.query[1:])].append(hit)
    wanted = {int(hit.target[1:]) for of_protein in found for hit in of_protein}
    targets = {index: record for index, record in enumerate(among()) if index in wanted}
    counts: list[int] = []
    relatives: list[ProteinRecord] = []
    for protein, of_protein in zip(proteins, found, strict=True):
        others: dict[str, ProteinRecord] = {}
        for hit in of_protein:
            name, sequence = targets[int(hit.target[1:])]
            part, place = beside(hit, sequence, len(protein.sequence))
            if not any(overlap_whole(x, protein.sequence) for x in (part, sequence)):
                record = ProteinRecord(name, f"family={protein.name}{place}", part)
                others.setdefault(part, record)
        kept = list(others.values())[:most]
        counts.append(len(kept))
        relatives += kept
    write_fasta(output, relatives)
    return counts


def beside(hit: Hit, sequence: str, length: int) -> tuple[str, str]:
    """The part of a relative beside a protein of ``length``, and its range as a header's field.

    Its residues stand where those of the protein do that they are aligned with: ``X`` is for one
    that the relative lacks, and those that the protein lacks are left out. Beyond the ends of the
    alignment are the residues that the rest of the protein meets without gaps.
    """
    (query_first, query_last), (first, last) = hit.query_range, hit.target_range
    begin = max(0, first - query_first)
    end = min(len(sequence), last + length - query_last)
    lacking = "X" * max(0, query_first - first)
    part = lacking + sequence[begin : first - 1] + hit.residues + sequence[last:end]
    return part, "" if part == sequence else f" residues={begin + 1}-{end}"


def read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the two columns of a table.

    Raises:
        UserError: A line has another number of columns.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2:
                raise UserError(
                    f"{path}:{number}: expected two columns, representative and member, got "
                    f"{len(fields)}"
                )
            yield fields[0], fields[1]


def write_pairs(path: Path, pairs: Iterable[Sequence[str]]) -> None:
    """Write a table of two columns, whole or not at all."""
    with replacement(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{first}\t{second}\n" for first, second in pairs)
