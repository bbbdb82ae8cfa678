"""The report on protein models: one self-contained HTML page, and its figures as files.

`analyse_model` reads a model, `write_report` writes what was read beside the model's settings,
metrics and learning curve. The numbers of the page are also in `report.json`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

from performers.app.figures import Pictures
from performers.app.files import write_atomically, write_json
from performers.proteins.reading.analysis import ModelAnalysis, analyse_model
from performers.proteins.reading.learnt import MATRICES, finite, learnt_numbers
from performers.proteins.report import html_page as page
from performers.proteins.report.attention_sections import attention_section
from performers.proteins.report.comparison_sections import comparison_section
from performers.proteins.report.figures import curves, learning_curve_figure
from performers.proteins.report.similarity_sections import embedding_section, similarity_section

__all__ = ["ModelAnalysis", "ModelReport", "analyse_model", "write_report"]

_KNOWN = frozenset(
    {"tokens", "accuracy", "perplexity", "loss"}
    | {"baseline_accuracy", "baseline_perplexity", "baseline_loss"}
)


@dataclass(frozen=True)
class ModelReport:
    """What the report shows of one model.

    Attributes:
        name: Heading of its section, and its name in the figures.
        settings: Setting to value, shown as they are.
        metrics: Split to metrics: any of accuracy and baseline_accuracy (shares of 1), perplexity
            and baseline_perplexity, loss and baseline_loss (nats per residue; taken from the
            perplexity when absent) and tokens. Other numbers get a row of their own.
        history: The training log: dictionaries with "step", "loss", "eval_loss" and so on, as in
            the `log_history` of transformers' trainer_state.json.
        analysis: What `analyse_model` returned; None to leave attention out.
    """

    name: str
    settings: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    analysis: ModelAnalysis | None = None


def write_report(
    output_dir: str | os.PathLike[str],
    *,
    models: Sequence[ModelReport],
    title: str = "What the protein models learnt",
    matrix_name: str = "BLOSUM62",
    permutations: int = 9_999,
) -> Path:
    """Writes `report.html`, its figures as PNG files in `figures/`, its numbers in `report.json`.

    The page holds its images and styles, runs no script and loads nothing. Files of the same name
    are replaced, each whole or not at all, the page last.

    Args:
        output_dir: The folder; made when missing.
        models: The models, in the order of their sections.
        title: Heading of the page.
        matrix_name: Substitution matrix that amino-acid similarity is drawn beside; it is compared
            with those of `MATRICES` as well.
        permutations: Number of relabellings in the Mantel test.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: If there is no model or the matrix is unknown.
        OSError: If the folder cannot be written.
    """
    if not models:
        raise ValueError("models must hold at least one ModelReport, got none")
    folder = Path(output_dir)
    pictures = Pictures(folder / "figures")
    matrices = list(dict.fromkeys([matrix_name, *MATRICES]))
    learnt = [
        None
        if model.analysis is None
        else learnt_numbers(model.analysis, matrices=matrices, permutations=permutations)
        for model in models
    ]
    names = _unique([model.name for model in models])
    anchors = [f"model-{number}" for number in range(1, len(models) + 1)]
    parts = [page.heading(1, title)]
    if len(models) > 1:
        parts.append(page.links([(a, m.name) for a, m in zip(anchors, models, strict=True)]))
        parts.append(page.heading(2, "The models side by side"))
        parts.append(_metrics_table(models))
        parts.append(_learning_curves(models, "learning-curves", pictures))
        parts.append(
            comparison_section(
                {n: m.analysis for n, m in zip(names, models, strict=True) if m.analysis},
                {n: found for n, found in zip(names, learnt, strict=True) if found},
                pictures,
                matrix_name=matrix_name,
            )
        )
    for number, (anchor, model, found) in enumerate(
        zip(anchors, models, learnt, strict=True), start=1
    ):
        stem = f"{number}-{_slug(model.name)}"
        parts.append(page.heading(2, model.name, anchor))
        if model.settings:
            parts.append(page.heading(3, "Settings"))
            parts.append(page.table((), list(model.settings.items()), names=2))
        parts.append(page.heading(3, "Metrics"))
        parts.append(_metrics_table([model]))
        parts.append(page.heading(3, "Learning curve"))
        parts.append(_learning_curves([model], f"{stem}-learning-curve", pictures))
        if model.analysis is None or found is None:
            parts.append(page.paragraph("The attention of this model was not analysed."))
            continue
        parts.append(attention_section(model.analysis, f"{stem}-attention", pictures))
        parts.append(
            similarity_section(
                model.analysis,
                found,
                f"{stem}-similarity",
                pictures,
                matrix_name=matrix_name,
            )
        )
        parts.append(
            embedding_section(
                model.analysis, found, f"{stem}-embeddings", pictures, matrix_name=matrix_name
            )
        )
    write_json(folder / "report.json", _numbers(title, models, learnt))
    report = folder / "report.html"
    write_atomically(report, page.page(title, "\n".join(parts)).encode("utf-8"))
    return report


def _numbers(
    title: str, models: Sequence[ModelReport], learnt: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """What the page shows, for programs; None in the place of numbers that are not finite."""

    def plain(value: object) -> object:
        if isinstance(value, (bool, int, str)) or value is None:
            return value
        return finite(float(value)) if isinstance(value, Real) else str(value)

    return {
        "title": plain(title),
        "models": [
            {
                "name": model.name,
                "settings": {str(key): plain(value) for key, value in model.settings.items()},
                "metrics": {
                    split: {name: plain(value) for name, value in values.items()}
                    for split, values in model.metrics.items()
                },
                "history": [
                    {str(key): plain(value) for key, value in entry.items()}
                    for entry in model.history
                ],
                "learnt": found,
            }
            for model, found in zip(models, learnt, strict=True)
        ],
    }


def _metrics_table(models: Sequence[ModelReport]) -> str:
    """One row per model and split, each metric beside that of the unigram baseline."""
    several = len(models) > 1
    rows: list[tuple[object, ...]] = []
    further: list[tuple[object, ...]] = []
    for model in models:
        prefix = (model.name,) if several else ()
        for split, given in model.metrics.items():
            values = _with_losses(given)
            rows.append(
                (
                    *prefix,
                    split,
                    page.percent(values.get("accuracy")),
                    page.percent(values.get("baseline_accuracy")),
                    page.number(values.get("perplexity")),
                    page.number(values.get("baseline_perplexity")),
                    page.number(values.get("loss"), 3),
                    page.number(values.get("baseline_loss"), 3),
                    page.number(values.get("tokens"), 0),
                )
            )
            further += [
                (split, name, page.number(value, 4))
                for name, value in given.items()
                if name not in _KNOWN and not several
            ]
    if not rows:
        return page.paragraph("No metrics were given.")
    header = ["split", "accuracy", "unigram", "perplexity", "unigram", "loss", "unigram", "tokens"]
    markup = page.table(
        ["model", *header] if several else header,
        rows,
        names=2 if several else 1,
        caption="Per residue. Unigram: the best constant prediction for the same residues. "
        "Loss in nats.",
    )
    return markup + (page.table(("split", "metric", "value"), further, names=2) if further else "")


def _with_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, with losses filled in from the perplexities: loss = log(perplexity)."""
    filled = dict(metrics)
    for prefix in ("", "baseline_"):
        perplexity = filled.get(f"{prefix}perplexity", math.nan)
        if f"{prefix}loss" not in filled and perplexity > 0:
            filled[f"{prefix}loss"] = math.log(perplexity)
    return filled


def _learning_curves(models: Sequence[ModelReport], stem: str, pictures: Pictures) -> str:
    drawn = {
        name: model.history
        for name, model in zip(_unique([model.name for model in models]), models, strict=True)
        if curves(model.history, "loss") or curves(model.history, "accuracy")
    }
    if not drawn:
        return page.paragraph("No training log was given, so there is no learning curve.")
    baseline = _baseline(models)
    figure = learning_curve_figure(
        drawn,
        baseline_loss=baseline.get("baseline_loss"),
        baseline_accuracy=baseline.get("baseline_accuracy"),
    )
    description = f"Loss and accuracy against the training step: {', '.join(drawn)}."
    return page.image(pictures.add(stem, figure), description)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, with their number in front where one occurs twice."""
    return [
        name if names.count(name) == 1 else f"{number}. {name}"
        for number, name in enumerate(names, start=1)
    ]


def _baseline(models: Sequence[ModelReport]) -> dict[str, float]:
    """The metrics of the split whose baseline the learning curve shows."""
    for split in ("validation", "valid", "test", "train"):
        for model in models:
            if split in model.metrics:
                return _with_losses(model.metrics[split])
    return {}


def _slug(name: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "model"
