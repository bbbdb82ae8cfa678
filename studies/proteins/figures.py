"""Figures of what models learnt: attention maps, amino-acid similarity and head scores.

Colours follow Okabe and Ito (2008) for categories and perceptually uniform maps for values; both
survive colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np
import vl_convert
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from performers.app.figures import (
    INK,
    MUTED,
    PALETTE,
    add_legend,
    new_figure,
    shortened,
    styled,
)
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.head_scores import HeadScores
from performers.proteins.reading.learnt import MATRICES
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.report.charts import similarity_chart

# White to dark blue, lightness falling evenly: nothing attended stays white on paper.
_SEQUENTIAL = LinearSegmentedColormap.from_list(
    "attention", ["#ffffff", "#dbe9f6", "#9ec9e2", "#4a98c9", "#1764ab", "#08306b", "#041a3d"]
)


@styled
def attention_maps_figure(found: ModelAnalysis, title: str) -> Figure:
    """Draw the attention of every head, layers from top to bottom, heads from left to right.

    The colour of a cell is the attention from the residue of its row to that of its column, on a
    square-root scale of the head's own, so that heads of different sharpness can be read side by
    side. It ends at the weight that all but half as many cells as there are residues stay below, or
    at ten times uniform attention if that is more, which leaves a head that attends evenly pale.
    A panel's heading has the head's mean distance and its share of attention in the band.
    """
    length, rows, columns = len(found.labels), len(found.maps), len(found.maps[0])
    # Sizes in inches: a layout engine takes seconds for a hundred panels.
    panel = min(2.4, max(1.45, 8.6 / columns))
    width, tall = columns * (panel + 0.1) + 1.33, rows * (panel + 0.27) + 0.96
    figure = new_figure((width, tall), arrange=False)
    edges = {"left": 0.58 / width, "right": 1 - 0.85 / width}
    edges |= {"bottom": 0.58 / tall, "top": 1 - 0.65 / tall}
    gaps = {"wspace": 0.1 / panel, "hspace": 0.27 / panel}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=edges | gaps)
    scores = {} if found.scores is None else {score.label: score for score in found.scores.heads}
    places = MaxNLocator(4, integer=True).tick_values(1, length)
    ticks = [int(place) for place in places if 1 <= place <= length]
    for (row, column), ax in np.ndenumerate(panels):
        weights = np.nan_to_num(np.clip(found.maps[row][column].astype(float), 0.0, None))
        limit = max(float(np.quantile(weights, 1 - 0.5 / length)), 10.0 / length)
        # Each map in units of its own limit: one colour bar then serves all panels.
        image = ax.imshow(weights / limit, cmap=_SEQUENTIAL, norm=PowerNorm(0.5, 0.0, 1.0))
        heading = f"{row + 1}.{column + 1}"
        score = scores.get(heading)
        if found.scores and score and math.isfinite(score.mean_distance):
            near = f"{score.band_share:.0%} ≤ {found.scores.band}"
            heading = f"{heading} · {score.mean_distance:.0f} res. · {near}"
        ax.set_title(heading, fontsize=7.5, pad=3)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks([tick - 1 for tick in ticks], ticks, fontsize=6.5)
        ax.tick_params(labelleft=column == 0, labelbottom=row == rows - 1, length=2, pad=1.5)
        ax.spines[:].set(visible=True, linewidth=0.6)
    height = min(tall - 1.23, 3.0)
    place = (1 - 0.7 / width, 1 - (0.65 + height) / tall, 0.13 / width, height / tall)
    bar = figure.colorbar(image, cax=figure.add_axes(place))
    bar.set_ticks([0.0, 0.05, 0.2, 0.5, 1.0], labels=["0", ".05", ".2", ".5", "1"])
    bar.set_label("attention / end of the head's scale", fontsize=7.5)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    texts: dict[str, Any] = {"color": INK, "fontsize": 9}
    figure.supxlabel("attended residue (key)", y=0.12 / tall, **texts)
    figure.supylabel("attending residue (query)", x=0.08 / width, ha="left", **texts)
    figure.suptitle(shortened(title, 90), y=1 - 0.3 / tall, va="bottom", color=INK, fontsize=11)
    return figure


def similarity_picture(similarities: Mapping[str, NDArray[np.float64]]) -> bytes:
    """Draw similarity matrices of the amino acids beside a substitution matrix, as PNG.

    Args:
        similarities: Heading to (20, 20) similarities in the order of `AMINO_ACIDS`.
    """
    reference = load_reference_matrix(MATRICES[0], AMINO_ACIDS)
    unit = "correlation over heads"
    charts = [
        *(similarity_chart(matrix, x, unit=unit, limit=1.0) for x, matrix in similarities.items()),
        similarity_chart(reference, MATRICES[0], unit="score"),
    ]
    panels = [{**chart, "width": chart["height"]} for chart in charts]
    scales = {"resolve": {"scale": {"color": "independent"}}}
    return vl_convert.vegalite_to_png({"background": "white", "hconcat": panels, **scales}, scale=2)


@styled
def heads_figure(scores: Mapping[str, HeadScores]) -> Figure:
    """Draw mean distance and share near the diagonal of every head against its layer.

    A dot stands for each head, the models side by side within a layer, and a dotted line for the
    scores of uniform attention.
    """
    figure = new_figure((9.0, 3.6))
    width = next(iter(scores.values())).band
    entries = [
        (name, Line2D([], [], ls="", marker="o", color=colour))
        for name, colour in zip(scores, cycle(PALETTE), strict=False)
    ]
    for ax, field, label in zip(
        figure.subplots(1, 2),
        ("mean_distance", "band_share"),
        (
            "mean distance of attention (residues)",
            f"share of attention within ±{width} residues",
        ),
        strict=True,
    ):
        for number, (found, (_, dot)) in enumerate(zip(scores.values(), entries, strict=True)):
            heads = [head for head in found.heads if math.isfinite(head.mean_distance)]
            shift = (number - (len(scores) - 1) / 2) * 0.6 / len(scores)
            layers = [head.layer + shift for head in heads]
            values = [getattr(head, field) for head in heads]
            ax.plot(layers, values, "o", ms=4, color=dot.get_color(), alpha=0.75, mew=0)
            ax.axhline(getattr(found.uniform, field), color=MUTED, linewidth=1.0, linestyle=":")
        ax.set_xlabel("layer")
        ax.set_ylabel(label)
        # Heads that look alike lie close together: the margin matplotlib takes would cut them.
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.set_xlim(0.5, 0.5 + max(head.layer for found in scores.values() for head in found.heads))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
    ax.yaxis.set_major_formatter(PercentFormatter(1.0))
    entries.append(("uniform attention", Line2D([], [], color=MUTED, lw=1.0, ls=":")))
    add_legend(figure, entries, "outside upper center", 4)
    return figure
