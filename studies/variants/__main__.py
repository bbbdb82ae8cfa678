"""``python -m studies.variants``: scores of substitutions against their measured effects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from performers.app.options import option
from performers.cli.commands import App
from performers.cli.interrupts import end_at_once
from studies.parts import StudyOptions, extent, fingerprint, run_parts

app = App()


@dataclass(frozen=True, kw_only=True)
class VariantsOptions(StudyOptions):
    """Options of the study."""

    assays: Path = option("Folder of the tables of measurements.", changes_result=False)
    relatives: Path | None = option(
        "FASTA file of performers data relatives.", None, changes_result=False
    )
    counts: tuple[int, ...] = option("Numbers of relatives, rising.", (1, 5, 30), rising=True)
    relatives_tokens: int = option("Most tokens of a protein and its relatives.", 8192, at_least=3)
    only: str | None = option("One protein alone.", None, changes_result=False)
    threads: int = extent("Threads of torch.", 1, at_least=1)


@app.command()
def variants(options: VariantsOptions) -> None:
    """Rank correlation of the effects of substitutions with scores, with and without relatives."""
    import torch

    from studies.variants.assays import ASSAYS, proteins
    from studies.variants.scores import measure, tables

    torch.set_num_threads(options.threads)
    parts = {
        protein.name: partial(
            measure,
            protein,
            options.assays,
            options.relatives,
            options.counts,
            options.relatives_tokens,
        )
        for protein in proteins()
        if options.only in (None, protein.name)
    }
    settings = options.settings()
    settings["assays"] = fingerprint(*(options.assays / x.file for x in ASSAYS.values()))
    if options.relatives is not None:
        settings["relatives"] = fingerprint(options.relatives)
    run_parts(options, parts, tables, settings=settings)


if __name__ == "__main__":
    end_at_once()
    app()
