"""Sentences and rows of tables of the report; a row or a column for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from performers.app.figures import shortened
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.learnt import KINDS
from performers.proteins.reading.residues import ProteinReading

if TYPE_CHECKING:
    from performers.proteins.report.page import ModelReport

Row = tuple[object, ...]

_FEWEST_RESIDUES = 30
_STRETCH = 15
_LISTED_PAIRS = 6


def number(value: object, digits: int = 2) -> str:
    """A number with a fixed count of decimals; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{float(value):,.{digits}f}"


def percent(value: object, digits: int = 1) -> str:
    """A share of 1 in percent; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{100 * float(value):.{digits}f}%"


def with_losses(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics, with losses filled in from the perplexities: loss = log(perplexity)."""
    filled = dict(metrics)
    for prefix in ("", "baseline_"):
        perplexity = filled.get(f"{prefix}perplexity", math.nan)
        if f"{prefix}loss" not in filled and perplexity > 0:
            filled[f"{prefix}loss"] = math.log(perplexity)
    return filled


def sentences(model: ModelReport, learnt: Mapping[str, Any] | None) -> list[str]:
    """The three sentences that open the page, as far as there are numbers for them."""
    told = []
    if model.proteins:
        lengths = [len(reading.record.sequence) for reading in model.proteins]
        of = f" of the {model.available:,}" if model.available > len(lengths) else ""
        span = " to ".join(f"{length:,}" for length in sorted({min(lengths), max(lengths)}))
        told.append(
            f"This page shows {len(lengths):,}{of} protein{'s' * (len(lengths) > 1)} "
            f"({sum(lengths):,} amino acids; {span} long) as the model {shortened(model.name)} "
            "reads them."
        )
    if model.metrics:
        told.append(_guessing(next(iter(model.metrics.values())), model.is_causal))
    if model.proteins:
        told.append(_standing_out(model.proteins))
    elif learnt and learnt["similarity"]:
        pair = next(iter(learnt["similarity"]["all"]["top_pairs"]), None)
        if pair:
            told.append(f"The amino acids that its attention treats most alike are {pair['pair']}.")
    return told


def _guessing(metrics: Mapping[str, float], is_causal: bool) -> str:
    accuracy, baseline = (metrics.get(name, math.nan) for name in _ACCURACIES)
    task = "Seeing only what comes before a residue" if is_causal else "Of residues hidden from it"
    error = math.sqrt(max(accuracy * (1 - accuracy), 0.0) / max(metrics.get("tokens", 1), 1))
    verdict = "no better than" if accuracy - baseline < 2 * error else "against"
    text = (
        f"{task}, it guesses {percent(accuracy)} right, {verdict} {percent(baseline)} for always "
        "naming the commonest amino acid"
    )
    if "perplexity" in metrics and "baseline_perplexity" in metrics:
        text += (
            f"; it is as unsure as if it chose among {number(metrics['perplexity'], 1)} equally "
            f"likely amino acids ({number(metrics['baseline_perplexity'], 1)} by frequencies alone)"
        )
    return text + "."


_ACCURACIES = ("accuracy", "baseline_accuracy")


def _standing_out(readings: Sequence[ProteinReading]) -> str:
    guessed = [r for r in readings if math.isfinite(r.surprise)]
    long = [r for r in guessed if len(r.record.sequence) >= _FEWEST_RESIDUES] or guessed
    ranked = sorted(long, key=lambda reading: reading.surprise)
    if not ranked:
        return "None of the residues is one of the twenty amino acids, so none could be guessed."
    if len(ranked) > 1:
        low, high = (
            f"{shortened(r.record.name, 40)} ({percent(r.accuracy, 0)} guessed right, surprise "
            f"{r.surprise:.2f} bits)"
            for r in (ranked[0], ranked[-1])
        )
        return f"The most familiar protein to it is {low}, the strangest {high}."
    bits = -np.log2(ranked[0].probability)
    width = min(_STRETCH, len(bits))
    means = np.convolve(np.nan_to_num(bits, nan=math.log2(20)), np.full(width, 1 / width), "valid")
    start = int(means.argmin())
    return (
        f"It guesses {percent(ranked[0].accuracy, 0)} of this protein's residues right, and the "
        f"stretch it knows best is residues {start + 1} to {start + width}."
    )


class Tables:
    """Rows of the page's tables, over all models.

    Args:
        names: Names of the models, each once.
        models: The models.
        learnt: What was read from each; see `learnt_numbers`.
        reference: Scores (20, 20) of the substitution matrix that is shown.
    """

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[ModelReport],
        learnt: Sequence[Mapping[str, Any] | None],
        reference: NDArray[np.float64],
    ) -> None:
        self._models = list(zip(names, models, strict=True))
        self._learnt = [(n, found) for n, found in zip(names, learnt, strict=True) if found]
        self._reference = reference

    def metrics(self) -> list[Row]:
        """Accuracy, perplexity and loss of each model and split, each beside its baseline."""
        rows: list[Row] = []
        for name, model in self._models:
            for split, given in model.metrics.items():
                values = with_losses(given)
                cells = [
                    shown(values.get(prefix + metric), digits)
                    for metric, shown, digits in _SHOWN
                    for prefix in ("", "baseline_")
                ]
                rows.append((name, split, *cells, number(values.get("tokens"), 0)))
        return rows

    def settings(self) -> list[Row]:
        """Settings, a column for each model."""
        keys = dict.fromkeys(str(key) for _, model in self._models for key in model.settings)
        every = [{str(k): v for k, v in model.settings.items()} for _, model in self._models]
        return [(key, *(settings.get(key, "–") for settings in every)) for key in keys]

    def heads(self) -> list[Row]:
        """Medians over the heads of each model, each beside uniform attention; kinds of heads."""
        rows: list[Row] = []
        for name, model in self._models:
            scores = model.analysis.scores if model.analysis else None
            if scores is None:
                continue
            defined = [head for head in scores.heads if math.isfinite(head.mean_distance)]
            if not defined:
                continue
            distance = median(head.mean_distance for head in defined)
            near = median(head.band_share for head in defined)
            rows.append(
                (
                    name,
                    len(scores.heads),
                    *(len(found) for found in scores.kinds().values()),
                    f"{number(distance, 1)} ({number(scores.uniform.mean_distance, 1)})",
                    f"{percent(near)} ({percent(scores.uniform.band_share)})",
                )
            )
        return rows

    def sites(self) -> list[Row]:
        """Attention that each known site receives, for each model."""
        return [
            (
                name,
                f"{site['residue']}{site['site']}",
                site["head"],
                percent(site["share"]),
                f"{number(site['enrichment'])}×",
                f"{site['rank']} of {site['residues']}",
            )
            for name, found in self._learnt
            if found["sites"]
            for site in found["sites"]["sites"]
        ]

    def agreements(self) -> list[Row]:
        """Correlation of each similarity with each substitution matrix."""
        rows: list[Row] = []
        for name, found in self._learnt:
            parts = dict[str, Mapping[str, Any]]()
            if similarity := found["similarity"]:
                above = f"attention above {similarity['threshold']:g}"
                titles = ("attention", above)
                parts |= {t: similarity[kind] for t, kind in zip(titles, KINDS, strict=True)}
            if found["embeddings"]:
                parts["input vectors"] = found["embeddings"]
            rows += [
                (
                    *(name, source, matrix, number(result["pearson"], 3)),
                    *(number(result["p_value"], 4), number(result["spearman"], 3)),
                    *(number(result["spearman_p_value"], 4), result["pairs"]),
                )
                for source, part in parts.items()
                for matrix, result in part["matrices"].items()
            ]
        return rows

    def pairs(self) -> list[Row]:
        """The pairs most alike, with the score of the matrix, and the rank of expected ones."""
        rows: list[Row] = []
        for name, found in self._learnt:
            sources = {"attention": (found["similarity"] or {}).get("all")}
            sources["input vectors"] = found["embeddings"]
            for source, part in sources.items():
                if part is None:
                    continue
                top = (self._scored(pair["pair"]) for pair in part["top_pairs"][:_LISTED_PAIRS])
                ranks = (
                    f"{pair['pair']} {'–' if pair['rank'] is None else pair['rank']}"
                    for pair in part["expected_pairs"]
                )
                rows.append((name, source, ", ".join(top) or "–", ", ".join(ranks)))
        return rows

    def notes(self) -> list[str]:
        """Reasons for missing or partial comparisons."""
        notes = []
        for _, found in self._learnt:
            similarity = found["similarity"] or {}
            for kind in KINDS:
                notes += similarity.get(kind, {}).get("notes", [])
            parts = [similarity.get("all"), found["embeddings"]]
            notes += [r["note"] for p in parts if p for r in p["matrices"].values() if r["note"]]
        return list(dict.fromkeys(notes))

    def _scored(self, pair: str) -> str:
        row, column = (AMINO_ACIDS.index(letter) for letter in pair.split("–"))
        score = self._reference[row, column]
        return f"{pair} ({f'{score:+g}' if score else '0'})"


_SHOWN = (("accuracy", percent, 2), ("perplexity", number, 2), ("loss", number, 3))
