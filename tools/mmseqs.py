"""Cluster and search proteins with the program mmseqs2."""

from __future__ import annotations

import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

_LINE = 60


def fasta_text(names: Sequence[str], sequences: Sequence[str]) -> str:
    """FASTA with lines of 60 residues."""
    lines = []
    for name, sequence in zip(names, sequences, strict=True):
        lines.append(f">{name}")
        lines.extend(sequence[i : i + _LINE] for i in range(0, len(sequence), _LINE))
    return "\n".join(lines) + "\n"


class Mmseqs:
    """The mmseqs program, working in one folder of its own."""

    def __init__(self, work: Path, threads: int) -> None:
        found = shutil.which("mmseqs")
        if found is None:
            raise ValueError("the program mmseqs was not found; install mmseqs2 (Debian: mmseqs2)")
        self._program, self._work, self._threads = found, work, str(threads)
        self.version = self._run("version", threads=False).strip()

    def _run(self, *arguments: str, threads: bool = True) -> str:
        command = [self._program, *arguments]
        if threads:
            command += ["--threads", self._threads, "-v", "1"]
        done = subprocess.run(command, cwd=self._work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def cluster(
        self, sequences: dict[str, str], identity: float, coverage: float
    ) -> tuple[dict[str, list[str]], dict[str, float]]:
        """Cluster `sequences`.

        Returns:
            {representative: members}, and {member: identity to its representative, 0..1}, the
            latter 0 where mmseqs2 reports no direct alignment.
        """
        names = list(sequences)
        (self._work / "all.fasta").write_text(fasta_text(names, [sequences[n] for n in names]))
        self._run("createdb", "all.fasta", "all", "--shuffle", "0", "-v", "1", threads=False)
        self._run(
            "cluster",
            *("all", "clusters", "tmp", "--min-seq-id", str(identity), "-c", str(coverage)),
            *("--cov-mode", "0", "--cluster-mode", "0", "--remove-tmp-files", "1"),
        )
        self._run("createtsv", "all", "all", "clusters", "clusters.tsv")
        clusters: dict[str, list[str]] = defaultdict(list)
        for representative, member in self._rows("clusters.tsv"):
            clusters[representative].append(member)
        self._run("align", "all", "all", "clusters", "aligned", "--alignment-mode", "3")
        self._run(
            "convertalis",
            "all",
            "all",
            "aligned",
            "identity.tsv",
            "--format-output",
            "target,fident",
        )
        to_representative = dict.fromkeys(sequences, 0.0)
        for member, fident in self._rows("identity.tsv"):
            to_representative[member] = float(fident)
        return dict(clusters), to_representative

    def search(
        self, queries: dict[str, str], targets: dict[str, str], label: str, max_evalue: float
    ) -> Iterator[tuple[str, str, float, float, float]]:
        """Yield (query, target, identity, greater of the two coverages, e-value) of every hit.

        Hits with an e-value above `max_evalue` are left out.
        """
        for side, part in (("query", queries), ("target", targets)):
            text = fasta_text(list(part), list(part.values()))
            (self._work / f"{label}_{side}.fasta").write_text(text)
        self._run(
            "easy-search",
            *(f"{label}_query.fasta", f"{label}_target.fasta", f"{label}.tsv", "tmp_search"),
            *("-s", "7.5", "-e", str(max_evalue), "--max-seqs", "300", "--alignment-mode", "3"),
            *("--format-output", "query,target,fident,qcov,tcov,evalue"),
        )
        for query, target, fident, qcov, tcov, evalue in self._rows(f"{label}.tsv"):
            yield query, target, float(fident), max(float(qcov), float(tcov)), float(evalue)

    def _rows(self, name: str) -> Iterator[list[str]]:
        with (self._work / name).open() as lines:
            for line in lines:
                yield line.rstrip("\n").split("\t")
