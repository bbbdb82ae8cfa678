"""Results of a benchmark as tables on the console."""

from collections.abc import Callable
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.benchmark.groups import MEASURED
from performers.benchmark.results import Results, Row


class _Column(NamedTuple):
    heading: str
    show: Callable[[Row], str]


def tables(results: Results) -> list[Table]:
    """The tables of a run, one for each direction and passes, size or level.

    Args:
        results: What was measured.

    Returns:
        The tables; what was not measured says why.
    """
    titles, across, name, columns = {
        "attention": (("direction", "passes"), "length", "contestant", _ATTENTION),
        "model": (("size", "objective"), "length", "attention", _MODEL),
        "decode": (("level",), "context", "contestant", _DECODE),
    }[results.benchmark]
    parts: dict[tuple[str, ...], list[Row]] = {}
    for row in results.rows:
        parts.setdefault(tuple(row[title] for title in titles), []).append(row)
    return [_table(", ".join(title), rows, across, name, columns) for title, rows in parts.items()]


def _table(
    title: str, rows: list[Row], across: str, name: str, columns: tuple[_Column, ...]
) -> Table:
    shown = [column for column in columns if any(column.show(row) for row in rows)]
    missing = [row for row in rows if row["status"] != MEASURED]
    table = Table(
        title=title,
        title_justify="left",
        caption="\n".join(
            f"{row[name]} at {row[across]:,}: {row['status']}: {row['reason']}" for row in missing
        ),
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column(across, justify="right", no_wrap=True)
    table.add_column(name, no_wrap=True)
    for column in shown:
        table.add_column(column.heading, justify="right", no_wrap=True)
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1][across] != row[across]
        if first and number:
            table.add_section()
        table.add_row(
            f"{row[across]:,}" if first else "",
            row[name],
            *(column.show(row) for column in shown),
        )
    return table


def seconds(value: float | None) -> str:
    """A time with three digits and a fitting unit; empty for None."""
    if value is None:
        return ""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if abs(value) * factor >= 1:
            return f"{_digits(value * factor)} {unit}"
    return f"{_digits(value * 1e9)} ns"


def nbytes(value: float | None) -> str:
    """A size with three digits and a fitting unit; empty for None."""
    if value is None:
        return ""
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{_digits(value)} {unit}"
        value /= 1024
    return f"{_digits(value)} GiB"


def _digits(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _times(column: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(column) is None else f"{_digits(row[column])}×"


def _value(column: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    return lambda row: "" if row.get(column) is None else show(row[column])


def _median(row: Row) -> str:
    return seconds(row["seconds"]) if row["status"] == MEASURED else row["status"]


# Quartiles are in the files; with them the tables would not fit a terminal of 80 columns.
_TIME = _Column("median", _median)
_MEMORY = _Column("peak\nmemory", _value("peak_bytes", nbytes))

_ATTENTION = (
    _TIME,
    _Column("SDPA\n/ this", _times("sdpa_ratio")),
    _Column("p.-pytorch\n/ this", _times("performer_pytorch_ratio")),
    _Column("GFLOP/s", _value("gflops_per_second", _digits)),
    _Column("of\nfloor", _value("floor_share", lambda share: f"{100 * share:.0f}%")),
    _MEMORY,
)
_MODEL = (
    _TIME,
    _Column("this /\nidentity", _times("over_identity")),
    _Column("exact\n/ this", _times("exact_ratio")),
    _MEMORY,
    _Column("this /\nidentity", _times("memory_over_identity")),
)
_DECODE = (
    _TIME,
    _Column("this / shortest\ncontext", _times("over_shortest_context")),
    _Column("exact\n/ this", _times("exact_ratio")),
    _Column("state", _value("state_bytes", nbytes)),
)
