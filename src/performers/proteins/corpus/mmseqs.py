"""Cluster and search proteins with the program mmseqs2."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from performers.app.errors import UserError

_COLUMNS = "qheader,theader,fident,qcov,tcov,evalue,qstart,qend,tstart,tend"


class Hit(NamedTuple):
    """A local alignment of a query with a target.

    Attributes:
        query: Name of the query.
        target: Name of the target.
        identity: Share of identical residues.
        coverage: The greater of the shares of query and target that are aligned.
        evalue: Number of alignments as good that chance would give.
        query_range: First and last aligned residue of the query, from 1.
        target_range: Those of the target.
        residues: The target's residue at each of ``query_range``, ``X`` where it has none; empty
            unless they were asked for.
    """

    query: str
    target: str
    identity: float
    coverage: float
    evalue: float
    query_range: tuple[int, int]
    target_range: tuple[int, int]
    residues: str


class Mmseqs:
    """The program mmseqs, which works in one folder.

    Sequences are named by the first word of their headers. What mmseqs itself takes for the name is
    a part of some, as ``P1`` of ``lcl|P1``, which another sequence may have. It works in parts
    where its index of a database would take more than ``memory`` bytes.

    Raises:
        UserError: The program is not installed.
    """

    def __init__(self, work: Path, threads: int, memory: int | None = None) -> None:
        found = shutil.which("mmseqs")
        if found is None:
            raise UserError(
                "the program mmseqs was not found; install mmseqs2 (Debian: apt install mmseqs2, "
                "conda: bioconda::mmseqs2, macOS: brew install mmseqs2)"
            )
        self._program, self.work, self._threads = found, work, str(threads)
        self._memory = () if memory is None else ("--split-memory-limit", f"{memory >> 20}M")
        self.version = self.run("version", threads=False).strip()

    def run(self, *arguments: str, threads: bool = True) -> str:
        """Run a command of the program; its output."""
        command = [self._program, *arguments]
        if threads:
            command += ["--threads", self._threads, "-v", "1"]
        done = subprocess.run(command, cwd=self.work, capture_output=True, text=True, check=False)
        if done.returncode:
            last = " ".join((done.stdout + done.stderr).split())[-300:]
            raise UserError(f"{' '.join(command[:2])} failed in {self.work}: {last}")
        return done.stdout

    def create_database(self, fasta: str, name: str) -> None:
        """Make the database ``name`` from a FASTA file; both are names in the work folder."""
        self.run("createdb", fasta, name, "--shuffle", "0", "-v", "1", threads=False)

    def cluster(self, database: str, identity: float, coverage: float) -> Iterator[tuple[str, str]]:
        """Cluster a database; yield (representative, member) of every sequence.

        ``identity`` is the least one of the two, and ``coverage`` the least part of both that their
        alignment covers, 0 to 1.
        """
        # What an interrupted run left; the program goes on from its own tmp folder.
        for old in self.work.glob("clusters*"):
            old.unlink()
        self.run(
            "cluster",
            *(database, "clusters", "tmp", "--min-seq-id", str(identity), "-c", str(coverage)),
            *("--cov-mode", "0", "--cluster-mode", "0", "--remove-tmp-files", "1"),
            *self._memory,
        )
        self.run("createtsv", database, database, "clusters", "clusters.tsv", "--full-header", "1")
        # Headers are in quotation marks.
        for first, second in self.rows("clusters.tsv"):
            yield _name(first[1:-1]), _name(second[1:-1])

    def search(
        self,
        query: str,
        target: str,
        *,
        sensitivity: float,
        max_evalue: float,
        max_hits: int = 300,
        first_only: bool = False,
        residues: bool = False,
    ) -> Iterator[Hit]:
        """Yield every hit, with its aligned ``residues`` if asked; those of a query by e-value.

        ``query`` and ``target`` are FASTA files in the work folder, and ``max_hits`` the targets
        that the prefilter passes on for a query, the best ones: a query with more relatives loses
        the others. With ``first_only`` the search of a query ends at its first hit.
        """
        self.run(
            "easy-search",
            *(query, target, "hits.tsv", "tmp_search"),
            *("-s", str(sensitivity), "-e", str(max_evalue), "--max-seqs", str(max_hits)),
            *("--alignment-mode", "3"),
            *(("--max-accept", "1") if first_only else ()),
            *("--format-output", _COLUMNS + (",qaln,taln" if residues else "")),
            *self._memory,
        )
        for query_header, target_header, *numbers in self.rows("hits.tsv"):
            identity, *coverages, evalue = map(float, numbers[:4])
            query_first, query_last, target_first, target_last = map(int, numbers[4:8])
            pairs = zip(*numbers[8:], strict=True)
            yield Hit(
                _name(query_header),
                _name(target_header),
                identity,
                max(coverages),
                evalue,
                (query_first, query_last),
                (target_first, target_last),
                "".join(x for own, x in pairs if own != "-").replace("-", "X"),
            )

    def rows(self, name: str) -> Iterator[list[str]]:
        """Yield the fields of each line of a file in the folder."""
        with (self.work / name).open() as lines:
            for line in lines:
                yield line.rstrip("\n").split("\t")


def _name(header: str) -> str:
    return header.split(maxsplit=1)[0]
