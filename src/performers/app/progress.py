"""Callbacks that report progress."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with the units of work done and the units in all."""

Report: TypeAlias = Callable[[str, int, int, Mapping[str, float]], None]
"""Called with the name of a piece of work, the units done, the units in all, and a log entry."""


def part(report: Report | None, name: str) -> Progress | None:
    """The `Progress` of one piece of work of a `Report`."""
    if report is None:
        return None
    return lambda done, total: report(name, done, total, {})
