"""What a benchmark found, as rows; as JSON and CSV; and what of it an interrupted run may keep."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from performers.benchmark.groups import MEASURED, Outcome

Row = dict[str, Any]
"""Flat: strings, numbers, booleans and None."""

# What may change from a run to the one that goes on from it: what is measured, not how.
EXTENT = frozenset(
    {
        "anisotropic_norms",
        "kernel_feature_counts",
        "layers",
        "lengths",
        "norms",
        "contexts",
        "contestants",
        "attentions",
        "directions",
        "passes",
        "max_exact_length",
        "max_seconds",
        "memory",
        "memory_max_length",
    }
)
_SAME_MACHINE = ("cpu", "cores", "threads", "torch", "performers", "native")


class OtherRunError(Exception):
    """Results on disk were made in another way; the message says what differs."""


@dataclass
class Results:
    """The rows of a run, and what they were measured with.

    Attributes:
        benchmark: ``"attention"``, ``"model"``, ``"decode"``, or ``"accuracy ..."`` with a part.
        group_keys: The columns that rows timed in turns share.
        member_keys: The columns that tell these rows apart.
        settings: Of the run.
        machine: See ``machine.describe``.
        notes: More that belongs to the whole run, such as the floor.
        rows: The rows.
        saved: Called after every group of rows.
    """

    benchmark: str
    group_keys: tuple[str, ...]
    member_keys: tuple[str, ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    notes: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    saved: Callable[["Results"], None] = lambda results: None

    def has_group(self, group: tuple[Any, ...], members: Iterable[tuple[Any, ...]]) -> bool:
        """Whether all of a group's members are there already.

        A group is kept or measured again as a whole: its ratios are of times taken in turns.
        """
        there = {tuple(row[key] for key in self.member_keys) for row in self.group(group)}
        return set(members) <= there

    def group(self, group: tuple[Any, ...]) -> list[Row]:
        """The rows of a group."""
        return [row for row in self.rows if tuple(row[key] for key in self.group_keys) == group]

    def put_group(self, group: tuple[Any, ...], rows: list[Row]) -> None:
        """Add the rows of a group, in place of those it had, and save."""
        old = self.group(group)
        self.rows = [row for row in self.rows if row not in old] + rows
        self.saved(self)

    def resume(self, content: Mapping[str, Any]) -> None:
        """Take over the rows of an earlier run.

        Args:
            content: Its JSON.

        Raises:
            OtherRunError: It was made with other settings, by another version or on another
                machine.
        """
        if content.get("benchmark") != self.benchmark:
            raise OtherRunError(
                f"they are of the {content.get('benchmark')!r} benchmark, not {self.benchmark!r}"
            )
        for part, mine, names in (
            ("settings", self.settings, [n for n in self.settings if n not in EXTENT]),
            ("machine", self.machine, _SAME_MACHINE),
        ):
            theirs = content.get(part, {})
            for name in names:
                # Through JSON a tuple comes back as a list.
                was, now = _plain(theirs.get(name)), _plain(mine.get(name))
                if was != now:
                    raise OtherRunError(f"they were measured with {name} {was!r}, this is {now!r}")
        self.rows = list(content.get("rows", []))

    def content(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "benchmark": self.benchmark,
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "machine": dict(self.machine),
            **self.notes,
            "rows": self.rows,
        }

    def csv(self) -> str:
        """The rows as CSV, a header first; what a row lacks is empty."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


def outcome_columns(outcome: Outcome) -> Row:
    """Status, times in seconds and memory in bytes of one contestant."""
    timing, peak = outcome.timing, outcome.peak
    return {
        "status": outcome.status,
        "reason": outcome.reason,
        "seconds": None if timing is None else timing.median,
        "first_quartile": None if timing is None else timing.first_quartile,
        "third_quartile": None if timing is None else timing.third_quartile,
        "fastest": None if timing is None else timing.fastest,
        "rounds": None if timing is None else timing.rounds,
        "calls": None if timing is None else timing.calls,
        "peak_bytes": None if peak is None else peak.nbytes,
        "peak_method": None if peak is None else peak.method,
    }


def add_ratios(rows: list[Row], name_column: str, bases: Mapping[str, str], of: str) -> None:
    """Add to every row how many times as much the bases take.

    Args:
        rows: Rows of one group.
        name_column: The column of the contestant.
        bases: New column by name of the contestant that is divided.
        of: The column of the numbers.
    """
    for base, column in bases.items():
        numbers = [row[of] for row in rows if row[name_column] == base]
        for row in rows:
            row[column] = ratio(numbers[0] if numbers else None, row[of])


def ratio(above: float | None, below: float | None) -> float | None:
    """``above / below``, or None where either is missing or the quotient means nothing."""
    if above is None or below is None or not above > 0 or not below > 0:
        return None
    quotient = above / below
    return quotient if math.isfinite(quotient) else None


def failures(rows: Iterable[Row]) -> list[Row]:
    """The rows of contestants that gave wrong results."""
    return [row for row in rows if row["status"] == "failed"]


def measured(rows: Iterable[Row]) -> list[Row]:
    """The rows that hold times."""
    return [row for row in rows if row["status"] == MEASURED]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
