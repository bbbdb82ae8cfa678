"""What a conversion found, as tables on the console and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from performers.benchmark.case import MEASURED
from performers.benchmark.cases.convert import CONVERTED, ORIGINAL
from performers.benchmark.table import nbytes, seconds
from performers.convert.distillation.results import BASELINE, FINE_TUNED

_Row = Mapping[str, Any]

_QUALITY: dict[str, tuple[str, Callable[[float], str]]] = {
    "perplexity": ("perplexity", lambda x: f"{x:.3f}"),
    "accuracy": ("accuracy", lambda x: f"{100 * x:.2f}%"),
    "divergence": ("KL to the original", lambda x: f"{x:.4f}"),
    "cosine": ("cosine", lambda x: f"{x:.4f}"),
    "retrieval": ("same nearest", lambda x: f"{100 * x:.1f}%"),
}
_SETTINGS = (
    "window",
    "sinks",
    "listed_keys",
    "num_features",
    "estimator",
    "layers",
    "length",
    "seed",
)
_STAGES = {"transfer": "attention transfer", "model": "fine-tuning"}


@dataclass(frozen=True)
class ReportTable:
    """A table as text.

    Attributes:
        title: What it shows.
        headings: Of the columns.
        rows: Cells.
        notes: Lines below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def on_console(self) -> Table:
        """As rich draws it, without the notes."""
        table = Table(
            title=self.title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for number, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if number else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """As a section of Markdown."""
        lines = [self.headings, ["---", *("---:" for _ in self.headings[1:])], *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return f"## {self.title}\n\n{table}{notes}\n"


def report_tables(content: Mapping[str, Any]) -> list[ReportTable]:
    """The tables of a conversion.

    Args:
        content: What ``ConversionRecord.content`` gives.

    Returns:
        Quality, and what was measured of speed.
    """
    tables = [_quality(content)]
    if content["speed"]:
        tables.append(
            _timed("Forward pass", content["speed"], "length", "peak_bytes", "peak memory")
        )
    if content["decoding"]:
        tables.append(
            _timed("Decoding, a token", content["decoding"], "context", "cache_bytes", "cache")
        )
    return tables


def report_page(content: Mapping[str, Any]) -> str:
    """A conversion as a page of Markdown, with its figure.

    Args:
        content: What ``ConversionRecord.content`` gives.
    """
    options, model, machine = content["options"], content["model"], content["machine"]
    settings = ", ".join(
        f"{name} {options[name]}" for name in _SETTINGS if options.get(name) is not None
    )
    head = (
        f"# {model['class']}, converted\n\n"
        f"{model['parameters']:,} parameters. Attention: {settings}. Tested on "
        f"{model['tested_examples']:,} examples from the end of `{options['data']}`, which nothing "
        "was trained or fitted on.\n"
    )
    foot = "\n".join(
        (
            "![Quality against steps, time and memory against length](conversion.png)\n",
            f"Made by `{machine['command']}` on {machine['cpu']}, {machine['threads']} threads, "
            f"torch {machine['torch']}, {machine['date']}. "
            "`performers.convert.load_performer` loads the model in this folder.\n",
        )
    )
    return "\n".join((head, *(table.markdown() for table in report_tables(content)), foot))


def _quality(content: Mapping[str, Any]) -> ReportTable:
    rows: list[_Row] = content["quality"]
    shown = [name for name in _QUALITY if any(row.get(name) is not None for row in rows)]
    history = content["training"].get("history", [])
    last = {entry["stage"]: entry for entry in history if shown[0] in entry}
    cells = []
    for row in rows:
        if row["model"] == FINE_TUNED and {"transfer", "model"} <= last.keys():
            cells.append(["after attention transfer", *_figures(last["transfer"], shown)])
        cells.append([row["model"], *_figures(row, shown)])
    notes = [f"{rows[0]['tokens']:,} tokens measured."]
    if content["training"]:
        options, training = content["options"], content["training"]
        steps = {"transfer": options["transfer_steps"], "model": options["steps"]}
        parts = [f"{count:,} steps of {_STAGES[name]}" for name, count in steps.items() if count]
        notes.append(
            f"Training: {' and '.join(parts)}, {training['tokens']:,} tokens, "
            f"{training['seconds'] / 60:.1f} minutes."
        )
    notes.append(f"{BASELINE}: as many features, no window, no sinks, no calibration, untrained.")
    return ReportTable(
        "Quality on held-out text", ["", *(_QUALITY[x][0] for x in shown)], cells, notes
    )


def _figures(row: _Row, shown: list[str]) -> list[str]:
    return ["" if row.get(name) is None else _QUALITY[name][1](row[name]) for name in shown]


def _timed(title: str, rows: list[_Row], across: str, column: str, heading: str) -> ReportTable:
    by_length: dict[int, dict[str, _Row]] = {}
    for row in rows:
        by_length.setdefault(row[across], {})[row["model"]] = row
    with_bytes = any(row.get(column) is not None for row in rows)
    cells = []
    for length, models in by_length.items():
        pair = [models[ORIGINAL], models[CONVERTED]]
        ratio = pair[1]["original_ratio"]
        cell = [
            f"{length:,}",
            *(seconds(row["seconds"]) if row["seconds"] else row["status"] for row in pair),
            "" if ratio is None else f"{ratio:.2f}×",
        ]
        cells.append([*cell, *(nbytes(row.get(column)) for row in pair if with_bytes)])
    headings = [f"{across}, tokens", "original", "converted", "speed-up"]
    if with_bytes:
        headings += [f"{heading}, original", f"{heading}, converted"]
    notes = [
        f"{row['model']} at {row[across]:,}: {row['status']}: {row['reason']}"
        for row in rows
        if row["status"] != MEASURED
    ]
    return ReportTable(title, headings, cells, notes)
