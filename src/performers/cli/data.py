"""``performers data``: sequences made ready for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.cli.console import App, ProgressBars, note, one_line_errors, output
from performers.proteins.annotations import write_go_labels
from performers.proteins.corpus import CorpusOptions, prepare_corpus
from performers.proteins.corpus.download import UNIPROT
from performers.proteins.corpus.sources import open_source
from performers.proteins.folders import prepare_output_file, prepare_output_folder

app = App(no_args_is_help=True, help="Make sequences ready for training.")

_DEFAULTS = CorpusOptions()


@app.callback()
def main() -> None:
    """Make sequences ready for training."""


@app.command()
def swissprot(
    output_folder: Annotated[Path, typer.Option("--output", help="Folder of the corpus.")],
    source: Annotated[
        list[Path] | None,
        typer.Option(
            help="FASTA file, BLAST database or a folder with such (repeatable), for example "
            "/usr/share/metastudent-data of Debian's package; the current release of Swiss-Prot "
            "is downloaded without one."
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            help=f"Where to download from, without --source. [default: {UNIPROT}]",
            show_default=False,
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            help="Licence of the sequences, for the manifest; of a download UniProt's by default."
        ),
    ] = None,
    clusters: Annotated[
        Path | None,
        typer.Option(help="Table of representative and member, instead of clustering."),
    ] = None,
    identity: Annotated[
        float, typer.Option(help="Least identity within a cluster.")
    ] = _DEFAULTS.identity,
    coverage: Annotated[
        float, typer.Option(help="Least coverage of both sequences within a cluster.")
    ] = _DEFAULTS.coverage,
    validation_fraction: Annotated[
        float, typer.Option(help="Share of the sequences to validate on.")
    ] = _DEFAULTS.validation_fraction,
    test_fraction: Annotated[
        float, typer.Option(help="Share of the sequences to test on.")
    ] = _DEFAULTS.test_fraction,
    ood_fraction: Annotated[
        float, typer.Option(help="Share of the sequences held out as whole clusters.")
    ] = _DEFAULTS.ood_fraction,
    sensitivity: Annotated[
        float, typer.Option(help="Of the search for relatives of clusters to hold out.")
    ] = _DEFAULTS.sensitivity,
    max_evalue: Annotated[
        float, typer.Option(help="Up to this e-value a hit is a relative.")
    ] = _DEFAULTS.max_evalue,
    min_length: Annotated[
        int, typer.Option(help="Shorter sequences are left out.")
    ] = _DEFAULTS.min_length,
    seed: Annotated[int, typer.Option(help="Of every draw.")] = _DEFAULTS.seed,
    shard_tokens: Annotated[
        int, typer.Option(help="Tokens in a file of tokens.")
    ] = _DEFAULTS.shard_tokens,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads of mmseqs2.")] = 2,
    memory: Annotated[
        int, typer.Option(min=64, help="MiB that the index of mmseqs2 may take.")
    ] = 1500,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the preparation in --output.")
    ] = False,
) -> None:
    """Swiss-Prot, or other sequences: distinct, clustered, split, and on disk as tokens.

    Train on the result with ``performers train FOLDER --output MODEL``.
    """
    with one_line_errors():
        options = CorpusOptions(
            identity=identity,
            coverage=coverage,
            validation_fraction=validation_fraction,
            test_fraction=test_fraction,
            ood_fraction=ood_fraction,
            sensitivity=sensitivity,
            max_evalue=max_evalue,
            min_length=min_length,
            seed=seed,
            shard_tokens=shard_tokens,
        )
        prepare_output_folder(output_folder, resume=resume)
        with ProgressBars() as bars:
            found = open_source(
                source or [],
                output_folder,
                url=url,
                licence=licence,
                progress=bars.task("downloading"),
            )
        manifest = prepare_corpus(
            found,
            output_folder,
            options,
            clusters=clusters,
            threads=threads,
            memory=memory << 20,
            report=note,
        )
        _print_splits(manifest["splits"])


@app.command("go-labels")
def go_labels(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of Debian's metastudent-data, such as /usr/share/metastudent-data."
        ),
    ],
    output_file: Annotated[Path, typer.Option("--output", help="A .tsv file.")],
    ontology: Annotated[
        str,
        typer.Option(
            help="MFO: molecular function; BPO: biological process; CCO: cellular component."
        ),
    ] = "MFO",
    terms: Annotated[
        str,
        typer.Option(
            help="frequent; enzyme-class: EC 1 to 6; enzyme-class-7: and no enzyme; or GO terms "
            "with commas between."
        ),
    ] = "frequent",
    min_depth: Annotated[
        int, typer.Option(help="Least steps of frequent terms below the root.")
    ] = 2,
    min_count: Annotated[int, typer.Option(help="Least proteins of a frequent term.")] = 500,
    max_terms: Annotated[int, typer.Option(help="Most frequent terms.")] = 30,
) -> None:
    """Labels of proteins from the Gene Ontology, for performers probe --labels."""
    with one_line_errors():
        prepare_output_file(output_file, (".tsv",))
        found = write_go_labels(
            source,
            output_file,
            ontology,
            terms=terms,
            min_depth=min_depth,
            min_count=min_count,
            max_terms=max_terms,
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
        output.print(f"{len(found.labels):,} proteins in {output_file}", soft_wrap=True)


def _print_splits(splits: dict[str, dict[str, int]]) -> None:
    columns = ("sequences", "residues", "clusters")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("split")
    for column in columns:
        table.add_column(column, justify="right")
    for name, entry in splits.items():
        table.add_row(name, *(f"{entry[column]:,}" for column in columns))
    output.print(table)
