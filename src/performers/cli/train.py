"""``performers train``: a language model from FASTA files, a corpus of proteins, or texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from performers.app.errors import UserError
from performers.app.files import prepare_output_folder
from performers.app.options import OptionError, Options, argument, option
from performers.cli.commands import is_given
from performers.cli.console import ProgressBars, note, print_metrics
from performers.cli.inputs import protein_records
from performers.training.options import TrainingOptions

if TYPE_CHECKING:
    from performers.proteins.corpus import TokenShards


@dataclass(frozen=True, kw_only=True)
class TrainingFiles(Options):
    """Files of a training run."""

    fasta: list[Path] = argument(
        "FASTA files, plain or compressed, - for standard input, or a folder of performers data; "
        "or .txt files and folders of them, for a causal model of text.",
    )
    output_folder: Path = option("Folder of the model.", flag="--output")
    initial_model: Path | None = option(
        "Model folder, or performers-protein-small, whose weights, features and architecture the "
        "run begins with.",
        None,
    )
    resume: bool = option("Continue the run in --output exactly.", False)
    validation: list[Path] | None = option(
        "FASTA file, or text, to validate on (repeatable).", None
    )
    tokenizer: Path | None = option(
        "A tokenizer.json or its folder, for subwords; bytes by default (texts).", None
    )


def architecture(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a run with an initial model takes from it, for those that were given."""
    resumed = Path(given["output_folder"]) if given.get("resume") else None
    if given.get("initial_model") is None and resumed is None:
        return {}
    from performers.proteins.training.initial import initial_options

    return initial_options(given.get("initial_model"), given, resumed=resumed)


def train(context: typer.Context, files: TrainingFiles, options: TrainingOptions) -> None:
    """Train a language model from FASTA files or a prepared corpus, or from texts."""
    from performers.proteins.corpus import Corpus, is_corpus
    from performers.proteins.inputs.families import header_families
    from performers.proteins.training.train import train_model, validation_sample

    from_corpus = any(is_corpus(path) for path in files.fasta)
    if is_given(context, "validation_fraction") and (files.validation or from_corpus):
        whose = "--validation" if files.validation else "the corpus, which has a validation split"
        raise OptionError(f"--validation-fraction holds out nothing beside {whose}; leave it out")
    from performers.streams.text import is_text

    if not from_corpus and any(map(is_text, files.fasta)):
        if files.initial_model is not None:
            raise UserError("--initial-model is for proteins; leave it out for texts")
        _train_on_texts(files, options)
        return
    for flag, given in (("--tokenizer", files.tokenizer), ("--carry-state", options.carry_state)):
        if given:
            raise UserError(f"{flag} is for texts (.txt files); leave it out for proteins")
    sequences: Sequence[str] | TokenShards
    families: Sequence[str] | None = None
    validation_families: Sequence[str] | None = None
    if from_corpus:
        if len(files.fasta) > 1:
            raise UserError("a corpus is trained on by itself; give the one folder")
        corpus = Corpus(files.fasta[0])
        sequences = corpus.split("train")
        options.check_memory(sequences.entry["tokens"])
        held_out = validation_sample(corpus.split("validation"), options.seed)
        if options.needs_families:
            families = corpus.families("train")
        if options.families:
            validation = corpus.split("validation")
            names = corpus.families("validation")
            family_of = {validation.sequence(place): name for place, name in enumerate(names)}
            validation_families = [family_of[sequence] for sequence in held_out]
    else:
        records = protein_records(files.fasta)
        sequences, held_out = [record.sequence for record in records], None
        if options.needs_families:
            families = header_families(records)
        options.check_memory(sum(len(sequence) for sequence in sequences))
    if files.validation:
        records = protein_records(files.validation)
        held_out = [record.sequence for record in records]
        if options.families:
            validation_families = header_families(records)
    prepare_output_folder(files.output_folder, resume=files.resume)
    with ProgressBars() as bars:
        result = train_model(
            sequences,
            files.output_folder,
            options,
            validation=held_out,
            families=families,
            validation_families=validation_families,
            initial_model=files.initial_model,
            resume=files.resume,
            progress=bars.task("training"),
            announce=note,
        )
    _show(files, result)


def _train_on_texts(files: TrainingFiles, options: TrainingOptions) -> None:
    from performers.streams.training import train_texts

    prepare_output_folder(files.output_folder, resume=files.resume)
    with ProgressBars() as bars:
        result = train_texts(
            files.fasta,
            files.output_folder,
            options,
            tokenizer=files.tokenizer,
            validation=files.validation,
            resume=files.resume,
            progress=bars.task("training"),
            announce=note,
        )
    _show(files, result)


def _show(files: TrainingFiles, result: dict[str, Any]) -> None:
    note(f"{result['steps']:,} steps in {result['seconds']:.0f} s, model in {files.output_folder}")
    if "eval_accuracy" in result:
        scores = {key.removeprefix("eval_"): value for key, value in result.items()}
        print_metrics({"validation": scores})
