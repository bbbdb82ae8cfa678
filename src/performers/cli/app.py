"""The commands. Each checks where it will write, reads, calls one function, prints."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

import performers
from performers.app.errors import UserError
from performers.app.files import prepare_output_file, prepare_output_folder
from performers.app.options import Options, argument, option
from performers.app.provenance import KEY, provenance
from performers.cli import benchmark, data
from performers.cli.commands import App
from performers.cli.console import ProgressBars, note, output, print_metrics
from performers.cli.convert import convert
from performers.cli.embed import embed
from performers.cli.inputs import (
    BATCH_TOKENS,
    NEW_FOLDER,
    SEED,
    ModelAndFasta,
    RelativesOptions,
    protein_records,
)
from performers.cli.probe import probe
from performers.cli.score import score
from performers.cli.train import architecture, train
from performers.proteins.embedded import model_folder
from performers.proteins.options import DEMO_STEPS, SamplingOptions

app = App(
    no_args_is_help=True,
    help="Attention in linear time, and protein language models with it.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"performers {performers.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
) -> None:
    """Options of ``performers`` without a command."""


app.command(
    example="performers train proteins.fasta.gz --output model --steps 10000",
    defaults=architecture,
)(train)
app.command(example="performers embed proteins.fasta --output vectors.h5 --per-residue")(embed)
app.command(example="performers score proteins.fasta --substitutions substitutions.tsv")(score)


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Options):
    """Options of ``performers evaluate``."""

    as_json: bool = option("Print JSON.", False, flag="--json")
    max_length: int | None = option(
        "Longest window in tokens; as trained by default.", None, at_least=3
    )
    batch_tokens: int = option(**BATCH_TOKENS)
    mask_probability: float = option(
        "Share of residues to predict (mlm).", 0.15, above=0, at_most=1
    )
    carry_state: bool = option("Hand the state from segment to segment (texts).", False)
    seed: int = option(**SEED)


@app.command(example="performers evaluate model held-out.fasta --json")
def evaluate(inputs: ModelAndFasta, options: EvaluationOptions, family: RelativesOptions) -> None:
    """Accuracy, perplexity and loss per residue, beside the unigram baseline; bits per byte."""
    from performers.proteins.model_folder import load_model, model_max_length
    from performers.proteins.scoring.evaluation import evaluate_model
    from performers.streams.text import is_text

    if family.relatives is not None and options.max_length is not None:
        raise UserError(
            "--max-length is of windows of proteins without relatives; with --relatives use "
            "--relatives-tokens"
        )
    if any(map(is_text, inputs.paths[1:])):
        if family.relatives is not None:
            raise UserError("--relatives is for proteins; leave it out for texts (.txt files)")
        _evaluate_texts(inputs.paths, options)
        return
    if options.carry_state:
        raise UserError("--carry-state is for texts (.txt files); leave it out for proteins")

    model, fasta = inputs.split(relatives=family.relatives is not None)
    network, tokenizer = load_model(model)
    records = protein_records(fasta)
    relatives = family.read(model, tokenizer, records)
    with ProgressBars() as bars:
        metrics = evaluate_model(
            network,
            tokenizer,
            [record.sequence for record in records],
            relatives=None if relatives is None else relatives.rows(records),
            max_length=options.max_length or model_max_length(tokenizer),
            batch_tokens=options.batch_tokens,
            mask_probability=options.mask_probability,
            seed=options.seed,
            progress=bars.task("evaluating"),
        )
    _show_metrics(model, metrics, options)


def _evaluate_texts(paths: list[Path], options: EvaluationOptions) -> None:
    from performers.streams.evaluation import evaluate_folder

    model, *texts = paths
    with ProgressBars() as bars:
        metrics = evaluate_folder(
            model,
            texts,
            length=options.max_length,
            batch_tokens=options.batch_tokens,
            carry=options.carry_state,
            report=note,
            progress=bars.task("evaluating"),
        )
    places = metrics["places"] if options.as_json else metrics.pop("places")
    _show_metrics(model, metrics, options)
    if not options.as_json:
        for place in places:
            bits = f"{place['bits_per_byte']:.3f} bits per byte"
            output.print(f"places {place['start']:,} to {place['stop']:,}: {bits}")


def _show_metrics(model: Path, metrics: dict[str, Any], options: EvaluationOptions) -> None:
    if not math.isfinite(metrics["loss"]):
        raise UserError(
            f"{model} predicts no finite probabilities (loss {metrics['loss']}); its training "
            "diverged, or its files are damaged: train anew or copy it again"
        )
    if options.as_json:
        made = provenance("evaluation", seed=options.seed, model=model)
        print(json.dumps({**metrics, KEY: made}, indent=2))
    else:
        print_metrics({model.name: metrics})


@dataclass(frozen=True, kw_only=True)
class GenerationFiles(Options):
    """Files of ``performers generate``."""

    model: Path = argument("A folder that performers train wrote.")
    output_file: Path | None = option(
        "FASTA file; standard output by default.", None, flag="--output"
    )


@app.command(example="performers generate model --prompt MKT --num 5 --output new.fasta")
def generate(files: GenerationFiles, options: SamplingOptions) -> None:
    """Sample new sequences from a causal model, as FASTA."""
    from performers.proteins.inputs.fasta import write_fasta
    from performers.proteins.model_folder import load_model
    from performers.proteins.scoring.generation import generate_sequences

    if files.output_file is not None:
        prepare_output_file(files.output_file, (".fasta", ".fa", ".faa", ".gz"))
    network, tokenizer = load_model(model_folder(files.model))
    with ProgressBars() as bars:
        records = generate_sequences(network, tokenizer, options, progress=bars.task("generating"))
    write_fasta(files.output_file or typer.get_text_stream("stdout"), records)


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Options):
    """Options of ``performers report``."""

    output_folder: Path = option(**NEW_FOLDER)
    compare: list[Path] | None = option("Another model to show beside it (repeatable).", None)
    protein: str | None = option("Name or accession of the protein whose attention is drawn.", None)
    sites: str | None = option(
        "Known sites of that protein to mark, such as 57,102,195; by default those of sites= in "
        "its header.",
        None,
    )
    labels: Path | None = option(
        "Table of labels to colour the map by, as for probe: name, tab, labels; by default those "
        "in the headers, such as OS=Homo sapiens.",
        None,
    )
    max_sequences: int = option(
        "Proteins on the page, and sequences read for amino-acid similarity.", 200, at_least=1
    )
    max_length: int = option(
        "Tokens read of each for attention, whose maps are quadratic.", 256, at_least=3
    )
    max_residues: int = option(
        "Residues whose guesses the page holds, 8 bytes each.", 50_000, at_least=1
    )


@dataclass(frozen=True, kw_only=True)
class DrawnRelatives(RelativesOptions):
    """Relatives of the protein whose attention is drawn."""

    relatives: Path | None = option(
        "FASTA file of relatives, to draw which of them the residues of --protein are read from; "
        "where headers have family=NAME, those of its family.",
        None,
        group="Relatives",
    )


@app.command(example="performers report proteins.fasta --output report")
def report(inputs: ModelAndFasta, options: ReportOptions, family: DrawnRelatives) -> None:
    """One HTML page: a map of the proteins, each residue's probability, attention, similarity."""
    from performers.proteins.model import load
    from performers.proteins.probe.labels import read_labels
    from performers.proteins.report.model_report import choose_protein, report_on_model

    model, fasta = inputs.split(relatives=family.relatives is not None)
    models = [load(folder) for folder in (model, *(options.compare or []))]
    records = protein_records(fasta)
    labels = None if options.labels is None else read_labels(options.labels).labels
    relatives = None
    if family.relatives is not None:
        drawn = choose_protein(records, options.protein, options.max_length)
        relatives = family.read(model, models[0].tokenizer, [drawn])
    prepare_output_folder(options.output_folder)
    started = time.monotonic()
    with ProgressBars() as bars:
        page = report_on_model(
            models,
            records,
            options.output_folder,
            protein=options.protein,
            sites=options.sites,
            labels=labels,
            relatives=relatives,
            max_sequences=options.max_sequences,
            max_length=options.max_length,
            max_residues=options.max_residues,
            report=bars.update,
        )
    size, seconds = page.stat().st_size / 1e6, time.monotonic() - started
    note(f"a page of {size:.1f} MB, made in {seconds:.0f} s")
    output.print(f"report: {page}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Options of ``performers demo``."""

    output_folder: Path = option(**NEW_FOLDER)
    steps: int = option("Training steps of each model.", DEMO_STEPS, at_least=1)
    seed: int = option(**SEED)
    resume: bool = option("Continue an interrupted demo.", False)


@app.command(example="performers demo --output performers-demo")
def demo(options: DemoOptions) -> None:
    """Train three small models on real proteins, compare them, and show what they learnt."""
    from performers.proteins.demo import EVALUATED, run_demo

    folder = prepare_output_folder(options.output_folder, resume=options.resume)
    with ProgressBars() as bars:
        metrics = run_demo(
            folder,
            steps=options.steps,
            seed=options.seed,
            resume=options.resume,
            report=bars.update,
        )
    print_metrics(
        {f"{name}, {split}": model[split] for split in EVALUATED for name, model in metrics.items()}
    )
    output.print(f"report: {folder / 'report.html'}", soft_wrap=True)


app.command(
    extra="probe",
    lower="--batch-tokens, --max-length or --max-sequences",
    example="performers probe proteins.fasta --labels labels.tsv --groups clusters.tsv --output "
    "probe",
)(probe)
app.command(
    extra="convert",
    lower="--length or --batch-size",
    example="performers convert bert-folder --data texts.txt --output converted",
)(convert)
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(data.app, name="data")
