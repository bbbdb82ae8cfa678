"""The commands. Each checks where it will write, reads, calls one function, prints."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from performers.cli import benchmark, data, study
from performers.cli.console import App, ProgressBars, note, one_line_errors, output, print_metrics
from performers.cli.convert import convert
from performers.cli.inputs import (
    BatchTokens,
    ModelAndFasta,
    Seed,
    model_and_fasta,
    model_folder,
    protein_records,
)
from performers.cli.probe import probe
from performers.cli.train import train
from performers.proteins import demo as demo_run
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

app = App(
    no_args_is_help=True,
    help="Attention in linear time, and protein language models with it.",
)
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(data.app, name="data")
app.add_typer(study.app, name="study")
app.command()(convert)
app.command()(probe)
app.command()(train)

Model = Annotated[Path, typer.Argument(help="A folder that performers train wrote.")]


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
    output_file: Annotated[
        Path,
        typer.Option(
            "--output",
            help="A .npz file (names: UTF-8 text, a name a line, as bytes; lengths; embeddings) or "
            "a .parquet file (name, length, embedding).",
        ),
    ],
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
        network, tokenizer = load_model(model_folder(model))
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
        others = [(path, *load_model(path)) for path in map(model_folder, compare or [])]
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
