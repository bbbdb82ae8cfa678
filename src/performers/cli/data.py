"""``performers data``: sequences made ready for training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from performers.app.errors import UserError
from performers.app.files import prepare_output_file, prepare_output_folder
from performers.app.options import OptionError, Options, argument, option
from performers.cli.commands import App
from performers.cli.console import ProgressBars, note, output, table
from performers.cli.inputs import protein_records
from performers.proteins.options import UNIPROT, CorpusOptions, SplitOptions

app = App(no_args_is_help=True, help="Make sequences ready for training.")


@dataclass(frozen=True, kw_only=True)
class CorpusOutput(Options):
    """Folder of a corpus, and the means to prepare it."""

    output_folder: Path = option("Folder of the corpus.", flag="--output")
    threads: int = option("Threads of mmseqs2.", 2, at_least=1, at_most=1024)
    memory: int = option("MiB that the index of mmseqs2 may take.", 1500, at_least=64)
    resume: bool = option("Continue the preparation in --output.", False)


@dataclass(frozen=True, kw_only=True)
class CorpusFiles(CorpusOutput):
    """Sources of a corpus that is clustered as it is made."""

    source: list[Path] | None = option(
        "FASTA file (repeatable); the current release of Swiss-Prot is downloaded without one.",
        None,
    )
    url: str | None = option(
        f"Where to download from, without --source; by default {UNIPROT}.", None
    )
    licence: str | None = option(
        "Licence of the sequences, for the manifest; of a download UniProt's by default.", None
    )
    clusters: Path | None = option(
        "Table of representative and member, instead of clustering.", None
    )


@dataclass(frozen=True, kw_only=True)
class StreamFiles(CorpusOutput):
    """Sources of a corpus that is read as a stream."""

    fasta: list[Path] = argument("FASTA files, plain or compressed.")
    part: str | None = option(
        "Read part i of n, as i/n; performers data merge makes a corpus of all parts.", None
    )
    licence: str | None = option("Licence of the sequences, for the manifest.", None)


@dataclass(frozen=True, kw_only=True)
class TableFiles(StreamFiles):
    """Sources of a stream whose headers name no cluster, and the table that does."""

    clusters: Path | None = option(
        "Table of cluster and member, or UniProt's idmapping_selected.tab or idmapping.dat, whose "
        "UniRef50 clusters are taken; plain or compressed.",
        None,
    )


@dataclass(frozen=True, kw_only=True)
class MergeFiles(CorpusOutput):
    """Parts of a corpus."""

    parts: list[Path] = argument("Folders made with --part, all of them, in any order.")


@dataclass(frozen=True, kw_only=True)
class ExportFiles(Options):
    """A corpus, and the folder and format of its copy."""

    corpus: Path = argument("Folder of performers data.")
    output_folder: Path = option("Folder of the copy.", flag="--output")
    format: str = option("Format: mds, of mosaicml-streaming.", choices=("mds",))


@dataclass(frozen=True, kw_only=True)
class RelativesFiles(Options):
    """Proteins, and where to look for their relatives."""

    fasta: list[Path] = argument("FASTA files of proteins, plain or compressed.")
    among: list[Path] = option("FASTA file, or folder of performers data, to search (repeatable).")
    output_file: Path = option("FASTA file of the relatives.", flag="--output")
    most: int = option("Most relatives of a protein, the nearest ones.", 30, at_least=1)
    sensitivity: float = option("Sensitivity of mmseqs2 (-s).", 5.7, at_least=1, at_most=7.5)
    max_evalue: float = option("Largest e-value of a relative.", 1e-3, above=0)
    threads: int = option("Threads of mmseqs2.", 2, at_least=1, at_most=1024)
    memory: int = option("MiB that the index of mmseqs2 may take.", 1500, at_least=64)


@app.command(example="performers data swissprot --output swissprot")
def swissprot(files: CorpusFiles, options: CorpusOptions) -> None:
    """Swiss-Prot, or other sequences: distinct, clustered, split, and on disk as tokens.

    Train on the result with ``performers train FOLDER --output MODEL``.
    """
    from performers.proteins.corpus import prepare_corpus
    from performers.proteins.corpus.sources import open_source

    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    with ProgressBars() as bars:
        source = open_source(
            files.source or [],
            folder,
            url=files.url,
            licence=files.licence,
            progress=bars.task("downloading"),
        )
    manifest = prepare_corpus(
        source,
        folder,
        options,
        clusters=files.clusters,
        threads=files.threads,
        memory=files.memory << 20,
        report=note,
    )
    _print_splits(manifest)


@app.command(example="performers data uniref50 uniref50.fasta.gz --output uniref50")
def uniref50(files: StreamFiles, options: SplitOptions) -> None:
    """UniRef50 as a stream, in constant memory: split by the clusters that its headers name."""
    _stream(files, options, None)


@app.command(
    example="performers data trembl uniprot_trembl.fasta.gz --clusters idmapping_selected.tab.gz "
    "--output trembl"
)
def trembl(files: TableFiles, options: SplitOptions) -> None:
    """TrEMBL, or other sequences, as a stream: split by the clusters of a table."""
    if files.clusters is None:
        raise OptionError(
            "--clusters is missing: TrEMBL's headers name no cluster; give UniProt's "
            "idmapping_selected.tab.gz of the same release, or a table of cluster and member "
            "(UniRef50, whose headers do, is made by performers data uniref50)"
        )
    if not files.clusters.is_file():
        raise OptionError(f"--clusters {files.clusters} is no file; check the path")
    _stream(files, options, files.clusters)


def _stream(files: StreamFiles, options: SplitOptions, clusters: Path | None) -> None:
    from performers.proteins.corpus import Part, prepare_clustered, prepare_part
    from performers.proteins.corpus.sources import given_source

    part = None if files.part is None else Part.read(files.part)
    source = given_source(files.fasta, licence=files.licence)
    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    with ProgressBars() as bars:
        if part is not None:
            prepare_part(
                source,
                folder,
                options,
                part,
                clusters=clusters,
                report=note,
                progress=bars.task("reading"),
            )
            note(f"part {part.number} of {part.of} is in {folder}; next: performers data merge")
            return
        manifest = prepare_clustered(
            source,
            folder,
            options,
            clusters=clusters,
            threads=files.threads,
            memory=files.memory << 20,
            report=note,
            reading=bars.task("reading"),
            writing=bars.task("writing"),
        )
    _print_splits(manifest)


@app.command(example="performers data merge part1 part2 part3 part4 --output uniref50")
def merge(files: MergeFiles) -> None:
    """Parts of a corpus, made with --part anywhere, as one corpus: that of the whole, exactly."""
    from performers.proteins.corpus import merge_parts

    inside = [path for path in files.parts if path.resolve() == files.output_folder.resolve()]
    if inside:
        raise UserError(f"--output {inside[0]} is one of the parts; give another folder")
    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    with ProgressBars() as bars:
        manifest = merge_parts(
            files.parts,
            folder,
            threads=files.threads,
            memory=files.memory << 20,
            report=note,
            progress=bars.task("writing"),
        )
    _print_splits(manifest)


@app.command(
    example="performers data relatives proteins.fasta --among swissprot --output relatives.fasta"
)
def relatives(files: RelativesFiles) -> None:
    """Relatives of proteins, found by mmseqs2, for ``--relatives`` of the commands that read them.

    Each is written in the places of the protein, whose name is ``family=NAME`` in its header: ``X``
    for a residue that it lacks, and without those that the protein lacks.
    """
    from performers.proteins.corpus import Corpus, is_corpus
    from performers.proteins.corpus.relatives import find_relatives
    from performers.proteins.inputs.fasta import iter_fasta

    prepare_output_file(files.output_file, (".fasta", ".fa", ".faa", ".gz"))
    proteins = protein_records(files.fasta)
    repeated = [name for name, n in Counter(x.name for x in proteins).items() if n > 1]
    if repeated:
        raise UserError(f"{repeated[0]!a} is the name of several proteins; give each its own")
    missing = next((path for path in files.among if not path.exists()), None)
    if missing is not None:
        raise UserError(f"--among {missing} does not exist; check the path")

    def among() -> Iterator[tuple[str, str]]:
        for path in files.among:
            if is_corpus(path):
                corpus = Corpus(path)
                for name in corpus.manifest["splits"]:
                    split = corpus.split(name)
                    yield from zip(split.names, map(split.sequence, range(len(split))), strict=True)
            else:
                yield from ((record.name, record.sequence) for record in iter_fasta(path))

    note(f"looking for relatives of {len(proteins):,} proteins (mmseqs2)")
    counts = find_relatives(
        proteins,
        among,
        files.output_file,
        most=files.most,
        sensitivity=files.sensitivity,
        max_evalue=files.max_evalue,
        threads=files.threads,
        memory=files.memory << 20,
    )
    note(f"{sum(counts):,} relatives in {files.output_file}")
    alone = [protein.name for protein, count in zip(proteins, counts, strict=True) if not count]
    if alone:
        listed = ", ".join(alone[:5]) + (", ..." if len(alone) > 5 else "")
        note(f"no relative of {len(alone):,}: {listed}; leave them out of what reads relatives")


@app.command(example="performers data export uniref50 --format mds --output uniref50-mds")
def export(files: ExportFiles) -> None:
    """A corpus in a format for object stores."""
    from performers.proteins.corpus import Corpus
    from performers.proteins.corpus.export import export_mds

    corpus = Corpus(files.corpus)
    folder = prepare_output_folder(files.output_folder)
    with ProgressBars() as bars:
        export_mds(corpus, folder, progress=bars.task("writing"))


def _print_splits(manifest: Mapping[str, Any]) -> None:
    columns = ("sequences", "residues", "clusters")
    rows = [
        (name, *(f"{entry[column]:,}" for column in columns))
        for name, entry in manifest["splits"].items()
    ]
    output.print(table(("split", *columns), rows))
