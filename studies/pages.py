"""Writes the pages of docs/results from the results of studies: ``python -m studies.pages``.

A study's ``page.md`` is the text, with ``{{ name }}`` in the place of a table, and its
``results.json`` has the tables: ``{"tables": {name: {"columns", "rows", "names"}}}``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STUDIES = Path(__file__).resolve().parent
RESULTS = STUDIES.parent / "docs" / "results"
PAGES = {
    "accuracy.md": "accuracy",
    "catalogue.md": "catalogue",
    "cpu.md": "speed",
    "demo.md": "demo",
    "long_documents.md": "long_documents",
    "pointer.md": "pointer",
    "proteins.md": "proteins",
}
"""Pages of docs/results, and the folders below ``studies`` that they are written from."""


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

    def markdown(self) -> str:
        """The table in GitHub's Markdown."""
        rule = ["---"] * self.names + ["---:"] * (len(self.columns) - self.names)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.columns, rule, *self.rows))


def render(folder: Path) -> str:
    """The page of a study."""
    tables = json.loads((folder / "results.json").read_text(encoding="utf-8"))["tables"]
    text = (folder / "page.md").read_text(encoding="utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda found: Table(**tables[found[1]]).markdown(), text)


def main() -> None:
    """Write all pages."""
    for page, study in PAGES.items():
        (RESULTS / page).write_text(render(STUDIES / study), encoding="utf-8")
        print(RESULTS / page, file=sys.stderr)


if __name__ == "__main__":
    main()
