"""The commands. Each checks where it will write, reads, calls one function, prints."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from performers.cli import benchmark, data, study
from performers.cli.console import ProgressBars, note, one_line_errors, output, print_metrics
from performers.cli.convert import convert
from performers.cli.inputs import ModelAndFasta, model_and_fasta, protein_records
from performers.cli.probe import probe
from performers.models.configuration import ATTENTIONS
from performers.proteins import demo as demo_run
from performers.proteins.corpus import Corpus, TokenShards, is_corpus
from performers.proteins.embedding import (
    POOLINGS,
    check_pooling,
    embed_sequences,
    write_embeddings,
)
from performers.proteins.errors import UserError
from performers.proteins.evaluation import evaluate_model
from performers.proteins.fasta import write_fasta
from performers.proteins.folders import prepare_output_file, prepare_output_folder
from performers.proteins.generation import generate_sequences
from performers.proteins.model_folder import load_model, model_max_length
from performers.proteins.model_report import report_on_model
from performers.proteins.options import TrainingOptions
from performers.proteins.training import train_model, validation_sample

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Attention in linear time, and protein language models with it.",
)
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(data.app, name="data")
app.add_typer(study.app, name="study")
app.command()(convert)
app.command()(probe)

Model = Annotated[Path, typer.Argument(help="A folder that performers train wrote.")]
BatchTokens = Annotated[int, typer.Option(min=1, help="Tokens in a batch, padding included.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")]

_DEFAULTS = TrainingOptions()


@app.command()
def demo(
    output_folder: Annotated[Path, typer.Option("--output", help="A new folder.")],
    steps: Annotated[
        int, typer.Option(min=1, help="Training steps of each model.")
    ] = demo_run.STEPS,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted demo.")] = False,
) -> None:
    """Train three small models on real proteins, compare them, and show what they learnt."""
    with one_line_errors():
        prepare_output_folder(output_folder, resume=resume)
        with ProgressBars() as bars:
            metrics = demo_run.run_demo(
                output_folder, steps=steps, seed=seed, resume=resume, report=bars.update
            )
        print_metrics(
            {
                f"{name}, {split}": model[split]
                for split in demo_run.EVALUATED
                for name, model in metrics.items()
            }
        )
        output.print(f"report: {output_folder / 'report.html'}", soft_wrap=True)


@app.command()
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
            held_out = validation_sample(corpus.split("validation"), seed)
        else:
            sequences, held_out = [record.sequence for record in protein_records(fasta)], None
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


@app.command()
def evaluate(
    paths: ModelAndFasta,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    max_length: Annotated[
        int | None, typer.Option(min=3, help="Longest window in tokens; as trained by default.")
    ] = None,
    batch_tokens: BatchTokens = 8192,
    mask_probability: Annotated[
        float, typer.Option(help="Share of residues to predict (mlm).")
    ] = 0.15,
    seed: Seed = 0,
) -> None:
    """Accuracy, perplexity and loss per residue, beside the unigram baseline."""
    with one_line_errors():
        if not 0 < mask_probability <= 1:
            raise UserError(
                f"--mask-probability must be above 0 and at most 1, got {mask_probability}"
            )
        model, fasta = model_and_fasta(paths)
        network, tokenizer = load_model(model)
        sequences = [record.sequence for record in protein_records(fasta)]
        with ProgressBars() as bars:
            metrics = evaluate_model(
                network,
                tokenizer,
                sequences,
                max_length=max_length or model_max_length(tokenizer),
                batch_tokens=batch_tokens,
                mask_probability=mask_probability,
                seed=seed,
                progress=bars.task("evaluating"),
            )
        if not math.isfinite(metrics["loss"]):
            raise UserError(
                f"{model} predicts no finite probabilities (loss {metrics['loss']}); its training "
                "diverged, or its files are damaged: train anew or copy it again"
            )
        if as_json:
            print(json.dumps(metrics, indent=2))
        else:
            print_metrics({model.name: metrics})


@app.command()
def embed(
    paths: ModelAndFasta,
    output_file: Annotated[Path, typer.Option("--output", help="A .npz or .parquet file.")],
    pooling: Annotated[
        str,
        typer.Option(
            help="mean: of the hidden states over the residues; mean-sd: their standard deviation "
            "besides, twice as wide, which tells a little more of function."
        ),
    ] = POOLINGS[0],
    batch_tokens: BatchTokens = 8192,
) -> None:
    """One vector a sequence: the final hidden states, pooled over its residues."""
    with one_line_errors():
        check_pooling(pooling)
        prepare_output_file(output_file, (".npz", ".parquet"))
        model, fasta = model_and_fasta(paths)
        network, tokenizer = load_model(model)
        records = protein_records(fasta)
        with ProgressBars() as bars:
            vectors = embed_sequences(
                network,
                tokenizer,
                [record.sequence for record in records],
                pooling=pooling,
                batch_tokens=batch_tokens,
                progress=bars.task("embedding"),
            )
        write_embeddings(output_file, records, vectors)
        note(f"{len(records):,} vectors of width {vectors.shape[1]} in {output_file}")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="First residues of every sequence.")] = "",
    num: Annotated[int, typer.Option(help="Sequences.")] = 1,
    max_length: Annotated[int, typer.Option(help="Most residues in a sequence.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 = the most likely residue.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Only the likeliest so many; 0 = all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest with this share.")] = 1.0,
    seed: Seed = 0,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="FASTA file; standard output by default.")
    ] = None,
) -> None:
    """Sample new sequences from a causal model, as FASTA."""
    with one_line_errors():
        if output_file is not None:
            prepare_output_file(output_file, (".fasta", ".fa", ".faa", ".gz"))
        network, tokenizer = load_model(model)
        with ProgressBars() as bars:
            records = generate_sequences(
                network,
                tokenizer,
                prompt=prompt,
                num_sequences=num,
                max_length=max_length,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                progress=bars.task("generating"),
            )
        write_fasta(
            typer.get_text_stream("stdout") if output_file is None else output_file, records
        )


@app.command()
def report(
    paths: ModelAndFasta,
    output_folder: Annotated[Path, typer.Option("--output", help="A new folder.")],
    compare: Annotated[
        list[Path] | None, typer.Option(help="Another model to show beside it (repeatable).")
    ] = None,
    protein: Annotated[
        str | None, typer.Option(help="Name of the protein whose attention is drawn.")
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            help="Known sites of that protein to mark, such as 57,102,195; by default those of "
            "sites= in its header."
        ),
    ] = None,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="Sequences read for amino-acid similarity.")
    ] = 200,
    max_length: Annotated[
        int, typer.Option(min=3, help="Tokens read of each; attention maps are quadratic.")
    ] = 256,
) -> None:
    """Attention maps, known sites and amino-acid similarity as one HTML page."""
    with one_line_errors():
        model, fasta = model_and_fasta(paths)
        network, tokenizer = load_model(model)
        others = [(path, *load_model(path)) for path in compare or []]
        records = protein_records(fasta)
        prepare_output_folder(output_folder)
        with ProgressBars() as bars:
            page = report_on_model(
                model,
                network,
                tokenizer,
                records,
                output_folder,
                compare=others,
                protein=protein,
                sites=sites,
                max_sequences=max_sequences,
                max_length=max_length,
                report=bars.update,
            )
        output.print(f"report: {page}", soft_wrap=True)
