"""``performers data``: sequences made ready for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.app.files import prepare_output_file, prepare_output_folder
from performers.app.options import Options, argument, option
from performers.cli.commands import App
from performers.cli.console import ProgressBars, note, output
from performers.proteins.options import UNIPROT, CorpusOptions

app = App(no_args_is_help=True, help="Make sequences ready for training.")


@dataclass(frozen=True, kw_only=True)
class CorpusFiles(Options):
    """Sources of a corpus, and the means to prepare it."""

    output_folder: Path = option("Folder of the corpus.", flag="--output")
    source: list[Path] | None = option(
        "FASTA file, BLAST database or a folder with such (repeatable), for example "
        "/usr/share/metastudent-data of Debian's package; the current release of Swiss-Prot is "
        "downloaded without one.",
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
    threads: int = option("Threads of mmseqs2.", 2, at_least=1, at_most=1024)
    memory: int = option("MiB that the index of mmseqs2 may take.", 1500, at_least=64)
    resume: bool = option("Continue the preparation in --output.", False)


@app.command()
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
    _print_splits(manifest["splits"])


@dataclass(frozen=True, kw_only=True)
class LabelOptions(Options):
    """Options of ``performers data go-labels``."""

    source: Path = argument(
        "Folder of Debian's metastudent-data, such as /usr/share/metastudent-data."
    )
    output_file: Path = option("A .tsv file.", flag="--output")
    ontology: str = option(
        "MFO: molecular function; BPO: biological process; CCO: cellular component.", "MFO"
    )
    terms: str = option(
        "frequent; enzyme-class: EC 1 to 6; enzyme-class-7: and no enzyme; or GO terms with "
        "commas between.",
        "frequent",
    )
    min_depth: int = option("Least steps of frequent terms below the root.", 2)
    min_count: int = option("Least proteins of a frequent term.", 500)
    max_terms: int = option("Most frequent terms.", 30)


@app.command("go-labels")
def go_labels(options: LabelOptions) -> None:
    """Labels of proteins from the Gene Ontology, for performers probe --labels."""
    from performers.proteins.annotations import write_go_labels

    prepare_output_file(options.output_file, (".tsv",))
    found = write_go_labels(
        options.source,
        options.output_file,
        options.ontology,
        terms=options.terms,
        min_depth=options.min_depth,
        min_count=options.min_count,
        max_terms=options.max_terms,
    )
    for reason, count in found.left_out.items():
        note(f"{count:,} proteins left out: {reason}")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("label")
    table.add_column("name")
    table.add_column("proteins", justify="right")
    for label, name in found.names.items():
        table.add_row(label, name, f"{found.counts[label]:,}")
    output.print(table)
    output.print(f"{len(found.labels):,} proteins in {options.output_file}", soft_wrap=True)


def _print_splits(splits: dict[str, dict[str, int]]) -> None:
    columns = ("sequences", "residues", "clusters")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("split")
    for column in columns:
        table.add_column(column, justify="right")
    for name, entry in splits.items():
        table.add_row(name, *(f"{entry[column]:,}" for column in columns))
    output.print(table)
