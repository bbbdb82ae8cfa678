"""``performers data``: sequences made ready for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.cli.console import ProgressBars, note, one_line_errors, output
from performers.proteins.corpus import CorpusOptions, prepare_corpus
from performers.proteins.corpus.download import UNIPROT
from performers.proteins.corpus.sources import UNIPROT_LICENCE, open_source
from performers.proteins.folders import prepare_output_folder

app = typer.Typer(no_args_is_help=True, help="Make sequences ready for training.")

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
    url: Annotated[str, typer.Option(help="Where to download from.")] = UNIPROT,
    licence: Annotated[
        str, typer.Option(help="Licence of the sequences, for the manifest.")
    ] = UNIPROT_LICENCE,
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
    threads: Annotated[int, typer.Option(min=1, help="Threads of mmseqs2.")] = 2,
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


def _print_splits(splits: dict[str, dict[str, int]]) -> None:
    columns = ("sequences", "residues", "clusters")
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("split")
    for column in columns:
        table.add_column(column, justify="right")
    for name, entry in splits.items():
        table.add_row(name, *(f"{entry[column]:,}" for column in columns))
    output.print(table)
