"""Inputs of commands: a model, by default the one that ships, and proteins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.app.errors import UserError
from performers.cli.console import note
from performers.proteins.embedded import PRETRAINED, pretrained_folder

if TYPE_CHECKING:
    from performers.proteins.inputs.fasta import ProteinRecord


BATCH_TOKENS: dict[str, Any] = {
    "help": "Tokens in a batch, padding included.",
    "default": 8192,
    "at_least": 1,
}
SEED: dict[str, Any] = {"help": "Random seed.", "default": 0, "at_least": 0, "below": 2**32}
NEW_FOLDER: dict[str, Any] = {"help": "A new folder.", "flag": "--output"}
MODEL_AND_FASTA: dict[str, Any] = {
    "help": f"A folder that performers train wrote, or {PRETRAINED}, which is the default; then "
    "FASTA files, plain or gzipped.",
    "flag": "[MODEL] FASTA...",
}
"""Options that several commands have; `model_and_fasta` reads the last."""


def model_folder(path: Path) -> Path:
    """Return the folder of a model, which may be named ``performers-protein-small``."""
    return pretrained_folder() if str(path) == PRETRAINED and not path.exists() else path


def model_and_fasta(paths: list[Path]) -> tuple[Path, list[Path]]:
    """Tell a model, by default the one that ships, from the FASTA files after it.

    Raises:
        UserError: The first path does not exist or is a folder without a model, a model comes
            later, or no FASTA file is given.
    """
    first, rest = model_folder(paths[0]), paths[1:]
    for path in rest:
        if (model_folder(path) / "config.json").exists():
            raise UserError(f"{path} is a model, and comes before the FASTA files; give one model")
    if first.is_dir():
        # A training that has not ended has no model yet, which load_model explains.
        if not (first / "config.json").exists() and not (first / "checkpoints").exists():
            raise UserError(
                f"{first} is a folder without a model: it has no config.json; name the FASTA files "
                "in it, or give a folder that performers train wrote and then FASTA files"
            )
        if not rest:
            raise UserError("give at least one FASTA file after the model")
        return first, rest
    if not first.exists():
        raise UserError(
            f"{first}: no such file or folder; give a model's folder and FASTA files, or FASTA "
            f"files alone to read them with {PRETRAINED}"
        )
    return pretrained_folder(), paths


def protein_records(paths: list[Path]) -> list[ProteinRecord]:
    """Read the proteins of FASTA files, at least one."""
    from performers.proteins.inputs.fasta import read_fasta

    records, letters = read_fasta(paths)
    note(letters.summary())
    if not records:
        raise UserError("the FASTA files hold no sequence")
    return records
