"""Writes the pages of docs/results from the results of studies: ``python -m studies.pages``.

A study's ``page.md`` is the text, with ``{{ name }}`` in the place of a table. The tables come from
what the study's commands wrote: the ``tables`` of ``results.json``, or those that ``tables`` of the
study's module ``report`` makes of each file in ``results/``, named by the file and the table.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import rich.table

STUDIES = Path(__file__).resolve().parent
RESULTS = STUDIES.parent / "docs" / "results"
PAGES = {
    f"{'cpu' if folder.name == 'speed' else folder.name}.md": folder.name
    for folder in sorted(file.parent for file in STUDIES.glob("*/page.md"))
}
"""Pages of docs/results, and the folders below ``studies`` that they are written from."""

ABSENT = "–"


class Table(NamedTuple):
    """A table of text.

    Attributes:
        columns: Headings.
        rows: Cells.
        names: Number of columns from the left that hold names and not numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    names: int = 1

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, str]], names: int = 1) -> Table:
        """A table of cells by heading; where a row lacks one, its cell is `ABSENT`."""
        lines = list(rows)
        columns = list(dict.fromkeys(heading for line in lines for heading in line))
        return cls(columns, [tuple(line.get(x, ABSENT) for x in columns) for line in lines], names)

    def filled(self) -> Table:
        """The table without columns that have no cell filled."""
        kept = [n for n, x in enumerate(zip(*self.rows, strict=True)) if set(x) - {"", ABSENT}]
        columns = [self.columns[n] for n in kept]
        return Table(columns, [[row[n] for n in kept] for row in self.rows], self.names)

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows))

    def rich(self, title: str) -> rich.table.Table:
        """The table for the console."""
        from performers.benchmark.table import new_table

        table = new_table(title, self.columns[: self.names], self.columns[self.names :])
        for row in self.rows:
            table.add_row(*row)
        return table


def pivot(
    rows: Iterable[Mapping[str, Any]],
    lines: Sequence[str],
    across: str,
    show: Callable[[Mapping[str, Any]], str],
) -> Table:
    """A line for each combination of values of ``lines``, a column for each value of ``across``."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = {name: _text(row[name]) for name in lines}
        cells.setdefault(tuple(line.values()), line)[_text(row[across])] = show(row)
    return Table.of(cells.values(), len(lines))


def _text(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def digits(value: float | None) -> str:
    """A number with three digits, powers of ten where it is tiny or huge."""
    if value is None:
        return ABSENT
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return f"{value:.1e}"


def render(folder: Path) -> str:
    """The page of a study."""
    made: dict[str, Table] = {}
    if (folder / "results.json").exists():
        stored = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tables"]
        made = {name: Table(**table) for name, table in stored.items()}
    for file in (folder / "results").glob("*.json"):
        report = importlib.import_module(f"studies.{folder.name}.report")
        tables = report.tables(json.loads(file.read_text(encoding="utf-8")))
        made |= {f"{file.stem}_{name}": table for name, table in tables.items()}
    text = (folder / "page.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: made[found[1]].markdown(), text)


def main() -> None:
    """Write all pages."""
    for page, study in PAGES.items():
        (RESULTS / page).write_text(render(STUDIES / study), encoding="utf-8")
        print(RESULTS / page, file=sys.stderr)


if __name__ == "__main__":
    main()
