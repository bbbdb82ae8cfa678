"""``performers benchmark accuracy``: how far attention through features is from exact attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from performers.benchmark.accuracy_figure import kernel_figure
from performers.benchmark.accuracy_kernel import KernelSettings, kernel_results, run_kernel
from performers.benchmark.accuracy_settings import PretrainedSettings
from performers.benchmark.workload import subset_of
from performers.cli.benchmark_accuracy_tables import heads_tables, kernel_tables, model_tables
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
from performers.cli.console import note, one_line_errors
from performers.features import ESTIMATORS, PROJECTIONS
from performers.proteins.errors import UserError
from performers.proteins.folders import prepare_output_folder

if TYPE_CHECKING:
    from performers.benchmark.accuracy_passages import Pretrained

KERNEL, HEADS, MODEL = "kernel", "heads", "model"
PARTS = (KERNEL, HEADS, MODEL)
_KERNEL, _HEADS = KernelSettings(), PretrainedSettings(model="", text="")
_Result = TypeVar("_Result")


def accuracy(
    output_folder: Output,
    part: Annotated[
        str,
        typer.Option(
            help="kernel: estimates on random data, the paper's Figure 4; heads: outputs of the "
            "heads of --model; model: what becomes of it in the whole model. With commas between; "
            "by default kernel, and the others with --model."
        ),
    ] = "",
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a pretrained transformers model, or a .gguf file."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text or FASTA file to measure the model on.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Another to calibrate on; by default the beginning of --text."),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a passage.")] = _HEADS.length,
    passages: Annotated[int, typer.Option(help="Passages to measure on.")] = _HEADS.passages,
    calibration_passages: Annotated[
        int, typer.Option(help="Passages to calibrate on.")
    ] = _HEADS.calibration_passages,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers whose heads are measured, with commas between; by default all of a small "
            "model, else every fifth and the last."
        ),
    ] = "",
    num_features: Annotated[
        int, typer.Option(help="Random features per head where estimators are compared.")
    ] = _HEADS.num_features,
    feature_counts: Annotated[
        str, typer.Option(help="Numbers of features of the main settings, rising.")
    ] = listed(_HEADS.feature_counts),
    window: Annotated[
        int, typer.Option(help="Pairs this close are exact in settings with a window.")
    ] = _HEADS.window,
    sinks: Annotated[
        int, typer.Option(help="First keys that are exact besides, in a causal model.")
    ] = _HEADS.sinks,
    keys: Annotated[
        int, typer.Option(help="Keys listed by content that are exact, per query.")
    ] = _HEADS.keys,
    backend: Annotated[
        str | None, typer.Option(help="Of performers.backends(); chosen by default.")
    ] = None,
    kernel_length: Annotated[
        int, typer.Option(help="Queries and keys of the isotropic random data.")
    ] = _KERNEL.kernel_length,
    head_dim: Annotated[int, typer.Option(help="Length of its vectors.")] = _KERNEL.head_dim,
    norms: Annotated[
        str, typer.Option(help="Mean squared norms of its queries and keys, rising.")
    ] = listed(_KERNEL.norms),
    anisotropic_length: Annotated[
        int, typer.Option(help="Queries and keys of the anisotropic random data.")
    ] = _KERNEL.anisotropic_length,
    anisotropic_dim: Annotated[
        int, typer.Option(help="Length of its vectors.")
    ] = _KERNEL.anisotropic_dim,
    anisotropic_norms: Annotated[
        str, typer.Option(help="Mean squared norms of its queries and keys, rising.")
    ] = listed(_KERNEL.anisotropic_norms),
    kernel_feature_counts: Annotated[
        str, typer.Option(help="Numbers of random features on random data, even and rising.")
    ] = listed(_KERNEL.kernel_feature_counts),
    estimators: Annotated[
        str, typer.Option(help=f"On random data, of {', '.join(ESTIMATORS)}; all by default.")
    ] = "",
    projections: Annotated[
        str, typer.Option(help=f"On random data, of {', '.join(PROJECTIONS)}; all by default.")
    ] = "",
    draws: Annotated[int, typer.Option(help="Of random data and projection.")] = _KERNEL.draws,
    threads: Threads = None,
    repeats: Repeats = _HEADS.repeats,
    min_time: MinTime = _HEADS.min_time,
    seed: Seed = _HEADS.seed,
    resume: Resume = False,
) -> None:
    """Accuracy: random features against exact attention, on random data and pretrained models."""
    with one_line_errors("benchmark", "--length, --kernel-length or --passages"):
        parts = _parts(part, model, text)
        kernel_settings = settings_of(
            lambda: KernelSettings(
                kernel_length=kernel_length,
                head_dim=head_dim,
                anisotropic_length=anisotropic_length,
                anisotropic_dim=anisotropic_dim,
                norms=integers("--norms", norms),
                anisotropic_norms=integers("--anisotropic-norms", anisotropic_norms),
                kernel_feature_counts=integers("--kernel-feature-counts", kernel_feature_counts),
                estimators=names(estimators) or ESTIMATORS,
                projections=names(projections) or PROJECTIONS,
                draws=draws,
                threads=threads,
                seed=seed,
            )
        )
        pretrained = None
        if model is not None and text is not None:
            settings = settings_of(
                lambda: PretrainedSettings(
                    model=str(model),
                    text=str(text),
                    calibration=None if calibration is None else str(calibration),
                    length=length,
                    passages=passages,
                    calibration_passages=calibration_passages,
                    layers=integers("--layers", layers) if layers else (),
                    num_features=num_features,
                    feature_counts=integers("--feature-counts", feature_counts),
                    window=window,
                    sinks=sinks,
                    keys=keys,
                    backend=backend,
                    threads=threads,
                    repeats=repeats,
                    min_time=min_time,
                    seed=seed,
                )
            )
            pretrained = _read(settings)
        prepare_output_folder(output_folder, resume=resume)
        runs: dict[str, Callable[[Path], None]] = {
            KERNEL: partial(_kernel, kernel_settings, resume)
        }
        if pretrained is not None:
            runs[HEADS] = partial(_heads, pretrained, resume)
            runs[MODEL] = partial(_model, pretrained, resume)
        _run_all([(name, runs[name]) for name in PARTS if name in parts], output_folder)


def _run_all(runs: list[tuple[str, Callable[[Path], None]]], folder: Path) -> None:
    """Run the parts, each in a folder of its own; one that failed does not stop the others.

    Raises:
        typer.Exit: Something of ours failed in one of them.
    """
    failed: typer.Exit | None = None
    for name, run in runs:
        path = folder / name
        path.mkdir(exist_ok=True)
        try:
            run(path)
        except typer.Exit as exit_:
            failed = exit_
    if failed is not None:
        raise failed


def _parts(part: str, model: Path | None, text: Path | None) -> tuple[str, ...]:
    """The parts to run."""
    if (model is None) != (text is None):
        missing, there = ("--text", "--model") if text is None else ("--model", "--text")
        raise UserError(f"{missing} is missing: {there} was given, and the two go together")
    parts = names(part) or (PARTS if model is not None else (KERNEL,))
    settings_of(lambda: subset_of("part", parts, PARTS))
    if model is None and set(parts) != {KERNEL}:
        raise UserError(f"--part {part} needs --model and --text")
    if model is not None and set(parts) == {KERNEL}:
        raise UserError("--model and --text are not used with --part kernel: leave them out")
    return parts


def _read(settings: PretrainedSettings) -> Pretrained:
    # Imports transformers, which the random data can do without.
    from performers.benchmark.accuracy_passages import read_pretrained

    pretrained = _told(lambda: read_pretrained(settings))
    if not pretrained.loaded.has_head:
        note(f"{settings.model} has no language-modelling head: hidden states only, no perplexity")
    return pretrained


def _told(call: Callable[[], _Result]) -> _Result:
    """Call, and tell in one line what is wrong with a model or a text.

    Raises:
        UserError: It cannot be used.
    """
    try:
        return call()
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


def _kernel(settings: KernelSettings, resume: bool, folder: Path) -> None:
    results = kernel_results(settings)
    measure_and_write(
        results,
        folder,
        resume,
        partial(run_kernel, settings, results),
        figure=kernel_figure,
        tables=kernel_tables,
    )


def _heads(pretrained: Pretrained, resume: bool, folder: Path) -> None:
    from performers.benchmark.accuracy_heads import heads_results, run_heads
    from performers.benchmark.accuracy_heads_figure import heads_figure

    results = heads_results(pretrained)

    def measure(progress: Callable[[int, int], None]) -> None:
        _told(lambda: run_heads(pretrained, results, progress=progress))

    measure_and_write(results, folder, resume, measure, figure=heads_figure, tables=heads_tables)


def _model(pretrained: Pretrained, resume: bool, folder: Path) -> None:
    from performers.benchmark.accuracy_heads_figure import propagation_figure
    from performers.benchmark.accuracy_model import propagation_results, run_propagation

    results = propagation_results(pretrained)

    def measure(progress: Callable[[int, int], None]) -> None:
        _told(lambda: run_propagation(pretrained, results, progress=progress))

    measure_and_write(
        results, folder, resume, measure, figure=propagation_figure, tables=model_tables
    )
