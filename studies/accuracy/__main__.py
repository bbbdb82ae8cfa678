"""``python -m studies.accuracy``: random features against exact attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from performers.app.errors import UserError
from performers.app.files import prepare_output_folder
from performers.cli.benchmark import ResultFiles, measure_and_write
from performers.cli.commands import App
from performers.cli.console import note
from performers.cli.interrupts import end_at_once
from studies.accuracy.options import KernelOptions, PlanOptions, PretrainedOptions

_Result = TypeVar("_Result")

app = App(no_args_is_help=True, help="How far attention through random features is from exact.")


@app.command(extra="benchmark", lower="--kernel-length")
def kernel(files: ResultFiles, options: KernelOptions) -> None:
    """Estimates of the kernel on random data, the paper's Figure 4."""
    from performers.benchmark.measure import Results
    from studies.accuracy import report
    from studies.accuracy.kernel import run_kernel

    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    results = Results.empty("accuracy kernel", options)
    measure_and_write(
        results,
        folder,
        files.resume,
        partial(run_kernel, options, results),
        figure=report.kernel_figure,
        tables=report.console_tables,
        series="estimator",
    )


@app.command(extra="convert", lower="--length or --passages")
def heads(files: ResultFiles, options: PretrainedOptions) -> None:
    """Outputs of the heads of a pretrained model."""
    _measure("heads", files, options)


@app.command(extra="convert", lower="--length or --passages")
def models(files: ResultFiles, options: PretrainedOptions) -> None:
    """Hidden states and perplexity of a pretrained model whose attention is replaced."""
    _measure("models", files, options)


@app.command(extra="convert", lower="--length or --passages")
def plan(files: ResultFiles, options: PlanOptions) -> None:
    """Errors that performers.plan promises on some passages, and those on others."""
    _measure("plan", files, options)


def _measure(name: str, files: ResultFiles, options: PretrainedOptions) -> None:
    from performers.benchmark.measure import Results
    from performers.convert.distillation.quality import kind_of
    from studies.accuracy import pretrained, report

    found = _told(lambda: pretrained.read_pretrained(options))
    if kind_of(found.loaded.model) == "encoder":
        note(f"{options.model} has no language-modelling head: hidden states only, no perplexity")
    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    results = Results.empty(f"accuracy {name}", options)
    run = getattr(pretrained, f"run_{name}")
    measure_and_write(
        results,
        folder,
        files.resume,
        lambda progress: _told(lambda: run(found, results, progress=progress)),
        figure=getattr(report, f"{name}_figure"),
        tables=report.console_tables,
        series="setting",
    )


def _told(call: Callable[[], _Result]) -> _Result:
    """Call a function; an unusable model or text is an error of one line."""
    try:
        return call()
    except (ValueError, ImportError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    end_at_once()
    app()
