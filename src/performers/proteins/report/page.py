"""The report on protein models: one HTML page that needs no network, and its numbers.

`write_report` lays out what was read from the models in the template ``report.html.jinja``, with
its style ``report.css`` and its script ``report.js``. Vega-Lite draws the charts, the script the
attention maps. The numbers of the page are also in ``report.json``, its charts in ``figures/``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from performers.app.figures import shortened
from performers.app.files import write_atomically
from performers.app.provenance import write_result
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.learnt import MATRICES, finite, learnt_numbers
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.reading.relative_shares import RelativeShares
from performers.proteins.reading.residues import ProteinReading, principal_components
from performers.proteins.reading.site_scores import FEWEST_SETS
from performers.proteins.report import charts, payload, tables

_FOLDER = Path(__file__).parent
_LISTED_PAIRS = 6


@dataclass(frozen=True)
class ModelReport:
    """One model of a report.

    Attributes:
        name: Heading of its parts, and its name in the charts.
        settings: Setting to value, shown as they are.
        metrics: Name of a set of proteins to the result of `evaluate_model`; one at least.
        history: The training log: dictionaries with "step", "loss", "eval_loss" and so on, as in
            the `log_history` of transformers' trainer_state.json.
        analysis: The result of `analyse_model`.
        is_causal: Whether the model guesses a residue from those before it alone.
        proteins: The result of `read_proteins`. The map, the table and the residues of the page
            are those of the first model.
        available: Number of proteins that `proteins` were drawn from.
        relatives: Attention of a protein's residues to its relatives, of the first model.
    """

    name: str
    settings: Mapping[str, object]
    metrics: Mapping[str, Mapping[str, float]]
    history: Sequence[Mapping[str, Any]]
    analysis: ModelAnalysis
    is_causal: bool
    proteins: Sequence[ProteinReading]
    available: int
    relatives: RelativeShares | None = None


def write_report(
    folder: Path,
    *,
    models: Sequence[ModelReport],
    title: str = "Your proteins, read by a protein language model",
    labels: Mapping[str, Sequence[str]] | None = None,
    permutations: int = 9_999,
    max_residues: int = 50_000,
) -> Path:
    """Write `report.html`, its charts as PNG files in `figures/`, its numbers in `report.json`.

    The page holds its styles, scripts and data, and a policy forbids it to load anything or to run
    any other script. Files of the same name are replaced, each whole or not at all, the page last.

    Args:
        folder: The folder; made when missing.
        models: The models, one or more; the first has proteins.
        title: Heading of the page.
        labels: Heading to a label for each protein of the map; by default those in their headers.
        permutations: Number of relabellings in the Mantel test.
        max_residues: Residues whose guesses the page holds, about 8 bytes each.

    Returns:
        The path of `report.html`.
    """
    reader = models[0]
    learnt = [learnt_numbers(model.analysis, permutations=permutations) for model in models]
    names = [shortened(model.name) for model in models]
    unique = [n if names.count(n) == 1 else f"{i}. {n}" for i, n in enumerate(names, start=1)]
    drawn: dict[str, charts.Chart] = {}
    mapped = {f"maps-{i}": m.analysis for i, m in enumerate(models) if m.analysis.labels}
    data = {
        "levels": payload.LEVELS,
        "names": charts.NAMES,
        "charts": drawn,
        "categories": charts.CATEGORIES,
        **_proteins(reader, labels, max_residues, drawn),
        "maps": {
            key: payload.heads(analysis, payload.HEAD_CHARACTERS // len(mapped))
            for key, analysis in mapped.items()
        },
    }
    reference = load_reference_matrix(MATRICES[0], AMINO_ACIDS)
    similar = _similarities(models, unique, reference, drawn)
    if reader.relatives is not None:
        drawn["relatives"] = charts.relatives_chart(reader.relatives)
    histories = {name: model.history for name, model in zip(unique, models, strict=True)}
    metrics = next(iter(reader.metrics.values()))
    for metric, baseline in (
        ("loss", math.log(metrics["baseline_perplexity"])),
        ("accuracy", metrics["baseline_accuracy"]),
    ):
        if chart := charts.learning_chart(histories, metric, baseline):
            drawn[f"learning-{metric}"] = chart
    scripts = [charts.chart_script(), (_FOLDER / "report.js").read_text(encoding="utf-8")]
    page = _template().render(
        title=title,
        sentences=tables.sentences(reader),
        reader=reader,
        models=[
            {
                "name": name,
                "model": model,
                "learnt": found,
                "key": f"maps-{i}",
                "maps": data["maps"].get(f"maps-{i}"),
            }
            for i, (name, model, found) in enumerate(zip(unique, models, learnt, strict=True))
        ],
        notes=tables.notes(learnt),
        reference=reference,
        listed_pairs=_LISTED_PAIRS,
        similar=similar,
        relatives=reader.relatives,
        most_relatives=charts.MOST_RELATIVES,
        matrix_name=MATRICES[0],
        data=data,
        data_text=_script_safe(data),
        max_residues=max_residues,
        fewest_sets=FEWEST_SETS,
        drawn=drawn,
        scripts=[Markup(text) for text in scripts],
        policy=" ".join(f"'sha256-{_sha256(text)}'" for text in scripts),
    )
    for name, chart in drawn.items():
        if name != "track":
            write_atomically(folder / "figures" / f"{name}.png", charts.png(chart))
    write_result(folder / "report.json", finite(_numbers(title, models, learnt)), "report")
    report = folder / "report.html"
    write_atomically(report, page.encode("utf-8"))
    return report


def _proteins(
    reader: ModelReport,
    labels: Mapping[str, Sequence[str]] | None,
    max_residues: int,
    drawn: dict[str, charts.Chart],
) -> dict[str, Any]:
    """Rows of the proteins, their guesses, and the charts of both."""
    readings = reader.proteins
    rows = payload.protein_rows(readings)
    if labels is None:
        labels = payload.header_labels([reading.record for reading in readings])
    for position, values in enumerate(labels.values()):
        for row, value in zip(rows, values, strict=True):
            row[f"label{position}"] = shortened(value)
    headings = [shortened(heading) for heading in labels]
    places, shares = principal_components(np.stack([reading.embedding for reading in readings]))
    drawn["map"], colours = charts.map_chart(places, shares, rows, headings)
    drawn["track"] = charts.track_chart()
    first = reader.analysis.protein.name
    numbers = payload.tracked(readings, first, max_residues)
    chosen = (n for n in numbers if readings[n].record.name == first)
    return {
        "proteins": rows,
        "tracks": {n: payload.track(readings[n]) for n in numbers},
        "labels": headings,
        "colours": colours,
        "chosen": next(chosen, 0),
    }


def _similarities(
    models: Sequence[ModelReport],
    names: Sequence[str],
    reference: NDArray[np.float64],
    drawn: dict[str, charts.Chart],
) -> list[str]:
    """Charts of the similarities of the amino acids, the reference first; their names."""
    matrices = {}
    for name, model in zip(names, models, strict=True):
        of = f", {name}" if len(models) > 1 else ""
        if model.analysis.similarity:
            matrices[f"Attention{of}"] = model.analysis.similarity["all"].matrix()
        matrices[f"Input vectors{of}"] = model.analysis.embeddings
    matrices = {name: m for name, m in matrices.items() if np.isfinite(m).any()}
    if not matrices:
        return []
    drawn["similarity-0"] = charts.similarity_chart(reference, MATRICES[0], unit="score")
    for position, (name, matrix) in enumerate(matrices.items(), start=1):
        drawn[f"similarity-{position}"] = charts.similarity_chart(
            matrix, shortened(name), unit="similarity, −1 to 1", limit=1.0
        )
    return [f"similarity-{position}" for position in range(len(matrices) + 1)]


def _printable(value: object) -> object:
    """Text without characters that cannot be shown or encoded, and of bounded length."""
    if isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value)[:400])


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    filters = (tables.number, tables.percent, math.log, tables.head_cells, tables.scored)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template("report.html.jinja")


def _script_safe(data: Mapping[str, Any]) -> Markup:
    """JSON that stays text inside a script element, whatever strings it holds."""
    text = json.dumps(finite(data), separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _numbers(
    title: str, models: Sequence[ModelReport], learnt: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The numbers of the page for programs."""
    return {
        "title": title,
        "models": [
            {
                "name": model.name,
                "settings": model.settings,
                "metrics": model.metrics,
                "history": model.history,
                "learnt": found,
                "relatives": _shares(model.relatives),
                "proteins": [
                    {
                        "name": reading.record.name,
                        "length": len(reading.record.sequence),
                        "surprise": reading.surprise,
                        "accuracy": reading.accuracy,
                    }
                    for reading in model.proteins
                ],
            }
            for model, found in zip(models, learnt, strict=True)
        ],
    }


def _shares(read: RelativeShares | None) -> dict[str, Any] | None:
    if read is None:
        return None
    return {
        "protein": read.protein.name,
        "shares": [
            {"name": name, "shares": shares}
            for name, shares in zip(read.names, read.shares.round(6).tolist(), strict=True)
        ],
    }
