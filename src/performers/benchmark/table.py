"""Shows results as tables on the console."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.benchmark.case import MEASURED, Benchmark, Row


def benchmark_tables(benchmark: Benchmark, rows: Sequence[Row]) -> list[Table]:
    """A table for each title; captions give the reasons of cases that were not measured.

    Quartiles are in the files; with them the tables would not fit a terminal of 80 columns.
    """
    return [_table(benchmark, title, part) for title, part in by_title(benchmark, rows).items()]


def by_title(benchmark: Benchmark, rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each table or panel."""
    parts: dict[str, list[Row]] = {}
    for row in rows:
        parts.setdefault(benchmark.title.format(**row), []).append(row)
    return parts


def _table(benchmark: Benchmark, title: str, rows: list[Row]) -> Table:
    across, series = benchmark.across, benchmark.series
    cells = [[x.unit(row.get(x.name)) for x in benchmark.columns] for row in rows]
    for line, row in zip(cells, rows, strict=True):
        if row["status"] != MEASURED:
            line[0] = row["status"]
    shown = [n for n in range(len(benchmark.columns)) if any(line[n] for line in cells)]
    headings = [benchmark.columns[n].heading for n in shown]
    table = new_table(title, [series], headings, first=across)
    table.caption = "\n".join(
        f"{row[series]} at {row[across]:,}: {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] != MEASURED
    )
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1][across] != row[across]
        if first and number:
            table.add_section()
        length = f"{row[across]:,}" if first else ""
        table.add_row(length, row[series], *(cells[number][n] for n in shown))
    return table


def new_table(
    title: str, left: Iterable[str], right: Iterable[str], *, first: str | None = None
) -> Table:
    """An empty table.

    Args:
        title: Title.
        left: Headings of the columns of names.
        right: Headings of the columns of numbers.
        first: Heading of a column of numbers before these.
    """
    table = Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    if first is not None:
        table.add_column(first, justify="right", no_wrap=True)
    for heading in left:
        table.add_column(heading, no_wrap=first is not None)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def seconds(value: float | None) -> str:
    """A time with three digits and a fitting unit; empty for None."""
    if value is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(value) * factor >= 1:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value * 1e9)} ns"


def nbytes(value: float | None) -> str:
    """A size with three digits and a fitting unit; empty for None."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{digits(value)} {unit}"
        value /= 1024
    return f"{digits(value)} GiB"


def digits(value: float | None) -> str:
    """A number with three digits; empty for None."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def times(value: float | None) -> str:
    """A ratio with three digits; empty for None."""
    return "" if value is None else f"{digits(value)}×"


def percent(value: float | None) -> str:
    """A share; empty for None."""
    return "" if value is None else f"{100 * value:.0f}%"
