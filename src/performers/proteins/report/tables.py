"""Sentences, numbers and cells of the report, as text."""

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
from performers.proteins.reading.head_scores import HeadScores
from performers.proteins.reading.residues import ProteinReading

if TYPE_CHECKING:
    from performers.proteins.report.page import ModelReport

_FEWEST_RESIDUES = 30
_STRETCH = 15


def number(value: object, digits: int = 2, unit: str = "f") -> str:
    """A number with a fixed count of decimals; a dash where it is missing or not finite."""
    if not isinstance(value, Real) or not math.isfinite(value):
        return "–"
    return f"{float(value):,.{digits}{unit}}"


def percent(value: object, digits: int = 1) -> str:
    """A share of 1 in percent; a dash where it is missing or not finite."""
    return number(value, digits, "%")


def sentences(model: ModelReport) -> list[str]:
    """The three sentences that open the page."""
    lengths = [len(reading.record.sequence) for reading in model.proteins]
    of = f" of the {model.available:,}" if model.available > len(lengths) else ""
    span = " to ".join(f"{length:,}" for length in sorted({min(lengths), max(lengths)}))
    shown = (
        f"This page shows {len(lengths):,}{of} protein{'s' * (len(lengths) > 1)} "
        f"({sum(lengths):,} amino acids; {span} long) as the model {shortened(model.name)} "
        "reads them."
    )
    guessing = _guessing(next(iter(model.metrics.values())), model.is_causal)
    return [shown, guessing, _standing_out(model.proteins)]


def _guessing(metrics: Mapping[str, float], is_causal: bool) -> str:
    accuracy, baseline = metrics["accuracy"], metrics["baseline_accuracy"]
    task = "Seeing only what comes before a residue" if is_causal else "Of residues hidden from it"
    error = math.sqrt(accuracy * (1 - accuracy) / metrics["tokens"])
    verdict = "no better than" if accuracy - baseline < 2 * error else "against"
    return (
        f"{task}, it guesses {percent(accuracy)} right, {verdict} {percent(baseline)} for always "
        "naming the commonest amino acid; it is as unsure as if it chose among "
        f"{number(metrics['perplexity'], 1)} equally likely amino acids "
        f"({number(metrics['baseline_perplexity'], 1)} by frequencies alone)."
    )


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


def head_cells(scores: HeadScores) -> list[list[object]]:
    """Cells of a model's heads: their kinds, and medians, each beside uniform attention.

    Returns:
        One list; none where no head attends to residues.
    """
    defined = [head for head in scores.heads if math.isfinite(head.mean_distance)]
    if not defined:
        return []
    distance = median(head.mean_distance for head in defined)
    near = median(head.band_share for head in defined)
    return [
        [
            len(scores.heads),
            *(len(found) for found in scores.kinds().values()),
            f"{number(distance, 1)} ({number(scores.uniform.mean_distance, 1)})",
            f"{percent(near)} ({percent(scores.uniform.band_share)})",
        ]
    ]


def scored(pair: str, reference: NDArray[np.float64]) -> str:
    """A pair such as D–E with its score in a substitution matrix (20, 20)."""
    row, column = (AMINO_ACIDS.index(letter) for letter in pair.split("–"))
    score = reference[row, column]
    return f"{pair} ({f'{score:+g}' if score else '0'})"


def notes(learnt: Sequence[Mapping[str, Any]]) -> list[str]:
    """Reasons for missing or partial comparisons."""
    found: list[str] = []
    for numbers in learnt:
        kinds = [(numbers["similarity"] or {}).get(kind) for kind in ("all", "thresholded")]
        for part in filter(None, kinds):
            found += part["notes"]
        for part in filter(None, [kinds[0], numbers["embeddings"]]):
            found += [r["note"] for r in part["matrices"].values() if r["note"]]
    return list(dict.fromkeys(found))
