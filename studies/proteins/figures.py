"""Figures of what models learnt: amino-acid similarity and head scores.

Each function returns a matplotlib `Figure` drawn without pyplot, so that nothing global is touched.
Colours follow Okabe and Ito (2008) for categories and perceptually uniform maps for values; both
survive colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from performers.app.figures import MUTED, PALETTE, add_legend, new_figure, shortened, styled
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.head_scores import HeadScores
from performers.proteins.report.charts import RESIDUE_ORDER

_GROUP_SIZES = (1, 5, 4, 3, 4, 3)


@styled
def similarity_figure(
    similarities: Mapping[str, NDArray[np.float64]],
    reference: NDArray[np.float64],
    *,
    reference_name: str = "BLOSUM62",
    unit: str = "correlation over heads",
    title: str | None = None,
) -> Figure:
    """Draw similarity matrices of the amino acids beside a reference, all in one order.

    The order is `RESIDUE_ORDER`; lines part its physicochemical groups. Blue is similar, orange
    is not, white is 0. The diagonal, which is not compared, is left grey, and so is what is NaN.

    Args:
        similarities: Heading to (20, 20) similarities in the order of `AMINO_ACIDS`.
        reference: (20, 20) scores in the order of `AMINO_ACIDS`.
        reference_name: Heading of the reference.
        unit: What the similarities are, -1 to 1.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: A matrix is not (20, 20).
    """
    panels: list[tuple[str, NDArray[np.float64], float | None, str]] = [
        (name, matrix, 1.0, unit) for name, matrix in similarities.items()
    ]
    panels.append((reference_name, reference, None, "score"))
    figure = new_figure((3.7 * len(panels), 4.0), title=title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    order = [AMINO_ACIDS.index(letter) for letter in RESIDUE_ORDER]
    for ax, (name, matrix, limit, meaning) in zip(axes, panels, strict=True):
        if matrix.shape != (len(order), len(order)):
            raise ValueError(f"the matrix {name!r} must be (20, 20), got {matrix.shape}")
        drawn = np.array(matrix, dtype=float)[np.ix_(order, order)]
        np.fill_diagonal(drawn, np.nan)
        limit = float(np.nanmax(np.abs(drawn))) if limit is None else limit
        image = ax.imshow(drawn, cmap=_diverging(), vmin=-limit, vmax=limit)
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
def heads_figure(scores: Mapping[str, HeadScores], *, title: str | None = None) -> Figure:
    """Draw mean distance and share near the diagonal of every head against its layer.

    Args:
        scores: Model name to the scores of its heads, all on the same protein.
        title: Heading of the figure.

    Returns:
        The figure: a dot for each head, the models side by side within a layer, and the scores of
        uniform attention as a dotted line for each model.

    Raises:
        ValueError: `scores` holds no model.
    """
    if not scores:
        raise ValueError("scores must hold at least one model, got none")
    figure = new_figure((9.0, 3.6), title=title)
    distance, band = figure.subplots(1, 2)
    spread = 0.6 / len(scores)
    for number, (colour, found) in enumerate(zip(cycle(PALETTE), scores.values(), strict=False)):
        heads = [head for head in found.heads if math.isfinite(head.mean_distance)]
        shift = (number - (len(scores) - 1) / 2) * spread
        layers = np.array([head.layer for head in heads]) + shift
        for ax, values, uniform in (
            (distance, [head.mean_distance for head in heads], found.uniform.mean_distance),
            (band, [head.band_share for head in heads], found.uniform.band_share),
        ):
            ax.plot(layers, values, ls="", marker="o", ms=4, color=colour, alpha=0.75, mew=0)
            ax.axhline(uniform, color=MUTED, linewidth=1.0, linestyle=":")
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
    entries = [
        (name, Line2D([], [], ls="", marker="o", color=colour))
        for name, colour in zip(scores, cycle(PALETTE), strict=False)
    ]
    entries.append(("uniform attention", Line2D([], [], color=MUTED, lw=1.0, ls=":")))
    add_legend(figure, entries, "outside upper center", 4)
    return figure


def _diverging() -> Colormap:
    """Orange, white, blue; grey where undefined."""
    stops = ["#8c2d04", "#d95f0e", "#fdbe85", "#ffffff", "#9ecae1", "#3182bd", "#08306b"]
    return LinearSegmentedColormap.from_list("similarity", stops).with_extremes(bad="#d9d9d9")
