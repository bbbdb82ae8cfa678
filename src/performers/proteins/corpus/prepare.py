"""From sequences to a corpus, in stages that resume: one part, or all of it."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import read_json, write_json
from performers.app.progress import Progress
from performers.proteins.corpus.blocks import FindClusters, Part, write_part
from performers.proteins.corpus.clusters import TableClusters, header_clusters
from performers.proteins.corpus.merge import Report, finished, merge_parts
from performers.proteins.corpus.mmseqs import Mmseqs
from performers.proteins.corpus.relatives import read_pairs, write_pairs
from performers.proteins.corpus.sources import Source, fingerprint, protein_name
from performers.proteins.inputs.fasta import iter_fasta, write_fasta
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.options import CorpusOptions, SplitOptions

_WHOLE = Part(1, 1)


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
    2. Clusters, by mmseqs2 or as the table ``clusters`` of representative and member lists them,
       also kept as ``clusters.tsv``.
    3. Splits: validation and test by sequence. See `merge_parts` for the other arguments.

    Returns:
        The manifest.

    Raises:
        UserError: The data or options cannot be used, mmseqs2 is not there or fails, or the folder
            holds a corpus or a run of another kind.
    """
    settings = _settings(source, options, clusters)
    done = finished(output, settings, report)
    if done is not None:
        return done
    work = output / "work"
    distinct = work / "sequences.fasta"
    if not distinct.exists():
        report("reading sequences")
        _write_distinct(source, distinct, options.min_length)
    read = read_json(work / "read.json")
    mmseqs = Mmseqs(work, threads, memory)
    table = output / "clusters.tsv"
    if not table.exists():
        report(f"clustering {read['distinct']:,} sequences (mmseqs2, minutes)")
        if clusters is None:
            mmseqs.create_database("sequences.fasta", "all")
            pairs = mmseqs.cluster("all", options.identity, options.coverage)
        else:
            pairs = read_pairs(clusters)
        write_pairs(table, pairs)

    def checked() -> TableClusters:
        found = TableClusters(table, work / "members")
        if len(found) != read["distinct"]:
            raise UserError(
                f"{clusters or table} lists {len(found):,} members, but there are "
                f"{read['distinct']:,} distinct sequences; cluster the same sequences"
            )
        return found

    part = work / "part"
    write_part(part, [distinct], _WHOLE, settings, checked, by_cluster=False)
    return merge_parts([part], output, threads=threads, memory=memory, read=read, report=report)


def prepare_part(
    source: Source,
    output: Path,
    options: SplitOptions,
    part: Part,
    *,
    clusters: Path | None = None,
    report: Report = lambda text: None,
    progress: Progress | None = None,
) -> None:
    """Write a part of a corpus, for `merge_parts`, as a stream: memory does not grow with it.

    Every part reads all of the input, and parses its own blocks. A run that was stopped goes on
    from its folder. ``clusters`` is a table of cluster and member; None where the headers are those
    of UniRef50. ``progress`` is called with the bytes that were read and the bytes in all.

    Raises:
        UserError: The data cannot be used, or the folder holds another part.
    """
    members = output / "members"

    def find() -> FindClusters:
        if clusters is None:
            return header_clusters
        report("sorting the table of clusters")
        return TableClusters(clusters, members)

    write_part(
        output,
        source.files,
        part,
        _settings(source, options, clusters),
        find,
        by_cluster=True,
        progress=progress,
    )
    shutil.rmtree(members, ignore_errors=True)


def prepare_clustered(
    source: Source,
    output: Path,
    options: SplitOptions,
    *,
    clusters: Path | None = None,
    threads: int = 2,
    memory: int = 1500 << 20,
    report: Report = lambda text: None,
    reading: Progress | None = None,
    writing: Progress | None = None,
) -> dict[str, Any]:
    """Write a corpus of sequences whose clusters are known, as a stream.

    Splits are of whole clusters. It is `prepare_part` for one part in ``output/work``, and
    `merge_parts`.

    Their arguments, result and errors; ``reading`` and ``writing`` are their progress.
    """
    done = finished(output, _settings(source, options, clusters), report)
    if done is not None:
        return done
    # Before the hours of reading.
    Mmseqs(output / "work", threads, memory)
    part = output / "work" / "part"
    report("reading sequences")
    prepare_part(source, part, options, _WHOLE, clusters=clusters, report=report, progress=reading)
    return merge_parts(
        [part], output, threads=threads, memory=memory, report=report, progress=writing
    )


def _settings(source: Source, options: SplitOptions, clusters: Path | None) -> dict[str, Any]:
    """Settings that decide a corpus."""
    return {
        "source": source.description,
        "options": asdict(options),
        "clusters_file": None if clusters is None else fingerprint(clusters),
    }


def _write_distinct(source: Source, path: Path, min_length: int) -> None:
    first: dict[str, str] = {}
    records = left_out = 0
    for record in chain.from_iterable(map(iter_fasta, source.files)):
        name, sequence = protein_name(record.name), record.sequence
        records += 1
        if len(sequence) < min_length:
            left_out += 1
            continue
        first[sequence] = min(name, first.get(sequence, name))
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
