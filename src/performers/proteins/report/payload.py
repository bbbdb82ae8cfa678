"""Proteins and attention maps in the small form in which the page carries them."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from performers.app.figures import shortened
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.residues import ProteinReading

LEVELS = "".join(c for c in map(chr, range(35, 127)) if c not in "&<>\\")
"""Probabilities as letters, on a square-root scale: about one percentage point apart at most."""
UNKNOWN = "!"

HEAD_CHARACTERS = 450_000
"""Room on the page for the attention maps of all models."""

_NAME, _DESCRIPTION = 60, 160
_HEADER_LABEL = re.compile(r"(?:^|\s)(\w{1,20})=((?:(?!\s\w{1,20}=).)+)")
_LABELS_AT_MOST = 3
_VALUES_AT_MOST = 6
JOINED = ("other", "none")
"""Labels that stand for rare ones and for none."""


def protein_rows(readings: Sequence[ProteinReading]) -> list[dict[str, Any]]:
    """Names and numbers of proteins, for the map and the table."""
    return [
        {
            "name": shortened(reading.record.name, _NAME),
            "description": shortened(reading.record.description, _DESCRIPTION),
            "length": len(reading.record.sequence),
            "surprise": round(reading.surprise, 4),
            "accuracy": round(reading.accuracy, 4),
        }
        for reading in readings
    ]


def header_labels(records: Sequence[ProteinRecord]) -> dict[str, list[str]]:
    """Labels that headers carry as ``key=value``, such as ``OS=Homo sapiens``.

    Returns:
        Key to a label for each record, of at most three keys that half of the records have and
        that tell some of them apart. Rare labels are joined into "other".
    """
    found = [dict(_HEADER_LABEL.findall(record.description)) for record in records]
    keys = dict.fromkeys(key for labels in found for key in labels if key != "sites")
    labels = {}
    for key in keys:
        values = [shortened(entry.get(key, "").strip(), 40) for entry in found]
        distinct = set(filter(None, values))
        if 2 * sum(map(bool, values)) >= len(values) and 1 < len(distinct) < len(values):
            labels[key] = grouped(values)
    return dict(list(labels.items())[:_LABELS_AT_MOST])


def grouped(values: Sequence[str]) -> list[str]:
    """The commonest values as they are, the others as "other", the empty ones as "none"."""
    counts = Counter(filter(None, values))
    rare = {value for value, _ in counts.most_common()[_VALUES_AT_MOST:]}
    other, none = JOINED
    return [other if value in rare else value or none for value in values]


def track(reading: ProteinReading) -> dict[str, str]:
    """The guesses of one protein: sequence, its probabilities, likeliest others and theirs."""
    return {
        "sequence": reading.record.sequence,
        "own": _levels(reading.probability),
        "others": "".join(AMINO_ACIDS[index] for index in reading.substitutes.ravel()),
        "shares": _levels(reading.substitute_probability.ravel()),
    }


def tracked(readings: Sequence[ProteinReading], first: str, most: int) -> list[int]:
    """Numbers of the proteins whose guesses fit into `most` residues, the one named first."""
    order = sorted(range(len(readings)), key=lambda n: readings[n].record.name != first)
    kept = []
    for number in order:
        length = len(readings[number].record.sequence)
        if length <= most:
            kept.append(number)
            most -= length
    return sorted(kept)


def heads(analysis: ModelAnalysis, room: int) -> dict[str, Any]:
    """The attention maps of a model as grey PNG images, binned so that they fit into `room`.

    The grey of a cell is ``255 sqrt(weight / max)``, the weight being the mean over its bin. A
    head's colours end at `limit`, the weight that all but ``length / 2`` cells stay below, or ten
    times uniform attention if that is more, which leaves a head that attends evenly pale.
    """
    maps = [np.nan_to_num(np.clip(head, 0.0, None)) for layer in analysis.maps for head in layer]
    names = [(i + 1, j + 1) for i, layer in enumerate(analysis.maps) for j in range(len(layer))]
    step, images = 1, [_grey(head) for head in maps]
    while (size := sum(map(len, images))) > room and step < len(analysis.labels):
        step = max(step + 1, math.floor(step * math.sqrt(size / room)))
        images = [_grey(_binned(head, step)) for head in maps]
    notes: dict[tuple[int, int], list[str]] = {}
    for kind, found in analysis.scores.kinds().items() if analysis.scores else ():
        for score in found:
            notes.setdefault((score.layer, score.head), []).append(kind)
    return {
        "protein": shortened(analysis.protein.name, _NAME),
        "residues": analysis.labels,
        "step": step,
        "sites": [site["site"] for site in analysis.sites["sites"]] if analysis.sites else [],
        "heads": [
            {
                "layer": layer,
                "head": head,
                "note": ", ".join(notes.get((layer, head), ())),
                "max": float(f"{_binned(weights, step).max():.4g}"),
                "limit": float(f"{_limit(_binned(weights, step)):.4g}"),
                "image": image,
            }
            for (layer, head), weights, image in zip(names, maps, images, strict=True)
        ],
    }


def _levels(shares: NDArray[np.float32]) -> str:
    last = len(LEVELS) - 1
    numbers = np.rint(last * np.sqrt(np.clip(np.nan_to_num(shares), 0.0, 1.0))).astype(int)
    return "".join(
        LEVELS[number] if known else UNKNOWN
        for number, known in zip(numbers, np.isfinite(shares), strict=True)
    )


def _binned(weights: NDArray[np.floating[Any]], step: int) -> NDArray[np.floating[Any]]:
    starts = np.arange(0, len(weights), step)
    sizes = np.diff([*starts, len(weights)])
    sums = np.add.reduceat(np.add.reduceat(weights, starts, axis=0), starts, axis=1)
    return np.asarray(sums / np.outer(sizes, sizes))


def _limit(weights: NDArray[np.floating[Any]]) -> float:
    length = len(weights)
    return max(float(np.quantile(weights, 1 - 0.5 / length)), 10.0 / length)


def _grey(weights: NDArray[np.floating[Any]]) -> str:
    scale = max(float(weights.max()), 1e-12)
    pixels = np.rint(255 * np.sqrt(weights / scale)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
