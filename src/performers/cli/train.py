"""``performers train``: a protein language model from FASTA files or a corpus."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from performers.cli.console import ProgressBars, note, one_line_errors, print_metrics
from performers.cli.inputs import BatchTokens, Seed, protein_records
from performers.models.registry import ATTENTIONS
from performers.proteins.corpus import Corpus, TokenShards, is_corpus
from performers.proteins.errors import UserError
from performers.proteins.folders import prepare_output_folder
from performers.proteins.options import TrainingOptions
from performers.proteins.training import train_model, validation_sample

_DEFAULTS = TrainingOptions()


def train(
    fasta: Annotated[
        list[Path],
        typer.Argument(help="FASTA files, plain or gzipped, or a folder of performers data."),
    ],
    output_folder: Annotated[Path, typer.Option("--output", help="Folder of the model.")],
    objective: Annotated[
        str, typer.Option(help="mlm: masked residues; clm: next residue.")
    ] = _DEFAULTS.objective,
    attention: Annotated[
        str, typer.Option(help=f"One of {', '.join(ATTENTIONS)}.")
    ] = _DEFAULTS.attention,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = _DEFAULTS.steps,
    max_length: Annotated[
        int, typer.Option(help="Longest row in tokens; longer sequences are split.")
    ] = _DEFAULTS.max_length,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --output exactly.")
    ] = False,
    validation: Annotated[
        list[Path] | None, typer.Option(help="FASTA file to validate on (repeatable).")
    ] = None,
    hidden_size: Annotated[int, typer.Option(help="Width.")] = _DEFAULTS.hidden_size,
    layers: Annotated[int, typer.Option(help="Blocks.")] = _DEFAULTS.num_layers,
    heads: Annotated[int, typer.Option(help="Attention heads.")] = _DEFAULTS.num_heads,
    intermediate_size: Annotated[
        int | None, typer.Option(help="Feed-forward width; four times the width by default.")
    ] = None,
    num_features: Annotated[
        int | None, typer.Option(help="Random features per head; about d ln d by default.")
    ] = None,
    estimator: Annotated[
        str, typer.Option(help="Softmax estimator: positive, hyperbolic, trigonometric.")
    ] = _DEFAULTS.estimator,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens seen exactly to each side (favor-softmax, local)."),
    ] = _DEFAULTS.window,
    lsh_chunk_size: Annotated[
        int | None, typer.Option(help="Tokens seen to each side within a bucket (lsh).")
    ] = _DEFAULTS.lsh_chunk_size,
    lsh_rounds: Annotated[
        int | None, typer.Option(help="Hashes whose buckets are united (lsh).")
    ] = _DEFAULTS.lsh_rounds,
    positions: Annotated[
        str, typer.Option(help="rotary, sinusoidal or learned.")
    ] = _DEFAULTS.position_embedding,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = _DEFAULTS.dropout,
    packed: Annotated[
        bool, typer.Option("--packed", help="Fill rows of --max-length with several sequences.")
    ] = False,
    across_sequences: Annotated[
        bool,
        typer.Option("--across-sequences", help="In packed rows, attend across sequences."),
    ] = False,
    batch_tokens: BatchTokens = _DEFAULTS.batch_tokens,
    accumulation: Annotated[
        int, typer.Option(help="Batches per optimiser step.")
    ] = _DEFAULTS.accumulation,
    optimizer: Annotated[
        str, typer.Option(help="adamw, or muon for the matrices (torch 2.9 or later).")
    ] = _DEFAULTS.optimizer,
    learning_rate: Annotated[float, typer.Option(help="Peak.")] = _DEFAULTS.learning_rate,
    warmup_steps: Annotated[
        int | None, typer.Option(help="A twentieth of the steps by default.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = _DEFAULTS.weight_decay,
    max_grad_norm: Annotated[float, typer.Option(help="Clipping.")] = _DEFAULTS.max_grad_norm,
    mask_probability: Annotated[
        float, typer.Option(help="Share of residues to predict (mlm).")
    ] = _DEFAULTS.mask_probability,
    redraw_steps: Annotated[
        int, typer.Option(help="Steps between fresh random features; 0 = never.")
    ] = _DEFAULTS.redraw_steps,
    seed: Seed = _DEFAULTS.seed,
    bf16: Annotated[bool, typer.Option("--bf16", help="Mixed precision.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = False,
    reversible: Annotated[
        bool,
        typer.Option("--reversible", help="Activation memory that does not grow with --layers."),
    ] = False,
    feed_forward_chunk: Annotated[
        int, typer.Option(help="Tokens in feed-forward blocks at a time; 0 = all.")
    ] = _DEFAULTS.feed_forward_chunk,
    validation_fraction: Annotated[
        float | None,
        typer.Option(
            help="Held out of FASTA files without --validation, at most 500 sequences; "
            f"{_DEFAULTS.validation_fraction} by default."
        ),
    ] = None,
    log_steps: Annotated[int, typer.Option(help="Steps between log entries.")] = 10,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between validations; a tenth by default.")
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; a tenth by default.")
    ] = None,
) -> None:
    """Train a protein language model from FASTA files or a prepared corpus."""
    with one_line_errors():
        given_corpus = any(is_corpus(path) for path in fasta)
        if validation_fraction is None:
            validation_fraction = _DEFAULTS.validation_fraction
        elif validation or given_corpus:
            whose = "--validation" if validation else "the corpus, which has a validation split"
            raise UserError(f"--validation-fraction holds out nothing beside {whose}; leave it out")
        options = TrainingOptions(
            objective=objective,
            attention=attention,
            hidden_size=hidden_size,
            num_layers=layers,
            num_heads=heads,
            intermediate_size=intermediate_size,
            num_features=num_features,
            estimator=estimator,
            window=window,
            lsh_chunk_size=lsh_chunk_size,
            lsh_rounds=lsh_rounds,
            position_embedding=positions,
            dropout=dropout,
            max_length=max_length,
            packed=packed,
            across_sequences=across_sequences,
            batch_tokens=batch_tokens,
            accumulation=accumulation,
            steps=steps,
            optimizer=optimizer,
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            mask_probability=mask_probability,
            redraw_steps=redraw_steps,
            seed=seed,
            bf16=bf16,
            gradient_checkpointing=gradient_checkpointing,
            reversible=reversible,
            feed_forward_chunk=feed_forward_chunk,
            validation_fraction=validation_fraction,
            log_steps=log_steps,
            eval_steps=eval_steps,
            save_steps=save_steps,
        )
        sequences: Sequence[str] | TokenShards
        if given_corpus:
            if len(fasta) > 1:
                raise UserError("a corpus is trained on by itself; give the one folder")
            corpus = Corpus(fasta[0])
            sequences = corpus.split("train")
            options.check_memory(sequences.entry["tokens"])
            held_out = validation_sample(corpus.split("validation"), seed)
        else:
            sequences, held_out = [record.sequence for record in protein_records(fasta)], None
            options.check_memory(sum(len(sequence) for sequence in sequences))
        if validation:
            held_out = [record.sequence for record in protein_records(validation)]
        prepare_output_folder(output_folder, resume=resume)
        with ProgressBars() as bars:
            result = train_model(
                sequences,
                output_folder,
                options,
                validation=held_out,
                resume=resume,
                progress=bars.training("training"),
            )
        note(f"{result['steps']:,} steps in {result['seconds']:.0f} s, model in {output_folder}")
        if "eval_accuracy" in result:
            scores = {key.removeprefix("eval_"): value for key, value in result.items()}
            print_metrics({"validation": scores})
