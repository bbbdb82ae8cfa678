"""``performers benchmark accuracy``: how far attention through features is from exact attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import typer

from performers.app.errors import UserError
from performers.app.files import prepare_output_folder
from performers.app.options import OptionError, Options, option
from performers.benchmark.settings import KernelSettings, PretrainedSettings
from performers.cli.console import note

if TYPE_CHECKING:
    from performers.benchmark.accuracy_passages import Pretrained

KERNEL, HEADS, MODEL = "kernel", "heads", "model"
PARTS = (KERNEL, HEADS, MODEL)
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class ResultFiles(Options):
    """Files of a benchmark."""

    output_folder: Path = option("Folder of the results.", flag="--output")
    resume: bool = option("Keep what --output holds already, measure the rest.", False)


@dataclass(frozen=True, kw_only=True)
class AccuracyOptions(ResultFiles):
    """Parts of ``performers benchmark accuracy``."""

    part: tuple[str, ...] | None = option(
        "kernel: estimates on random data, the paper's Figure 4; heads: outputs of the heads of "
        "--model; model: what becomes of it in the whole model. With commas between; by default "
        "kernel, and the others with --model.",
        None,
        choices=PARTS,
    )


def accuracy(
    options: AccuracyOptions, pretrained: PretrainedSettings, kernel: KernelSettings
) -> None:
    """Accuracy: random features against exact attention, on random data and pretrained models."""
    parts = _parts(options.part or (), pretrained)
    found = _read(pretrained) if pretrained.model else None
    prepare_output_folder(options.output_folder, resume=options.resume)
    runs: dict[str, Callable[[Path], None]] = {KERNEL: partial(_kernel, kernel, options.resume)}
    if found is not None:
        runs[HEADS] = partial(_heads, found, options.resume)
        runs[MODEL] = partial(_model, found, options.resume)
    _run_all([(name, runs[name]) for name in PARTS if name in parts], options.output_folder)


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


def _parts(part: tuple[str, ...], settings: PretrainedSettings) -> tuple[str, ...]:
    """The parts to run."""
    if bool(settings.model) != bool(settings.text):
        missing, there = ("--model", "--text") if settings.text else ("--text", "--model")
        raise OptionError(f"{missing} is missing: {there} was given, and the two go together")
    parts = part or (PARTS if settings.model else (KERNEL,))
    if not settings.model and set(parts) != {KERNEL}:
        raise OptionError(f"--part {','.join(parts)} needs --model and --text")
    if settings.model and set(parts) == {KERNEL}:
        raise OptionError("--model and --text are not used with --part kernel: leave them out")
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
    from performers.benchmark.accuracy_figure import kernel_figure
    from performers.benchmark.accuracy_kernel import kernel_results, run_kernel
    from performers.cli.benchmark_accuracy_tables import kernel_tables
    from performers.cli.benchmark_run import measure_and_write

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
    from performers.cli.benchmark_accuracy_tables import heads_tables
    from performers.cli.benchmark_run import measure_and_write

    results = heads_results(pretrained)

    def measure(progress: Callable[[int, int], None]) -> None:
        _told(lambda: run_heads(pretrained, results, progress=progress))

    measure_and_write(results, folder, resume, measure, figure=heads_figure, tables=heads_tables)


def _model(pretrained: Pretrained, resume: bool, folder: Path) -> None:
    from performers.benchmark.accuracy_heads_figure import propagation_figure
    from performers.benchmark.accuracy_model import propagation_results, run_propagation
    from performers.cli.benchmark_accuracy_tables import model_tables
    from performers.cli.benchmark_run import measure_and_write

    results = propagation_results(pretrained)

    def measure(progress: Callable[[int, int], None]) -> None:
        _told(lambda: run_propagation(pretrained, results, progress=progress))

    measure_and_write(
        results, folder, resume, measure, figure=propagation_figure, tables=model_tables
    )
