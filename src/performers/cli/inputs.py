"""Inputs of commands: a model, by default the one that ships, and proteins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.app.errors import UserError
from performers.cli.console import note
from performers.proteins.embedded import PRETRAINED, model_folder, pretrained_folder
from performers.proteins.options import DTYPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from performers.proteins.inputs.records import LetterReport, ProteinRecord
    from performers.proteins.inputs.relatives import Relatives


BATCH_TOKENS: dict[str, Any] = {
    "help": "Tokens in a batch, padding included.",
    "default": 8192,
    "at_least": 1,
}
SEED: dict[str, Any] = {"help": "Random seed.", "default": 0, "at_least": 0, "below": 2**32}
NEW_FOLDER: dict[str, Any] = {"help": "A new folder.", "flag": "--output"}
SKIP_INVALID: dict[str, Any] = {
    "help": "Leave out records that cannot be read as protein, and count them.",
    "default": False,
}
DEVICE: dict[str, Any] = {
    "help": "cpu, cuda, cuda:1 or another device of torch; a CUDA device by default where there "
    "is one.",
    "default": None,
    "group": "Computation",
}
DTYPE: dict[str, Any] = {
    "help": f"Type to compute in: {', '.join(DTYPES)}; as the model was saved by default.",
    "default": None,
    "choices": DTYPES,
}
MODEL_AND_FASTA: dict[str, Any] = {
    "help": f"A folder that performers train wrote, or {PRETRAINED}, which is the default; then "
    "FASTA files, plain or compressed (gzip, bzip2, xz, Zstandard), or - for standard input.",
    "flag": "[MODEL] FASTA...",
}
RELATIVES: dict[str, Any] = {
    "help": "FASTA file of relatives to read the proteins with: of all of them, or, where headers "
    "have family=NAME, of those of the same family.",
    "default": None,
    "group": "Relatives",
}
RELATIVES_TOKENS: dict[str, Any] = {
    "help": "Most tokens of a protein and its relatives; as trained by default.",
    "default": None,
    "at_least": 6,
}
"""Options that several commands have; `model_and_fasta` and `read_relatives` read some."""


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
    if not first.exists() and str(first) != "-":
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


def check_relatives_tokens(relatives: Path | None, tokens: int | None) -> None:
    """Refuse --relatives-tokens without --relatives."""
    if tokens is not None and relatives is None:
        raise UserError("--relatives-tokens needs --relatives, the file of relatives")


def read_relatives(
    path: Path | None,
    tokens: int | None,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    proteins: Iterable[ProteinRecord],
) -> Relatives | None:
    """Read --relatives, if given, check that every protein has some, and say how many.

    Args:
        path: FASTA file.
        tokens: Most tokens of a protein and its relatives; None: as trained.
        folder: Folder of the model.
        tokenizer: Its tokenizer.
        proteins: All proteins that will be read.

    Raises:
        UserError: The file holds no sequence, headers do not fit, or a protein has no relative or
            leaves no place for one.
    """
    if path is None:
        return None
    from performers.proteins.inputs.fasta import read_fasta
    from performers.proteins.inputs.relatives import Relatives
    from performers.proteins.model_folder import model_max_length, reads_families

    records, letters = read_fasta([path])
    if not records:
        raise UserError(f"--relatives {path} holds no sequence; give relatives of the proteins")
    relatives = Relatives(records, tokenizer, tokens or model_max_length(tokenizer))
    for protein in proteins:
        relatives.count(protein)
    note(letters.summary())
    if not reads_families(folder):
        note(
            f"{folder.name} was not trained on rows of relatives (performers train --families): "
            "do not expect it to read them"
        )
    note(relatives.summary())
    return relatives


class ProteinFiles:
    """Context of the proteins of FASTA files, which are checked whole before any is read.

    Memory does not grow with the number of proteins but for their names.

    Args:
        paths: FASTA files; pipes and standard input are copied to temporary files.
        skip_invalid: Leave out records at fault.

    Raises:
        UserError: A file or a record is at fault, or no sequence is left.
    """

    letters: LetterReport

    def __init__(self, paths: list[Path], *, skip_invalid: bool) -> None:
        self._paths = paths
        self._skip_invalid = skip_invalid
        self._stack = ExitStack()
        self._sources: list[tuple[Path, str]] = []

    def __enter__(self) -> ProteinFiles:
        from performers.proteins.inputs.records import LetterReport
        from performers.proteins.inputs.streams import rereadable

        with ExitStack() as stack:
            self._sources = stack.enter_context(rereadable(self._paths))
            self.letters = LetterReport()
            for _ in self._records(self.letters):
                pass
            note(self.letters.summary())
            if not self.letters.records:
                note(self.letters.skips())
                raise UserError("the FASTA files hold no sequence")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def chunks(self, residues: int) -> Iterator[list[ProteinRecord]]:
        """Neighbouring proteins, of about so many residues together."""
        chunk: list[ProteinRecord] = []
        size = 0
        for record in self._records(None):
            chunk.append(record)
            size += len(record.sequence)
            if size >= residues:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def records(self) -> Iterator[ProteinRecord]:
        """All proteins, one at a time."""
        return self._records(None)

    def _records(self, letters: LetterReport | None) -> Iterator[ProteinRecord]:
        from performers.proteins.inputs.fasta import iter_fasta

        for path, name in self._sources:
            yield from iter_fasta(path, letters, skip_invalid=self._skip_invalid, name=name)
