"""Callbacks that report progress."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the units of work done and the units in all."""

Report: TypeAlias = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the name of a piece of work, the units done, the units in all, and a log entry."""


def duration(seconds: float) -> str:
    """A time in words, in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours} h {minutes:02} min"


def part(report: Report | None, name: str) -> Progress | None:
    """The `Progress` of one piece of work of a `Report`."""
    if report is None:
        return None
    return lambda done, total: report(name, done, total, {})
