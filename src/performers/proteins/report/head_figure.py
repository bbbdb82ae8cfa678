"""The figure of head scores: how far the heads of several models look, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from performers.app.figures import INK, MUTED, new_figure, shortened
from performers.proteins.reading.head_scores import HeadScores

_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def heads_figure(scores: Mapping[str, HeadScores], *, title: str | None = None) -> Figure:
    """Draws mean distance and share near the diagonal of every head against its layer.

    Args:
        scores: Model name to the scores of its heads, all on the same protein.
        title: Heading of the figure.

    Returns:
        The figure: a dot for each head, the models side by side within a layer, and what uniform
        attention scores as a dotted line for each model.

    Raises:
        ValueError: If there is no model.
    """
    if not scores:
        raise ValueError("scores must hold at least one model, got none")
    figure = new_figure((9.0, 3.6))
    distance, band = figure.subplots(1, 2)
    spread = 0.6 / len(scores)
    for number, found in enumerate(scores.values()):
        colour = _PALETTE[number % len(_PALETTE)]
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
        ax.set_xlabel("layer", fontsize=9, color=INK)
        ax.set_ylabel(label, fontsize=9, color=INK)
        # Heads that look alike lie close together: the margin matplotlib takes would cut them.
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
        ax.set_xlim(0.5, 0.5 + max(head.layer for found in scores.values() for head in found.heads))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8, color="#bbbbbb")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#bbbbbb")
    band.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    handles = [
        distance.plot([], [], ls="", marker="o", color=_PALETTE[n % len(_PALETTE)])[0]
        for n in range(len(scores))
    ]
    handles.append(distance.plot([], [], color=MUTED, linewidth=1.0, linestyle=":")[0])
    names = [*scores, "uniform attention"]
    legend = figure.legend(
        handles,
        [str(number) for number in range(len(names))],
        loc="outside upper center",
        ncols=min(4, len(names)),
        fontsize=8.5,
        frameon=False,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(name))
    if title:
        figure.suptitle(shortened(title, 90), fontsize=11, color=INK, parse_math=False)
    return figure
