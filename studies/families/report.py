"""Tables of the study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.pages import Table
from studies.parts import Part


def tables(parts: Mapping[str, Part]) -> dict[str, Table]:
    """Tables of the parts that are done."""
    return {"ceiling": ceiling_table(parts)}


def ceiling_table(parts: Mapping[str, Part]) -> Table:
    """A line for each set of proteins and number of relatives."""
    columns = ("families", "relatives", "vote", "profile", "perplexity", "aligned", "residues")
    rows = []
    for name, part in parts.items():
        if name.startswith("ceiling, "):
            rows += [
                (
                    name.removeprefix("ceiling, "),
                    relatives,
                    *(percent(found[key]) for key in ("vote", "accuracy")),
                    f"{found['perplexity']:.2f}",
                    percent(found["aligned"]),
                    f"{part['tokens']:,}",
                )
                for relatives, found in part["relatives"].items()
            ]
    return Table(columns, rows, names=2)


def percent(value: Any) -> str:
    """A share in percent."""
    return f"{100 * value:.1f}%"
