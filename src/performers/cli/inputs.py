"""What commands read: a model, or the one that ships, and the proteins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from performers.cli.console import note
from performers.proteins.errors import UserError
from performers.proteins.fasta import ProteinRecord, read_fasta
from performers.proteins.pretrained import PRETRAINED, pretrained_folder

BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in a batch, padding included.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")]
ModelAndFasta = Annotated[
    list[Path],
    typer.Argument(
        metavar="[MODEL] FASTA...",
        show_default=False,
        help=f"A folder that performers train wrote, or {PRETRAINED}, which is the default; then "
        "FASTA files, plain or gzipped.",
    ),
]


def model_and_fasta(paths: list[Path]) -> tuple[Path, list[Path]]:
    """Tell a model from the FASTA files after it.

    Args:
        paths: The model's folder or ``performers-protein-small``, or neither; FASTA files.

    Returns:
        The folder of the model and the files, perhaps none.

    Raises:
        UserError: The first is nothing at all.
    """
    first, rest = paths[0], paths[1:]
    if str(first) == PRETRAINED and not first.exists():
        return pretrained_folder(), rest
    if first.is_dir():
        return first, rest
    if not first.exists():
        raise UserError(
            f"{first}: no such file or folder; give a model's folder and FASTA files, or FASTA "
            f"files alone to read them with {PRETRAINED}"
        )
    return pretrained_folder(), paths


def protein_records(paths: list[Path]) -> list[ProteinRecord]:
    """The proteins of FASTA files.

    Raises:
        UserError: There are none.
    """
    if not paths:
        raise UserError("give at least one FASTA file after the model")
    records, letters = read_fasta(paths)
    note(letters.summary())
    if not records:
        raise UserError("the FASTA files hold no sequence")
    return records
