"""``performers benchmark``: time, memory and accuracy of attention, training steps, decoding."""

from functools import partial
from typing import Annotated

import typer

from performers.benchmark.attention import AttentionSettings, attention_results, run_attention
from performers.benchmark.decode import DecodeSettings, decode_results, run_decode
from performers.benchmark.model import ModelSettings, model_results, run_model
from performers.benchmark.steps import MODEL_ATTENTIONS, OBJECTIVES, SIZES
from performers.benchmark.workload import DTYPES, FEATURES
from performers.cli.benchmark_accuracy import accuracy
from performers.cli.benchmark_options import (
    MinTime,
    Output,
    Repeats,
    Resume,
    Seed,
    Threads,
    listed,
)
from performers.cli.benchmark_run import integers, measure_and_write, names, settings_of
from performers.cli.console import App, note, one_line_errors
from performers.proteins.folders import prepare_output_folder

app = App(
    no_args_is_help=True,
    help="Time and memory of attention, of training steps and of decoding, on this machine; "
    "accuracy of attention through random features.",
)
app.command()(accuracy)

_ATTENTION, _MODEL, _DECODE = AttentionSettings(), ModelSettings(), DecodeSettings()


_LENGTHS, _MODEL_LENGTHS = listed(_ATTENTION.lengths), listed(_MODEL.lengths)
_DIRECTIONS, _PASSES = listed(_ATTENTION.directions), listed(_ATTENTION.passes)
_ATTENTIONS, _CONTEXTS = listed(_MODEL.attentions), listed(_DECODE.contexts)

Lengths = Annotated[str, typer.Option(help="Tokens, rising, with commas between.")]
Heads = Annotated[int, typer.Option(help="Attention heads.")]
HeadDim = Annotated[int, typer.Option(help="Length of a query, key or value vector.")]
NumFeatures = Annotated[int, typer.Option(help="Random features per head.")]
Batch = Annotated[int, typer.Option(help="Sequences in a call.")]
Features = Annotated[str, typer.Option(help=f"Of linear attention: {' or '.join(FEATURES)}.")]
Dtype = Annotated[str, typer.Option(help=f"Of the inputs: {', '.join(DTYPES)}.")]
MaxSeconds = Annotated[
    float, typer.Option(help="Calls predicted to take longer are skipped, and shown as skipped.")
]
MaxExact = Annotated[
    int, typer.Option(help="Longest length for quadratic attention; beyond, shown as skipped.")
]
Memory = Annotated[
    bool, typer.Option(help="Measure peak memory, each contestant in a process of its own.")
]
MemoryMax = Annotated[int, typer.Option(help="Longest length at which memory is measured.")]


@app.command()
def attention(
    output_folder: Output,
    lengths: Lengths = _LENGTHS,
    contestants: Annotated[
        str,
        typer.Option(
            help="Names with commas between: performers native, performers torch, SDPA, identity, "
            "performer-pytorch, fast-transformers, fla; all of them by default."
        ),
    ] = "",
    directions: Annotated[str, typer.Option(help="bidirectional, causal or both.")] = listed(
        _ATTENTION.directions
    ),
    passes: Annotated[str, typer.Option(help="forward, forward+backward or both.")] = listed(
        _ATTENTION.passes
    ),
    heads: Heads = _ATTENTION.heads,
    head_dim: HeadDim = _ATTENTION.head_dim,
    num_features: NumFeatures = _ATTENTION.num_features,
    batch: Batch = _ATTENTION.batch,
    features: Features = _ATTENTION.features,
    dtype: Dtype = _ATTENTION.dtype,
    max_exact_length: MaxExact = _ATTENTION.max_exact_length,
    between_matmuls: Annotated[
        bool,
        typer.Option(
            "--between-matmuls",
            help="Time calls between matrix products of a model's size; subtract these.",
        ),
    ] = False,
    memory: Memory = True,
    memory_max_length: MemoryMax = _ATTENTION.memory_max_length,
    threads: Threads = None,
    repeats: Repeats = _ATTENTION.repeats,
    min_time: MinTime = _ATTENTION.min_time,
    max_seconds: MaxSeconds = _ATTENTION.max_seconds,
    seed: Seed = _ATTENTION.seed,
    resume: Resume = False,
) -> None:
    """Attention: ours, torch's exact attention, and other libraries that are installed."""
    with one_line_errors("benchmark", "--lengths or --batch"):
        settings = settings_of(
            lambda: AttentionSettings(
                lengths=integers("--lengths", lengths),
                contestants=names(contestants),
                directions=names(directions),
                passes=names(passes),
                heads=heads,
                head_dim=head_dim,
                num_features=num_features,
                batch=batch,
                features=features,
                dtype=dtype,
                max_exact_length=max_exact_length,
                between_matmuls=between_matmuls,
                memory=memory,
                memory_max_length=memory_max_length,
                threads=threads,
                repeats=repeats,
                min_time=min_time,
                max_seconds=max_seconds,
                seed=seed,
            )
        )
        prepare_output_folder(output_folder, resume=resume)
        results = attention_results(settings)
        for name, reason in results.notes["not_measured"].items():
            note(f"{name}: {reason}")
        measure_and_write(results, output_folder, resume, partial(run_attention, settings, results))


@app.command()
def model(
    output_folder: Output,
    size: Annotated[
        str, typer.Option(help=f"Of the paper's timing models: {' or '.join(SIZES)}.")
    ] = _MODEL.size,
    objective: Annotated[
        str, typer.Option(help=f"{OBJECTIVES[0]}: causal; {OBJECTIVES[1]}: masked tokens.")
    ] = _MODEL.objective,
    lengths: Lengths = _MODEL_LENGTHS,
    attentions: Annotated[
        str, typer.Option(help=f"Of {', '.join(MODEL_ATTENTIONS)}, with commas between.")
    ] = _ATTENTIONS,
    batch: Batch = _MODEL.batch,
    num_features: Annotated[
        int | None, typer.Option(help="Random features per head; 256 by default.")
    ] = _MODEL.num_features,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = _MODEL.dropout,
    max_exact_length: MaxExact = _MODEL.max_exact_length,
    memory: Memory = True,
    memory_max_length: MemoryMax = _MODEL.memory_max_length,
    threads: Threads = None,
    repeats: Repeats = _MODEL.repeats,
    min_time: MinTime = _MODEL.min_time,
    max_seconds: MaxSeconds = _MODEL.max_seconds,
    seed: Seed = _MODEL.seed,
    resume: Resume = False,
) -> None:
    """Training steps: forward, loss, backward and Adam, against attention that does nothing."""
    with one_line_errors("benchmark", "--lengths or --batch"):
        settings = settings_of(
            lambda: ModelSettings(
                size=size,
                objective=objective,
                lengths=integers("--lengths", lengths),
                attentions=names(attentions),
                batch=batch,
                num_features=num_features,
                dropout=dropout,
                max_exact_length=max_exact_length,
                memory=memory,
                memory_max_length=memory_max_length,
                threads=threads,
                repeats=repeats,
                min_time=min_time,
                max_seconds=max_seconds,
                seed=seed,
            )
        )
        prepare_output_folder(output_folder, resume=resume)
        results = model_results(settings)
        measure_and_write(results, output_folder, resume, partial(run_model, settings, results))


@app.command()
def decode(
    output_folder: Output,
    contexts: Annotated[
        str, typer.Option(help="Tokens read before, rising, with commas between.")
    ] = _CONTEXTS,
    tokens: Annotated[int, typer.Option(help="Tokens stepped through in a call.")] = _DECODE.tokens,
    through_model: Annotated[
        bool, typer.Option("--through-model", help="Also decode with the paper's regular model.")
    ] = False,
    heads: Heads = _DECODE.heads,
    head_dim: HeadDim = _DECODE.head_dim,
    num_features: NumFeatures = _DECODE.num_features,
    batch: Batch = _DECODE.batch,
    features: Features = _DECODE.features,
    dtype: Dtype = _DECODE.dtype,
    threads: Threads = None,
    repeats: Repeats = _DECODE.repeats,
    min_time: MinTime = _DECODE.min_time,
    seed: Seed = _DECODE.seed,
    resume: Resume = False,
) -> None:
    """Decoding: time per token and bytes of state, against a cache of keys and values."""
    with one_line_errors("benchmark", "--contexts or --batch"):
        settings = settings_of(
            lambda: DecodeSettings(
                contexts=integers("--contexts", contexts),
                tokens=tokens,
                through_model=through_model,
                heads=heads,
                head_dim=head_dim,
                num_features=num_features,
                batch=batch,
                features=features,
                dtype=dtype,
                threads=threads,
                repeats=repeats,
                min_time=min_time,
                seed=seed,
            )
        )
        prepare_output_folder(output_folder, resume=resume)
        results = decode_results(settings)
        measure_and_write(results, output_folder, resume, partial(run_decode, settings, results))
