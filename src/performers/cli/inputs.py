"""Inputs of commands: a model, by default the one that ships, and proteins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from performers.app.errors import UserError
from performers.app.options import Options, argument, option
from performers.cli.console import note
from performers.proteins.embedded import (
    PRETRAINED,
    READS_RELATIVES,
    model_folder,
    pretrained_folder,
)
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
"""Options that several commands have."""


@dataclass(frozen=True, kw_only=True)
class Computation(Options):
    """Place, precision and size of a model's computation."""

    device: str | None = option(
        "cpu, cuda, cuda:1 or another device of torch; a CUDA device by default where there is "
        "one.",
        None,
        group="Computation",
    )
    dtype: str | None = option(
        f"Type to compute in: {', '.join(DTYPES)}; as the model was saved by default.",
        None,
        choices=DTYPES,
    )
    batch_tokens: int = option(**BATCH_TOKENS)


@dataclass(frozen=True, kw_only=True)
class ModelAndFasta(Options):
    """A model, by default one that ships, and FASTA files."""

    paths: list[Path] = argument(
        f"A folder that performers train wrote, or {PRETRAINED}, which is the default, or "
        f"{READS_RELATIVES}, that of --relatives; then FASTA files, plain or compressed (gzip, "
        "bzip2, xz, Zstandard), or - for standard input.",
        flag="[MODEL] FASTA...",
    )

    def split(self, *, relatives: bool = False) -> tuple[Path, list[Path]]:
        """Tell the model from the FASTA files after it; the default reads ``relatives`` or none.

        Raises:
            UserError: The first path does not exist or is a folder without a model, a model comes
                later, or no FASTA file is given.
        """
        first, rest = model_folder(self.paths[0]), self.paths[1:]
        for path in rest:
            if (model_folder(path) / "config.json").exists():
                raise UserError(
                    f"{path} is a model, and comes before the FASTA files; give one model"
                )
        if first.is_dir():
            # A training that has not ended has no model yet, which load_model explains.
            if not (first / "config.json").exists() and not (first / "checkpoints").exists():
                raise UserError(
                    f"{first} is a folder without a model: it has no config.json; name the FASTA "
                    "files in it, or give a folder that performers train wrote and then FASTA files"
                )
            if not rest:
                raise UserError("give at least one FASTA file after the model")
            return first, rest
        if not first.exists() and str(first) != "-":
            raise UserError(
                f"{first}: no such file or folder; give a model's folder and FASTA files, or FASTA "
                f"files alone to read them with {PRETRAINED}"
            )
        return pretrained_folder(READS_RELATIVES if relatives else PRETRAINED), self.paths


@dataclass(frozen=True, kw_only=True)
class ManyProteins(ModelAndFasta):
    """A model, and FASTA files that are read in parts."""

    skip_invalid: bool = option(
        "Leave out records that cannot be read as protein, and count them.", False
    )


def protein_records(paths: list[Path]) -> list[ProteinRecord]:
    """Read the proteins of FASTA files, at least one."""
    from performers.proteins.inputs.fasta import read_fasta

    records, letters = read_fasta(paths)
    note(letters.summary())
    if not records:
        raise UserError("the FASTA files hold no sequence")
    return records


@dataclass(frozen=True, kw_only=True)
class RelativesOptions(Options):
    """Relatives to read proteins with."""

    relatives: Path | None = option(
        "FASTA file of relatives to read the proteins with: of all of them, or, where headers have "
        "family=NAME, of those of the same family.",
        None,
        group="Relatives",
    )
    relatives_tokens: int | None = option(
        "Most tokens of a protein and its relatives; as trained by default.",
        None,
        at_least=6,
        needs={"relatives": ""},
    )

    def read(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, proteins: Iterable[ProteinRecord]
    ) -> Relatives | None:
        """Read the relatives, if any, check that every protein has some, and say how many.

        Raises:
            UserError: The file holds no sequence, headers do not fit, or a protein has no relative
                or leaves no place for one.
        """
        path = self.relatives
        if path is None:
            return None
        from performers.proteins.inputs.fasta import read_fasta
        from performers.proteins.inputs.relatives import Relatives
        from performers.proteins.model_folder import model_max_length, reads_families

        records, letters = read_fasta([path])
        if not records:
            raise UserError(f"--relatives {path} holds no sequence; give relatives of the proteins")
        tokens = self.relatives_tokens or model_max_length(tokenizer)
        relatives = Relatives(records, tokenizer, tokens)
        for protein in proteins:
            relatives.count(protein)
        note(letters.summary())
        if not reads_families(folder):
            note(
                f"{folder.name} was not trained on rows of relatives (performers train --families):"
                " do not expect it to read them"
            )
        note(relatives.summary())
        return relatives


class ProteinFiles:
    """Proteins of FASTA files that are read a second time, counted in ``letters`` the first time.

    Memory does not grow with the number of proteins but for their names.
    """

    def __init__(self, sources: list[tuple[Path, str]], *, skip_invalid: bool) -> None:
        from performers.proteins.inputs.records import LetterReport

        self._sources, self._skip_invalid = sources, skip_invalid
        self.letters = LetterReport()
        for _ in self.records(self.letters):
            pass

    def chunks(self, residues: int) -> Iterator[list[ProteinRecord]]:
        """Neighbouring proteins, of about so many residues together."""
        chunk: list[ProteinRecord] = []
        size = 0
        for record in self.records():
            chunk.append(record)
            size += len(record.sequence)
            if size >= residues:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def records(self, letters: LetterReport | None = None) -> Iterator[ProteinRecord]:
        """All proteins, one at a time, counted in ``letters``."""
        from performers.proteins.inputs.fasta import iter_fasta

        for path, name in self._sources:
            yield from iter_fasta(path, letters, skip_invalid=self._skip_invalid, name=name)


@contextmanager
def checked_proteins(paths: list[Path], *, skip_invalid: bool) -> Iterator[ProteinFiles]:
    """Context of the proteins of FASTA files, which are checked whole before any is used.

    Pipes and standard input are copied to temporary files.

    Raises:
        UserError: A file or a record is at fault, or no sequence is left.
    """
    from performers.proteins.inputs.streams import rereadable

    with rereadable(paths) as sources:
        files = ProteinFiles(sources, skip_invalid=skip_invalid)
        note(files.letters.summary())
        if not files.letters.records:
            note(files.letters.skips())
            raise UserError("the FASTA files hold no sequence")
        yield files
