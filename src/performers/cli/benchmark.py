"""``performers benchmark``: time and memory of attention, training steps and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from performers.app.errors import Interrupted, UserError
from performers.app.files import prepare_output_folder, read_json, write_atomically
from performers.app.options import Options, option
from performers.app.provenance import write_result
from performers.benchmark.settings import AttentionSettings, DecodeSettings, ModelSettings
from performers.cli.commands import App
from performers.cli.console import ProgressBars, note, output

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from performers.benchmark.case import Benchmark
    from performers.benchmark.measure import Results

app = App(
    no_args_is_help=True,
    help="Time and memory of attention, of training steps and of decoding, on this machine.",
)


@dataclass(frozen=True, kw_only=True)
class ResultFiles(Options):
    """Files of a benchmark."""

    output_folder: Path = option("Folder of the results.", flag="--output")
    resume: bool = option("Keep what --output holds already, measure the rest.", False)


@app.command(
    extra="benchmark",
    lower="--lengths or --batch",
    example="performers benchmark attention --output attention-benchmark",
)
def attention(files: ResultFiles, settings: AttentionSettings) -> None:
    """Attention: ours, torch's exact attention, and other libraries that are installed."""
    from performers.benchmark.cases.attention import ATTENTION

    _run(ATTENTION, files, settings)


@app.command(
    extra="benchmark",
    lower="--lengths or --batch",
    example="performers benchmark model --output model-benchmark",
)
def model(files: ResultFiles, settings: ModelSettings) -> None:
    """Training steps: forward, loss, backward and Adam, against attention that does nothing."""
    from performers.benchmark.cases.model import MODEL

    _run(MODEL, files, settings)


@app.command(
    extra="benchmark",
    lower="--contexts or --batch",
    example="performers benchmark decode --output decode-benchmark",
)
def decode(files: ResultFiles, settings: DecodeSettings) -> None:
    """Decoding: time per token and bytes of state, against a cache of keys and values."""
    from performers.benchmark.cases.decode import DECODE

    _run(DECODE, files, settings)


def _run(benchmark: Benchmark, files: ResultFiles, settings: Any) -> None:
    from performers.benchmark.measure import Results, run
    from performers.benchmark.plot import benchmark_figure
    from performers.benchmark.table import benchmark_tables

    folder = prepare_output_folder(files.output_folder, resume=files.resume)
    results = Results.empty(benchmark.name, settings)
    absences = benchmark.absences(settings)
    if absences:
        results.notes["not_measured"] = absences
    for name, reason in absences.items():
        note(f"{name}: {reason}")
    measure_and_write(
        results,
        folder,
        files.resume,
        partial(run, benchmark, settings, results),
        figure=lambda results: benchmark_figure(benchmark, results.rows),
        tables=lambda results: benchmark_tables(benchmark, results.rows),
        series=benchmark.series,
    )


def measure_and_write(
    results: Results,
    folder: Path,
    resume: bool,
    measure: Callable[..., None],
    *,
    figure: Callable[[Results], Figure],
    tables: Callable[[Results], list[Table]],
    series: str,
) -> None:
    """Measure, write the rows into a folder as they come, draw them and print them.

    ``measure`` fills the empty results, and is called with ``progress``; with ``resume`` the rows
    in the folder are kept. ``series`` is the column that names contestants.

    Raises:
        UserError: The folder holds results of other settings.
        Interrupted: The user pressed Ctrl-C; finished rows are written.
        Exit: This package gave a wrong result or an error (code 1).
    """
    from performers.app.figures import save_figure
    from performers.benchmark.case import FAILED, select
    from performers.benchmark.measure import OtherRunError

    path = folder / "results.json"
    if resume and path.exists():
        try:
            results.resume(read_json(path))
        except OtherRunError as error:
            raise UserError(
                f"--resume cannot go on from the results in {folder}: {error}; give another folder"
            ) from error
        note(f"{len(results.rows):,} rows kept from {path}")

    def save(results: Results) -> None:
        write_result(path, results.content(), "benchmark", seed=results.settings.get("seed"))
        write_atomically(folder / "results.csv", results.csv().encode())

    results.saved = save
    try:
        with ProgressBars() as bars:
            measure(progress=bars.task(f"benchmark {results.benchmark}"))
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"interrupted; {len(results.rows)} rows are in {path}, --resume goes on from them"
        ) from error
    save(results)
    for suffix in ("png", "svg"):
        save_figure(figure(results), folder / f"benchmark.{suffix}")
    for table in tables(results):
        output.print(table)
    output.print(f"results: {path}", soft_wrap=True)
    if failed := select(results.rows, {"status": FAILED}):
        names = sorted({row[series] for row in failed})
        note(f"performers: failed: {', '.join(names)}; {failed[0]['reason']}")
        raise typer.Exit(1)
