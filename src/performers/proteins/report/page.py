"""The report on protein models: one self-contained HTML page, its figures, its numbers.

`analyse_model` reads a model. `write_report` lays out what was read, beside the model's settings,
metrics and learning curve, in the template ``report.html.jinja``; the numbers of the page are also
in `report.json`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest
from numbers import Real
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from performers.app.figures import Pictures
from performers.app.files import write_atomically
from performers.app.provenance import write_result
from performers.proteins.reading.analysis import ModelAnalysis, analyse_model
from performers.proteins.reading.head_scores import COLUMN_FRACTION, HeadScore, HeadScores
from performers.proteins.reading.learnt import KINDS, MATRICES, finite, learnt_numbers
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.reading.similarity import AMINO_ACIDS
from performers.proteins.reading.site_scores import FEWEST_SETS, SiteScores
from performers.proteins.report.attention_figure import attention_maps_figure
from performers.proteins.report.figures import (
    curves,
    heads_figure,
    learning_curve_figure,
    similarity_figure,
)

__all__ = ["ModelAnalysis", "ModelReport", "analyse_model", "write_report"]

_KNOWN = frozenset(
    {"tokens", "accuracy", "perplexity", "loss"}
    | {"baseline_accuracy", "baseline_perplexity", "baseline_loss"}
)
_LAYERS_AT_MOST = 12
_LISTED_HEADS = 3
_LISTED_PAIRS = 6

_Row = tuple[object, ...]


@dataclass(frozen=True)
class ModelReport:
    """One model of a report.

    Attributes:
        name: Heading of its section, and its name in the figures.
        settings: Setting to value, shown as they are.
        metrics: Split to metrics: any of accuracy and baseline_accuracy (shares of 1), perplexity
            and baseline_perplexity, loss and baseline_loss (nats per residue; taken from the
            perplexity when absent) and tokens. Other numbers get a row of their own.
        history: The training log: dictionaries with "step", "loss", "eval_loss" and so on, as in
            the `log_history` of transformers' trainer_state.json.
        analysis: The result of `analyse_model`; None to leave attention out.
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
    """Write `report.html`, its figures as PNG files in `figures/`, its numbers in `report.json`.

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
        ValueError: `models` is empty or the matrix is unknown.
        OSError: The folder cannot be written.
    """
    if not models:
        raise ValueError("models must hold at least one ModelReport, got none")
    folder = Path(output_dir)
    pages = _Sections(Pictures(folder / "figures"), matrix_name)
    names = [model.name for model in models]
    sections: list[dict[str, Any]] = []
    for number, model in enumerate(models, start=1):
        numbers = None
        if model.analysis is not None:
            matrices = list(dict.fromkeys([matrix_name, *MATRICES]))
            numbers = learnt_numbers(model.analysis, matrices=matrices, permutations=permutations)
        unique = model.name if names.count(model.name) == 1 else f"{number}. {model.name}"
        sections.append(pages.model(model, numbers, unique, f"{number}-{_slug(model.name)}"))
    content: dict[str, Any] = {"models": sections, "compared": ()}
    if len(models) > 1:
        content["learning_curves"] = pages.curve(
            {s["unique_name"]: m for s, m in zip(sections, models, strict=True)}, "learning-curves"
        )
        scored = [s for s in sections if s["analysis"] and s["analysis"].scores]
        if len(scored) > 1:
            content |= {"compared": scored, **pages.comparison(scored)}
    page = _template().render(
        title=title,
        matrix_name=matrix_name,
        fewest_sets=FEWEST_SETS,
        column_fraction=COLUMN_FRACTION,
        **content,
    )
    numbers = _numbers(title, models, [s["learnt"] for s in sections])
    write_result(folder / "report.json", numbers, "report")
    report = folder / "report.html"
    write_atomically(report, page.encode("utf-8"))
    return report


def number(value: object, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{float(value):,.{digits}f}"


def percent(value: object, digits: int = 2) -> str:
    """A share of 1 in percent; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{100 * float(value):.{digits}f}%"


def _printable(value: object) -> object:
    """Text without characters that cannot be shown or encoded."""
    if isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in str(value))


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        finalize=_printable,
    )
    environment.filters |= {"number": number, "percent": percent}
    return environment.get_template("report.html.jinja")


class _Sections:
    """Contents of the template: rows of tables, and pictures as data URIs."""

    def __init__(self, pictures: Pictures, matrix_name: str) -> None:
        self._pictures, self._matrix_name = pictures, matrix_name
        self._reference = load_reference_matrix(matrix_name, AMINO_ACIDS)

    def model(
        self, model: ModelReport, learnt: Mapping[str, Any] | None, unique_name: str, stem: str
    ) -> dict[str, Any]:
        """The section of one model, whose pictures' names begin with `stem`."""
        metrics = [_metric_row(split, values) for split, values in model.metrics.items()]
        section: dict[str, Any] = {
            "name": model.name,
            "unique_name": unique_name,
            "settings": list(model.settings.items()),
            "metrics": metrics,
            "named_metrics": [(model.name, *row) for row in metrics],
            "further": [
                (split, name, number(value, 4))
                for split, values in model.metrics.items()
                for name, value in values.items()
                if name not in _KNOWN
            ],
            "curve": self.curve({model.name: model}, f"{stem}-learning-curve"),
            "analysis": model.analysis,
            "learnt": learnt,
        }
        if model.analysis is not None and learnt is not None:
            section |= self._attention(model.analysis, f"{stem}-attention")
            section |= self._similarity(model.analysis, learnt, f"{stem}-similarity")
            section |= self._embeddings(model.analysis, learnt, f"{stem}-embeddings")
        return section

    def curve(self, models: Mapping[str, ModelReport], stem: str) -> dict[str, str] | None:
        """Learning curves of the models that have a log."""
        drawn = {
            name: model.history
            for name, model in models.items()
            if curves(model.history, "loss") or curves(model.history, "accuracy")
        }
        if not drawn:
            return None
        splits = ("validation", "valid", "test", "train")
        given = (
            m.metrics[split] for split in splits for m in models.values() if split in m.metrics
        )
        baseline = _with_losses(next(given, {}))
        figure = learning_curve_figure(
            drawn,
            baseline_loss=baseline.get("baseline_loss"),
            baseline_accuracy=baseline.get("baseline_accuracy"),
        )
        return {"source": self._pictures.add(stem, figure), "names": ", ".join(drawn)}

    def _attention(self, analysis: ModelAnalysis, stem: str) -> dict[str, Any]:
        if analysis.problem or not analysis.labels:
            return {"maps": None}
        layers = _spread(len(analysis.maps), _LAYERS_AT_MOST)
        figure = attention_maps_figure(
            [analysis.maps[layer - 1] for layer in layers],
            analysis.labels,
            scores=analysis.scores,
            layers=layers,
            sites=[site.site for site in analysis.sites.sites] if analysis.sites else (),
        )
        section: dict[str, Any] = {"maps": self._pictures.add(stem, figure), "layers": layers}
        section["heads"] = section["head_rows"] = section["site_rows"] = None
        if analysis.scores:
            section |= {"heads": _counts(analysis.scores), "head_rows": _head_rows(analysis.scores)}
        if analysis.sites:
            section["site_rows"] = _site_rows(analysis.sites)
        return section

    def _similarity(
        self, analysis: ModelAnalysis, learnt: Mapping[str, Any], stem: str
    ) -> dict[str, Any]:
        similarity, found = analysis.similarity, learnt["similarity"]
        if similarity is None:
            return {}
        names = {"all": "All attention", "thresholded": f"Attention above {similarity.threshold:g}"}
        matrices = {names[kind]: similarity.similarity(thresholded=KINDS[kind]) for kind in KINDS}
        kinds = [found[kind] for kind in KINDS]
        return {
            "kinds": names,
            "agreements": [
                (names[kind], name, found[kind]["heads"], *_agreement(result), result["pairs"])
                for kind in KINDS
                for name, result in found[kind]["matrices"].items()
            ],
            "similarity": self._matrices(matrices, stem),
            "top_pairs": [
                (rank, *(cell for pair in both for cell in self._pair_cells(pair)))
                for rank, both in enumerate(zip_longest(*(k["top_pairs"] for k in kinds)), start=1)
            ],
            "expected_pairs": [
                (
                    both[0]["pair"],
                    *(c for p in both for c in (number(p["similarity"], 3), _rank(p))),
                )
                for both in zip(*(kind["expected_pairs"] for kind in kinds), strict=True)
            ],
        }

    def _embeddings(
        self, analysis: ModelAnalysis, learnt: Mapping[str, Any], stem: str
    ) -> dict[str, Any]:
        similarity, found = analysis.embeddings, learnt["embeddings"]
        if similarity is None:
            return {}
        return {
            "embedding_agreements": [
                (name, *_agreement(result), result["pairs"])
                for name, result in found["matrices"].items()
            ],
            "embeddings": self._matrices({"Embeddings": similarity}, stem, unit="cosine"),
            "embedding_pairs": [(pair["pair"], *_ranked(pair)) for pair in found["expected_pairs"]],
        }

    def comparison(self, sections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tables and pictures of several models side by side."""
        similar = {s["unique_name"]: s for s in sections if s["analysis"].similarity}
        marked = [s["learnt"]["sites"] for s in sections if s["learnt"]["sites"]]
        scores = {s["unique_name"]: s["analysis"].scores for s in sections}
        content: dict[str, Any] = {
            "compared_heads": [_compared_heads(name, found) for name, found in scores.items()],
            "heads": self._pictures.add("heads", heads_figure(scores)),
            "compared_sites": _compared_sites(marked) if marked else (),
        }
        if similar:
            found = {name: s["learnt"]["similarity"] for name, s in similar.items()}
            threshold = next(iter(found.values()))["threshold"]
            counted = {"all": "attention", "thresholded": f"attention above {threshold:g}"}
            rows: list[_Row] = [
                (name, counted[kind], matrix, *_agreement(one[kind]["matrices"][matrix]))
                for kind in KINDS
                for matrix in next(iter(found.values()))["all"]["matrices"]
                for name, one in found.items()
            ]
            rows += [
                (s["unique_name"], "embeddings", matrix, *_agreement(result))
                for s in sections
                if s["learnt"]["embeddings"]
                for matrix, result in s["learnt"]["embeddings"]["matrices"].items()
            ]
            alike = [one["all"] for one in found.values()]
            listed = (one["top_pairs"][:_LISTED_PAIRS] for one in alike)
            content["agreements"] = rows
            content["expected_pairs"] = [
                *(
                    (both[0]["pair"], *map(_rank, both))
                    for both in zip(*(one["expected_pairs"] for one in alike), strict=True)
                ),
                ("most similar", *(", ".join(pair["pair"] for pair in pairs) for pairs in listed)),
            ]
            matrices = {n: s["analysis"].similarity.similarity() for n, s in similar.items()}
            content["similarities"] = self._matrices(matrices, "similarities", empty=True)
        return content

    def _matrices(
        self,
        matrices: Mapping[str, NDArray[np.float64]],
        stem: str,
        *,
        unit: str = "correlation over heads",
        empty: bool = False,
    ) -> str | None:
        """A picture of the matrices beside the reference; None where all are undefined."""
        drawn = {name: m for name, m in matrices.items() if empty or np.isfinite(m).any()}
        if not drawn:
            return None
        figure = similarity_figure(
            drawn, self._reference, reference_name=self._matrix_name, unit=unit
        )
        return self._pictures.add(stem, figure)

    def _pair_cells(self, pair: Mapping[str, Any] | None) -> _Row:
        if pair is None:
            return ("–", "–", "–")
        row, column = (AMINO_ACIDS.index(letter) for letter in pair["pair"].split("–"))
        score = self._reference[row, column]
        return (pair["pair"], number(pair["similarity"], 3), f"{score:+g}" if score else "0")


def _numbers(
    title: str, models: Sequence[ModelReport], learnt: Sequence[Mapping[str, Any] | None]
) -> dict[str, Any]:
    """The numbers of the page for programs; None in the place of those that are not finite."""

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


def _metric_row(split: str, metrics: Mapping[str, float]) -> _Row:
    """Each metric beside that of the unigram baseline."""
    values = _with_losses(metrics)
    return (
        split,
        percent(values.get("accuracy")),
        percent(values.get("baseline_accuracy")),
        number(values.get("perplexity")),
        number(values.get("baseline_perplexity")),
        number(values.get("loss"), 3),
        number(values.get("baseline_loss"), 3),
        number(values.get("tokens"), 0),
    )


def _with_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, with losses filled in from the perplexities: loss = log(perplexity)."""
    filled = dict(metrics)
    for prefix in ("", "baseline_"):
        perplexity = filled.get(f"{prefix}perplexity", math.nan)
        if f"{prefix}loss" not in filled and perplexity > 0:
            filled[f"{prefix}loss"] = math.log(perplexity)
    return filled


def _counts(scores: HeadScores) -> dict[str, Any]:
    """The heads with a score, and the number of local, global and vertical ones."""
    uniform = scores.uniform
    heads = [head for head in scores.heads if math.isfinite(head.mean_distance)]
    return {
        "heads": heads,
        "local": sum(head.band_share >= 2 * uniform.band_share for head in heads),
        "global": sum(head.mean_distance >= 0.9 * uniform.mean_distance for head in heads),
        "vertical": sum(head.column_share >= 2 * uniform.column_share for head in heads),
    }


def _head_rows(scores: HeadScores) -> list[_Row]:
    def cells(head: HeadScore) -> _Row:
        shares = (head.band_share, head.column_share, head.special_share)
        return (number(head.mean_distance, 1), *(percent(share, 1) for share in shares))

    kinds = (
        ("most local", scores.most_local(_LISTED_HEADS)),
        ("most global", scores.most_global(_LISTED_HEADS)),
        ("most vertical", scores.most_vertical(_LISTED_HEADS)),
    )
    rows: list[_Row] = [
        (kind, head.label, *cells(head)) for kind, listed in kinds for head in listed
    ]
    return [*rows, ("uniform attention", "", *cells(scores.uniform)[:3], "–")]


def _site_rows(scores: SiteScores) -> list[_Row]:
    return [
        (
            f"{site.residue}{site.site}",
            site.head,
            percent(site.share),
            f"{number(site.enrichment)}×",
            f"{number(site.mean_enrichment)}×",
            f"{site.rank} of {site.residues}",
        )
        for site in scores.sites
    ]


def _compared_heads(name: str, scores: HeadScores) -> _Row:
    found = _counts(scores)
    heads, uniform = found["heads"], scores.uniform
    return (
        name,
        f"{len(heads)} of {len(scores.heads)}",
        number(median(head.mean_distance for head in heads) if heads else None, 1),
        number(uniform.mean_distance, 1),
        percent(median(head.band_share for head in heads) if heads else None, 1),
        percent(uniform.band_share, 1),
        found["local"],
    )


def _compared_sites(marked: Sequence[Mapping[str, Any]]) -> list[_Row]:
    rows: list[_Row] = [
        (
            f"{both[0]['residue']}{both[0]['site']}",
            *(
                f"{s['enrichment']:.2f}× ({s['head']}), {s['rank']} of {s['residues']}"
                for s in both
            ),
        )
        for both in zip(*(one["sites"] for one in marked), strict=False)
    ]
    together = (
        f"{one['enrichment']:.2f}× ({one['head']}), p = {number(one['same_letters_p_value'], 4)}, "
        f"of any letters {one['p_value']:.4f}"
        for one in marked
    )
    rows.append(("median residue", *(f"{one['typical']:.2f}×" for one in marked)))
    return [*rows, ("together", *together)]


def _agreement(result: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Pearson correlation, its p-value, Spearman correlation, its p-value."""
    return (
        number(result["pearson"], 3),
        number(result["p_value"], 4),
        number(result["spearman"], 3),
        number(result["spearman_p_value"], 4),
    )


def _ranked(pair: Mapping[str, Any]) -> tuple[str, str]:
    return number(pair["similarity"], 3), _rank(pair)


def _rank(entry: Mapping[str, Any], of: str = "of") -> str:
    return "–" if entry["rank"] is None else f"{entry['rank']} of {entry[of]}"


def _spread(count: int, most: int) -> list[int]:
    """Numbers from 1 to `count`, at most `most` of them, evenly spread, both ends included."""
    if count <= most:
        return list(range(1, count + 1))
    return sorted({1 + round(i * (count - 1) / (most - 1)) for i in range(most)})


def _slug(name: str) -> str:
    """A file name that every system takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40] or "model"
