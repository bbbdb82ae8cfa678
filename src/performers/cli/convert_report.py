"""Results of a conversion, as tables on the console and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class ReportTable(NamedTuple):
    """A table as text, with lines below it."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]

    def markdown(self) -> str:
        """As a section of Markdown."""
        lines = [self.headings, ["---", *("---:" for _ in self.headings[1:])], *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return f"## {self.title}\n\n{table}{notes}\n"


def report_tables(content: Mapping[str, Any]) -> list[ReportTable]:
    """Tables of quality, and of what was measured of speed, from ``ConversionRecord.content``."""
    timed = (
        ("Forward pass", content["speed"], "length", "peak_bytes", "peak memory"),
        ("Decoding, a token", content["decoding"], "context", "cache_bytes", "cache"),
    )
    return [_quality(content), *(_timed(*each) for each in timed if each[1])]


def report_page(content: Mapping[str, Any]) -> str:
    """A conversion as a page of Markdown, with its figure."""
    parts = (
        f"# {content['model']['class']}, converted\n",
        _body(content),
        "![Quality against steps, time and memory against length](conversion.png)\n",
        f"Made by `{content['machine']['command']}` on {_machine(content)}. "
        "`performers.convert.load_performer` loads the model in this folder.\n",
    )
    return "\n".join(parts)


def model_card(content: Mapping[str, Any]) -> str:
    """A conversion as the card of its model: front matter, tables, and how to load it."""
    from huggingface_hub import ModelCardData

    model, base = content["model"], content["options"]["model"]
    card, is_sentence_model = model["card"], model["is_sentence_model"]
    named = {"base_model": base} if model["is_hub_name"] else {}
    library = "sentence-transformers" if is_sentence_model else "transformers"
    front = ModelCardData(**card, **named, library_name=library, tags=["performers"]).to_yaml()
    licence = "The original's card states no licence: see to its terms before you share this one."
    if "license" in card:
        licence = f"Licence: {card['license']}, that of the original."
    load = (
        "from performers.convert import load_performer\n\n"
        "model = load_performer(FOLDER)  # or the name of this model on the Hub"
    )
    if is_sentence_model:
        load = (
            "import performers.convert\n"
            "from sentence_transformers import SentenceTransformer\n\n"
            "model = SentenceTransformer(FOLDER)  # or the name of this model on the Hub"
        )
    name = base if model["is_hub_name"] else Path(base).name
    parts = (
        f"---\n{front}\n---\n",
        f"# {name}, with linear attention\n",
        f"`{name}` ({model['class']}), converted by performers:\n",
        f"```\n{content['machine']['command']}\n```\n",
        f"```python\n{load}\n```\n",
        _body(content),
        f"Measured on {_machine(content)}.\n",
        f"{licence}\n",
    )
    return "\n".join(parts)


def _body(content: Mapping[str, Any]) -> str:
    """The settings and the tables."""
    options, model = content["options"], content["model"]
    settings = (f"{name} {options[name]}" for name in _SETTINGS if options.get(name) is not None)
    head = (
        f"{model['parameters']:,} parameters. Attention: {', '.join(settings)}. Tested on "
        f"{model['tested_examples']:,} examples from the end of `{options['data']}`, which nothing "
        "was trained or fitted on.\n"
    )
    positions, trained = model["positions"], model["trained_positions"]
    if positions != trained:
        head += f"\nPositions: {trained:,} of the original, repeated up to {positions:,}.\n"
    return "\n".join((head, *(table.markdown() for table in report_tables(content))))


def _machine(content: Mapping[str, Any]) -> str:
    machine = content["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}"
    )


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
        if (saved := training.get("saved")) is not None:
            after = f"after {saved['step']:,} steps of {_STAGES.get(saved['stage'], '')}"
            if saved["stage"] == "untrained":
                after = "before the training"
            notes.append(
                f"Saved: the best measured state by {_QUALITY[shown[0]][0]}, {after}; the choice "
                "was made on this text."
            )
    notes.append(f"{BASELINE}: as many features, no window, no sinks, no calibration, untrained.")
    headings = ["", *(_QUALITY[name][0] for name in shown)]
    return ReportTable("Quality on held-out text", headings, cells, notes)


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
