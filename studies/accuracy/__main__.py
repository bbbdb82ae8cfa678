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
    from studies.accuracy.kernel import run_kernel

    _measure("kernel", files, options, partial(run_kernel, options), series="estimator")


@app.command(extra="convert", lower="--length or --passages")
def heads(files: ResultFiles, options: PretrainedOptions) -> None:
    """Outputs of the heads of a pretrained model."""
    _measure_pretrained("heads", files, options)


@app.command(extra="convert", lower="--length or --passages")
def models(files: ResultFiles, options: PretrainedOptions) -> None:
    """Hidden states and perplexity of a pretrained model whose attention is replaced."""
    _measure_pretrained("models", files, options)


@app.command(extra="convert", lower="--length or --passages")
def plan(files: ResultFiles, options: PlanOptions) -> None:
    """Errors that performers.plan promises on some passages, and those on others."""
    _measure_pretrained("plan", files, options)


def _measure_pretrained(name: str, files: ResultFiles, options: PretrainedOptions) -> None:
    from performers.convert.distillation.quality import kind_of
    from studies.accuracy import pretrained

    found = _told(lambda: pretrained.read_pretrained(options))
    if kind_of(found.loaded.model) == "encoder":
        note(f"{options.model} has no language-modelling head: hidden states only, no perplexity")
    _measure(name, files, options, partial(getattr(pretrained, f"run_{name}"), found))


def _measure(
    name: str,
    files: ResultFiles,
    options: KernelOptions | PretrainedOptions,
    run: Callable[..., None],
    series: str = "setting",
) -> None:
    from performers.benchmark.measure import Results
    from studies.accuracy import report

    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    results = Results.empty(f"accuracy {name}", options)
    measure_and_write(
        results,
        folder,
        files.resume,
        lambda progress: _told(lambda: run(results, progress)),
        figure=getattr(report, f"{name}_figure"),
        tables=report.console_tables,
        series=series,
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
