"""Declares what a benchmark measures, and how its table and its plot show it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from performers.benchmark.gate import Gate
from performers.benchmark.memory import Peak

Row = dict[str, Any]
"""A row of results. Flat: strings, numbers, booleans and None."""

MEASURED, SKIPPED, OUT_OF_MEMORY = "measured", "skipped", "out of memory"
FAILED, ERROR = "failed", "error"
"""Statuses of a row. ``failed``: this package raised or was wrong; ``error``: another did."""


@dataclass(frozen=True)
class Case:
    """One contestant on one problem.

    Attributes:
        columns: The columns that tell it from the other cases of its group.
        prepare: Makes the call that is timed; runs after memory was measured.
        gate: Must pass before anything is measured.
        probe: Returns the `Peak` of a call; is pickled, and runs in a separate process.
        ours: Whether an error is a failure of this package.
        skip: The reason why the case is not measured.
        growth: Time grows with the length to this power; 0: it is not predicted.
        units: Units of work in a call; times are divided by it.
    """

    columns: Row
    prepare: Callable[[], Callable[[], object]]
    gate: Gate | None = None
    probe: Callable[[], Peak] | None = None
    ours: bool = False
    skip: str | None = None
    growth: int = 0
    units: int = 1


@dataclass(frozen=True)
class Group:
    """Cases that are timed in turns, and share the columns ``key``; ``finish`` adds more."""

    key: Row
    cases: list[Case]
    finish: Callable[[list[Row]], None] = lambda rows: None


class Ratio(NamedTuple):
    """A column that compares rows with a base row.

    Attributes:
        column: The new column.
        is_base: Whether a row is a base; the first is taken.
        same: The columns that a row shares with its base.
        of: The column that is divided.
        over_base: ``row / base`` instead of ``base / row``.
    """

    column: str
    is_base: Callable[[Row], bool]
    same: tuple[str, ...]
    of: str = "seconds"
    over_base: bool = False


class Column(NamedTuple):
    """A column of a table, with the format of its values."""

    heading: str
    name: str
    unit: Callable[[Any], str]


@dataclass(frozen=True)
class Benchmark:
    """A list of cases, and how results are shown.

    Attributes:
        name: Name of the command.
        titles: The columns with one table for each combination of their values.
        title: Title of a table or panel, a format of these.
        across: The column of the horizontal axis.
        series: The column that names contestants.
        columns: The columns of the table.
        plotted: Columns with their labels; every title has a panel of the first, and the last
            title of a line has one of each other.
        ratios: See `Ratio`.
        groups: From settings and notes, which it may add to, to groups.
        absences: From settings to the contestants that cannot run, with reasons.
    """

    name: str
    titles: tuple[str, ...]
    title: str
    across: str
    series: str
    columns: tuple[Column, ...]
    plotted: tuple[tuple[str, str], ...]
    ratios: tuple[Ratio, ...]
    groups: Callable[[Any, dict[str, Any]], list[Group]]
    absences: Callable[[Any], dict[str, str]] = lambda settings: {}


def add_ratios(rows: Iterable[Row], ratios: Iterable[Ratio]) -> None:
    """Add columns of ratios to rows, in place; None where a value is missing or not positive."""
    rows = list(rows)
    for ratio in ratios:
        bases: dict[tuple[Any, ...], Row] = {}
        for row in filter(ratio.is_base, rows):
            bases.setdefault(tuple(row[name] for name in ratio.same), row)
        for row in rows:
            base = bases.get(tuple(row[name] for name in ratio.same), {})
            above, below = base.get(ratio.of) or 0, row[ratio.of] or 0
            if ratio.over_base:
                above, below = below, above
            row[ratio.column] = above / below if above > 0 and below > 0 else None


def select(rows: Iterable[Row], values: Mapping[str, Any]) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(name) == x for name, x in values.items())]
