"""From sequences to a corpus: distinct, clustered, split, tokenised; in stages that resume."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import read_json, write_atomically, write_json
from performers.app.provenance import KEY, write_result
from performers.proteins.corpus.mmseqs import Mmseqs
from performers.proteins.corpus.shards import (
    FORMAT,
    SPLITS,
    VOCABULARY,
    write_shards,
)
from performers.proteins.corpus.sources import Source, fingerprint
from performers.proteins.corpus.splitting import (
    assign_splits,
    candidate_clusters,
    independent_clusters,
    whole_groups,
)
from performers.proteins.inputs.fasta import iter_fasta, write_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.options import CorpusOptions

Report = Callable[[str], None]

# Only clusters without relatives in the rest are held out; many have some.
_CANDIDATES_PER_HELD_OUT = 6
# Clusters of this size are candidates even if they exceed a tenth of the sequences held out.
_ALWAYS_SMALL = 10
# A quick search drops the candidates with close relatives, which are most of them.
_QUICK_SENSITIVITY = 1.0
# One relative is enough to drop a cluster; not all hits of the prefilter are relatives.
_HITS_PER_QUERY = 50


def prepare_corpus(
    source: Source,
    output: Path,
    options: CorpusOptions,
    *,
    clusters: Path | None = None,
    threads: int = 2,
    memory: int = 1500 << 20,
    report: Report = lambda text: None,
) -> dict[str, Any]:
    """Write a corpus: token shards of four splits, FASTA of the three small ones, a manifest.

    Every stage leaves its result in ``output/work``, so that a run that was stopped goes on from
    there; the manifest is written last and the work folder removed.

    1. Distinct sequences, each under the first of its names in alphabetical order.
    2. Clusters (mmseqs2, or the table given), also kept as ``clusters.tsv``.
    3. Out of distribution: clusters drawn with the seed, of which no member has a hit in what is
       not held out (mmseqs2 search, repeated until it finds none); clusters that are related to
       each other are held out together.
    4. Validation and test by sequence from what is left; the rest is for training.

    Args:
        source: The sequences.
        output: The folder; made if missing.
        options: What decides the splits.
        clusters: A table of representative and member a line, instead of clustering.
        threads: Threads of mmseqs2.
        memory: Bytes for the index of mmseqs2.
        report: Called with a line as each stage begins.

    Returns:
        The manifest.

    Raises:
        UserError: The data or options cannot be used, mmseqs2 is not there or fails, or the folder
            holds a corpus or a run of another kind.
    """
    wanted = {
        "source": source.description,
        "options": asdict(options),
        "clusters_file": None if clusters is None else fingerprint(clusters),
    }
    manifest_file, work = output / "manifest.json", output / "work"
    if manifest_file.exists():
        manifest = read_json(manifest_file)
        if {key: manifest.get(key) for key in wanted} == wanted:
            # Left by a run that was stopped between writing the manifest and this.
            shutil.rmtree(work, ignore_errors=True)
            report("the corpus is there already")
            return {key: value for key, value in manifest.items() if key != KEY}
        raise UserError(f"{output} holds another corpus; give another --output")
    work.mkdir(parents=True, exist_ok=True)
    settings = work / "settings.json"
    if settings.exists() and read_json(settings) != wanted:
        raise UserError(
            f"{output} holds a run with other options or data; repeat those, or give another "
            "--output"
        )
    write_json(settings, wanted)

    distinct = work / "sequences.fasta"
    if not distinct.exists():
        report("reading sequences")
        _write_distinct(source, distinct, options.min_length)
    read = read_json(work / "read.json")
    mmseqs = Mmseqs(work, threads, memory)
    table = output / "clusters.tsv"
    if not table.exists():
        report(f"clustering {read['distinct']:,} sequences (mmseqs2, minutes)")
        _write_pairs(table, _clusters(clusters, mmseqs, options))
    members = _read_clusters(table)
    _check_names(members, distinct, table)
    target = max(1, round(options.ood_fraction * read["distinct"]))
    candidates = candidate_clusters(
        members,
        options.seed,
        min(_CANDIDATES_PER_HELD_OUT * target, read["distinct"] // 2),
        max(target // 10, min(target, _ALWAYS_SMALL)),
    )
    search = _RelativesSearch(mmseqs, distinct, members, options, report)
    independent = independent_clusters(candidates, members, search)
    held_out = whole_groups(independent, search.among(independent), members, target)
    splits = assign_splits(
        members,
        held_out,
        validation_fraction=options.validation_fraction,
        test_fraction=options.test_fraction,
        seed=options.seed,
    )
    report("writing token files")
    sequences = dict(_records(distinct))
    cluster_of = {member: name for name, group in members.items() for member in group}
    entries = {}
    for name in SPLITS:
        shutil.rmtree(output / name, ignore_errors=True)
        entries[name] = {
            **write_shards(
                output / name,
                ((member, sequences[member]) for member in splits[name]),
                options.shard_tokens,
            ),
            "clusters": len({cluster_of[member] for member in splits[name]}),
        }
        if name != "train":
            write_fasta(
                output / f"{name}.fasta.gz",
                (
                    ProteinRecord(member, f"family={cluster_of[member]}", sequences[member])
                    for member in splits[name]
                ),
            )
    manifest = {
        "format": FORMAT,
        **wanted,
        "read": read,
        "mmseqs_version": mmseqs.version,
        "clusters": len(members),
        "ood_candidates": len(candidates),
        "ood_searches": search.record,
        "vocabulary": list(VOCABULARY),
        "splits": entries,
    }
    write_result(manifest_file, manifest, "corpus", seed=options.seed)
    shutil.rmtree(work)
    return manifest


def _write_distinct(source: Source, path: Path, min_length: int) -> None:
    first: dict[str, str] = {}
    records = left_out = 0
    for name, sequence in source.records():
        records += 1
        if len(sequence) < min_length:
            left_out += 1
            continue
        known = first.get(sequence)
        if known is None or name < known:
            first[sequence] = name
    if not first:
        raise UserError("the source holds no protein sequence of the length asked for")
    names = sorted((name, sequence) for sequence, name in first.items())
    repeated = next((a for (a, _), (b, _) in pairwise(names) if a == b), None)
    if repeated is not None:
        raise UserError(f"two different sequences are both named {repeated}; rename one")
    counts = {
        "records": records,
        "left_out": left_out,
        "distinct": len(names),
        "residues": sum(map(len, first)),
    }
    write_json(path.with_name("read.json"), counts)
    write_fasta(path, (ProteinRecord(name, "", sequence) for name, sequence in names), 10**9)


def _clusters(
    given: Path | None, mmseqs: Mmseqs, options: CorpusOptions
) -> Iterable[tuple[str, str]]:
    if given is not None:
        return _read_pairs(given)
    mmseqs.create_database("sequences.fasta", "all")
    return mmseqs.cluster("all", options.identity, options.coverage)


class _RelativesSearch:
    """Searches for relatives of clusters in other clusters, each kept for a run that goes on.

    Args:
        mmseqs: The program.
        distinct: FASTA file of all sequences, in its folder.
        clusters: All clusters.
        options: Sensitivity and e-value.
        report: Called with a line as each search begins.
    """

    def __init__(
        self,
        mmseqs: Mmseqs,
        distinct: Path,
        clusters: dict[str, list[str]],
        options: CorpusOptions,
        report: Report,
    ) -> None:
        self._mmseqs, self._distinct, self._clusters = mmseqs, distinct, clusters
        self._options, self._report = options, report
        self._cluster_of = {m: name for name, group in clusters.items() for m in group}
        self.record: list[dict[str, Any]] = []
        self._searches = 0

    def __call__(self, held: Sequence[str], others: Sequence[str], thorough: bool) -> list[str]:
        """Names of the clusters of ``held`` with a relative in ``others``, in order."""
        quick = min(_QUICK_SENSITIVITY, self._options.sensitivity)
        sensitivity = self._options.sensitivity if thorough else quick
        if not thorough and sensitivity == self._options.sensitivity:
            return []
        pairs = self._search(held, others, sensitivity, _HITS_PER_QUERY, first_only=True)
        related = {self._cluster_of[query] for query, _ in pairs}
        self.record.append(
            {
                "sensitivity": sensitivity,
                "clusters": len(held),
                "in_clusters": len(others),
                "related": len(related),
            }
        )
        return [name for name in held if name in related]

    def among(self, held: Sequence[str]) -> list[tuple[str, str]]:
        """All relations between members of these clusters."""
        count = sum(len(self._clusters[name]) for name in held)
        return self._search(held, held, self._options.sensitivity, count) if held else []

    def _search(
        self,
        held: Sequence[str],
        others: Sequence[str],
        sensitivity: float,
        max_hits: int,
        *,
        first_only: bool = False,
    ) -> list[tuple[str, str]]:
        work = self._distinct.parent
        self._searches += 1
        file = work / f"relatives-{self._searches}.tsv"
        if not file.exists():
            self._report(
                f"looking for relatives of {len(held):,} clusters in {len(others):,} (mmseqs2, "
                f"sensitivity {sensitivity:g})"
            )
            self._write("queries.fasta", held)
            self._write("targets.fasta", others)
            hits = self._mmseqs.search(
                "queries.fasta",
                "targets.fasta",
                sensitivity=sensitivity,
                max_evalue=self._options.max_evalue,
                max_hits=max_hits,
                first_only=first_only,
            )
            _write_pairs(file, ((query, target) for query, target, *_ in hits if query != target))
        return list(_read_pairs(file))

    def _write(self, name: str, clusters: Sequence[str]) -> None:
        wanted = {member for cluster in clusters for member in self._clusters[cluster]}
        records = (
            ProteinRecord(name, "", sequence)
            for name, sequence in _records(self._distinct)
            if name in wanted
        )
        write_fasta(self._distinct.with_name(name), records, 10**9)


def _records(path: Path) -> Iterator[tuple[str, str]]:
    return ((record.name, record.sequence) for record in iter_fasta(path))


def _read_clusters(path: Path) -> dict[str, list[str]]:
    members: dict[str, list[str]] = defaultdict(list)
    for representative, member in _read_pairs(path):
        members[representative].append(member)
    return dict(members)


def _check_names(members: dict[str, list[str]], distinct: Path, table: Path) -> None:
    known = {name for name, _ in _records(distinct)}
    listed = [member for group in members.values() for member in group]
    if len(listed) != len(known) or set(listed) != known:
        odd = next(iter(set(listed) ^ known), "a name that is there twice")
        raise UserError(
            f"{table} does not list every distinct sequence once ({odd}); cluster the same "
            "sequences"
        )


def _read_pairs(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2:
                raise UserError(
                    f"{path}:{number}: expected two columns, representative and member, got "
                    f"{len(fields)}"
                )
            yield fields[0], fields[1]


def _write_pairs(path: Path, pairs: Iterable[Sequence[str]]) -> None:
    text = "".join(f"{first}\t{second}\n" for first, second in pairs)
    write_atomically(path, text.encode())
