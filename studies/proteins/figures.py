"""Figures of what models learnt: attention maps, amino-acid similarity and head scores.

Each function returns a matplotlib `Figure` drawn without pyplot, so that nothing global is touched.
Colours follow Okabe and Ito (2008) for categories and perceptually uniform maps for values; both
survive colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
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
from performers.proteins.reading.head_scores import HeadScores
from performers.proteins.report.charts import RESIDUE_ORDER

_GROUP_SIZES = (1, 5, 4, 3, 4, 3)
_INCHES_A_LETTER = 0.085
# White to dark blue, lightness falling evenly: nothing attended stays white on paper.
_SEQUENTIAL = LinearSegmentedColormap.from_list(
    "attention", ["#ffffff", "#dbe9f6", "#9ec9e2", "#4a98c9", "#1764ab", "#08306b", "#041a3d"]
)
# Orange, white, blue; grey where undefined.
_DIVERGING = LinearSegmentedColormap.from_list(
    "similarity", ["#8c2d04", "#d95f0e", "#fdbe85", "#ffffff", "#9ecae1", "#3182bd", "#08306b"]
).with_extremes(bad="#d9d9d9")


@styled
def attention_maps_figure(
    attentions: Sequence[NDArray[np.floating[Any]]],
    labels: str,
    *,
    title: str,
    scores: HeadScores | None = None,
) -> Figure:
    """Draw the attention of every head, layers from top to bottom, heads from left to right.

    The colour of a cell is the attention from the residue of its row to that of its column, on a
    square-root scale of the head's own, so that heads of different sharpness can be read side by
    side. It ends at the weight that all but `length`/2 cells stay below, or at ten times uniform
    attention if that is more, which leaves a head that attends evenly pale.

    Args:
        attentions: One array (heads, length, length) per layer; weights below 0 are drawn as 0.
        labels: The `length` letters of the residues.
        title: Heading of the figure.
        scores: Scores of these heads; each panel then shows its mean distance and band share.

    Raises:
        ValueError: `attentions` is empty or a shape does not fit `labels`.
    """
    length = len(labels)
    if not attentions or length == 0:
        raise ValueError("attentions must hold at least one layer of at least one residue")
    for number, weights in enumerate(attentions):
        if weights.ndim != 3 or weights.shape[1:] != (length, length):
            raise ValueError(
                f"attentions[{number}] must be (heads, {length}, {length}) for {length} "
                f"labels, got {weights.shape}"
            )
    rows, columns = len(attentions), max(weights.shape[0] for weights in attentions)
    # Sizes in inches: a layout engine takes seconds for a hundred panels.
    panel = min(2.4, max(1.45, 8.6 / columns))
    left, top = 0.58, 0.65
    right, bottom = left + columns * (panel + 0.1) - 0.1, top + rows * (panel + 0.27) - 0.27
    width, tall = right + 0.85, bottom + 0.58
    figure = new_figure((width, tall), arrange=False)
    place = {"left": left / width, "right": right / width}
    place |= {"top": 1 - top / tall, "bottom": 1 - bottom / tall}
    place |= {"wspace": 0.1 / panel, "hspace": 0.27 / panel}
    panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=place)
    for row, (line, weights) in enumerate(zip(panels, attentions, strict=True)):
        for ax in line[len(weights) :]:
            ax.set_axis_off()
        for column, (ax, drawn) in enumerate(zip(line, weights, strict=False)):
            drawn = np.nan_to_num(np.clip(np.asarray(drawn, dtype=float), 0.0, None))
            limit = max(float(np.quantile(drawn, 1 - 0.5 / length)), 10.0 / length)
            # Each map in units of its own limit: one colour bar then serves all panels.
            image = ax.imshow(drawn / limit, cmap=_SEQUENTIAL, norm=PowerNorm(0.5, 0.0, 1.0))
            heading = _head_heading(row + 1, column + 1, scores)
            ax.set_title(heading, fontsize=7.5, pad=3)
            _residue_ticks(ax, labels, panel)
            ax.tick_params(labelleft=column == 0, labelbottom=row == rows - 1)
            ax.spines[:].set(visible=True, linewidth=0.6)
    height = min(bottom - top, 3.0)
    bar = figure.colorbar(
        image,
        cax=figure.add_axes(
            ((right + 0.15) / width, 1 - (top + height) / tall, 0.13 / width, height / tall)
        ),
    )
    bar.set_ticks([0.0, 0.05, 0.2, 0.5, 1.0], labels=["0", ".05", ".2", ".5", "1"])
    bar.set_label("attention / end of the head's scale", fontsize=7.5)
    bar.ax.tick_params(labelsize=7, length=2)
    bar.outline.set_visible(False)
    middle = (left + right) / 2 / width
    figure.supxlabel("attended residue (key)", x=middle, y=0.12 / tall, fontsize=9, color=INK)
    query = {"x": 0.08 / width, "y": 1 - (top + bottom) / 2 / tall, "ha": "left"}
    figure.supylabel("attending residue (query)", fontsize=9, color=INK, **query)
    figure.suptitle(
        shortened(title, 90), x=middle, y=1 - 0.3 / tall, va="bottom", fontsize=11, color=INK
    )
    return figure


def _head_heading(layer: int, head: int, scores: HeadScores | None) -> str:
    for score in () if scores is None else scores.heads:
        if (score.layer, score.head) == (layer, head) and math.isfinite(score.mean_distance):
            near = f"{score.band_share:.0%} ≤ {scores.band}" if scores else ""
            return f"{score.label} · {score.mean_distance:.0f} res. · {near}"
    return f"{layer}.{head}"


def _residue_ticks(ax: Any, labels: str, panel: float) -> None:
    """Letters where a panel of so many inches has room for them, else residue numbers from 1."""
    if len(labels) * _INCHES_A_LETTER <= panel:
        places, names, size = list(range(len(labels))), list(labels), 5.5
    else:
        ticks = MaxNLocator(4, integer=True).tick_values(1, len(labels))
        places = [int(tick) - 1 for tick in ticks if 1 <= tick <= len(labels)]
        names, size = [str(place + 1) for place in places], 6.5
    ax.set_xticks(places, names, fontsize=size)
    ax.set_yticks(places, names, fontsize=size)
    ax.tick_params(length=2, pad=1.5)


@styled
def similarity_figure(
    similarities: Mapping[str, NDArray[np.float64]],
    reference: NDArray[np.float64],
    reference_name: str,
) -> Figure:
    """Draw similarity matrices of the amino acids beside a reference, all in one order.

    The order is `RESIDUE_ORDER`; lines part its physicochemical groups. Blue is similar, orange
    is not, white is 0. The diagonal, which is not compared, is left grey, and so is what is NaN.

    Args:
        similarities: Heading to (20, 20) similarities in the order of `AMINO_ACIDS`.
        reference: (20, 20) scores in the order of `AMINO_ACIDS`.
        reference_name: Heading of the reference.
    """
    panels: list[tuple[str, NDArray[np.float64], float | None, str]] = [
        (name, matrix, 1.0, "correlation over heads") for name, matrix in similarities.items()
    ]
    panels.append((reference_name, reference, None, "score"))
    figure = new_figure((3.7 * len(panels), 4.0))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    order = [AMINO_ACIDS.index(letter) for letter in RESIDUE_ORDER]
    for ax, (name, matrix, limit, meaning) in zip(axes, panels, strict=True):
        drawn = np.array(matrix, dtype=float)[np.ix_(order, order)]
        np.fill_diagonal(drawn, np.nan)
        limit = float(np.nanmax(np.abs(drawn))) if limit is None else limit
        image = ax.imshow(drawn, cmap=_DIVERGING, vmin=-limit, vmax=limit)
        ax.set_xticks(range(len(order)), RESIDUE_ORDER)
        ax.set_yticks(range(len(order)), RESIDUE_ORDER)
        ax.tick_params(length=0, labeltop=True, labelbottom=False, pad=2)
        for edge in np.cumsum(_GROUP_SIZES)[:-1] - 0.5:
            ax.axhline(edge, color="#555555", linewidth=0.6)
            ax.axvline(edge, color="#555555", linewidth=0.6)
        ax.spines[:].set(visible=True, linewidth=0.6)
        ax.set_title(shortened(name))
        bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.75, aspect=30, pad=0.03)
        bar.set_label(meaning, fontsize=8)
        bar.locator = MaxNLocator(4, integer=limit > 1)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    return figure


@styled
def heads_figure(scores: Mapping[str, HeadScores]) -> Figure:
    """Draw mean distance and share near the diagonal of every head against its layer.

    A dot stands for each head, the models side by side within a layer, and a dotted line for the
    scores of uniform attention.
    """
    figure = new_figure((9.0, 3.6))
    distance, band = figure.subplots(1, 2)
    spread = 0.6 / len(scores)
    entries = []
    for number, (colour, (name, found)) in enumerate(
        zip(cycle(PALETTE), scores.items(), strict=False)
    ):
        heads = [head for head in found.heads if math.isfinite(head.mean_distance)]
        shift = (number - (len(scores) - 1) / 2) * spread
        layers = np.array([head.layer for head in heads]) + shift
        for ax, values, uniform in (
            (distance, [head.mean_distance for head in heads], found.uniform.mean_distance),
            (band, [head.band_share for head in heads], found.uniform.band_share),
        ):
            ax.plot(layers, values, ls="", marker="o", ms=4, color=colour, alpha=0.75, mew=0)
            ax.axhline(uniform, color=MUTED, linewidth=1.0, linestyle=":")
        entries.append((name, Line2D([], [], ls="", marker="o", color=colour)))
    half_width = next(iter(scores.values())).band
    for ax, label in (
        (distance, "mean distance of attention (residues)"),
        (band, f"share of attention within ±{half_width} residues"),
    ):
        ax.set_xlabel("layer")
        ax.set_ylabel(label)
        # Heads that look alike lie close together: the margin matplotlib takes would cut them.
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.set_xlim(0.5, 0.5 + max(head.layer for found in scores.values() for head in found.heads))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
    band.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    entries.append(("uniform attention", Line2D([], [], color=MUTED, lw=1.0, ls=":")))
    add_legend(figure, entries, "outside upper center", 4)
    return figure
