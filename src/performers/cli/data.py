"""``performers data``: sequences made ready for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from performers.app.files import prepare_output_folder
from performers.app.options import Options, option
from performers.cli.commands import App
from performers.cli.console import ProgressBars, note, output, table
from performers.proteins.options import UNIPROT, CorpusOptions

app = App(no_args_is_help=True, help="Make sequences ready for training.")


@dataclass(frozen=True, kw_only=True)
class CorpusFiles(Options):
    """Sources of a corpus, and the means to prepare it."""

    output_folder: Path = option("Folder of the corpus.", flag="--output")
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
    threads: int = option("Threads of mmseqs2.", 2, at_least=1, at_most=1024)
    memory: int = option("MiB that the index of mmseqs2 may take.", 1500, at_least=64)
    resume: bool = option("Continue the preparation in --output.", False)


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
    columns = ("sequences", "residues", "clusters")
    rows = [
        (name, *(f"{entry[column]:,}" for column in columns))
        for name, entry in manifest["splits"].items()
    ]
    output.print(table(("split", *columns), rows))
