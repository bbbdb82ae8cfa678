"""Measuring, writing and printing of the benchmark commands."""

from collections.abc import Callable
from pathlib import Path

import typer
from matplotlib.figure import Figure
from rich.table import Table

from performers.app.errors import Interrupted, UserError
from performers.app.figures import save_figure
from performers.app.files import read_json, write_atomically, write_json
from performers.benchmark.figure import benchmark_figure
from performers.benchmark.results import OtherRunError, Results, failures
from performers.cli.benchmark_tables import tables as benchmark_tables
from performers.cli.console import ProgressBars, note, output

_FAILED = 1
# What a row calls that which it measures.
_NAMES = ("contestant", "attention", "setting", "estimator")


def measure_and_write(
    results: Results,
    folder: Path,
    resume: bool,
    measure: Callable[..., None],
    *,
    figure: Callable[[Results], Figure] = benchmark_figure,
    tables: Callable[[Results], list[Table]] = benchmark_tables,
) -> None:
    """Measure, write the rows as they come, draw them and print them.

    Args:
        results: Empty; what is measured and with what.
        folder: Where to write; it exists.
        resume: Whether to keep what the folder holds.
        measure: Fills the results; called with ``progress``.
        figure: Draws them.
        tables: Makes tables of them.

    Raises:
        UserError: What the folder holds was measured in another way.
        Interrupted: Ctrl-C; what was measured is written.
        typer.Exit: With code 1: something of ours gave a wrong result or an error.
    """
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
        write_json(path, results.content())
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
    if failed := failures(results.rows):
        column = next(name for name in _NAMES if name in failed[0])
        names = sorted({row[column] for row in failed})
        note(f"performers: failed: {', '.join(names)}; {failed[0]['reason']}")
        raise typer.Exit(_FAILED)
