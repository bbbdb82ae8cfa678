"""The figure of attention maps: one panel per head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from performers.app.figures import INK, new_figure, shortened, styled
from performers.proteins.reading.head_scores import HeadScores

_INCHES_A_LETTER = 0.085
_SITE = "#D55E00"


@styled
def attention_maps_figure(
    attentions: Sequence[NDArray[np.floating[Any]]],
    labels: str,
    *,
    scores: HeadScores | None = None,
    layers: Sequence[int] | None = None,
    sites: Sequence[int] = (),
    title: str | None = None,
) -> Figure:
    """Draw the attention of every head, layers from top to bottom, heads from left to right.

    The colour of a cell is the attention from the residue of its row to that of its column, on a
    square-root scale of the head's own, so that heads of different sharpness can be read side by
    side. It ends at the weight that all but `length`/2 cells stay below, or at ten times uniform
    attention if that is more, which leaves a head that attends evenly pale.

    Args:
        attentions: One array (heads, length, length) per layer; weights below 0 are drawn as 0.
        labels: The `length` letters of the residues.
        scores: Scores of these heads; each panel then shows its mean distance and band share.
        layers: Numbers of the layers, from 1; counted when not given.
        sites: Numbers of residues, from 1, to mark with arrows at the upper and right edges of
            every panel, where they hide nothing.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: `attentions` is empty or a shape does not fit `labels`.
    """
    length = len(labels)
    if not attentions or length == 0:
        raise ValueError("attentions must hold at least one layer of at least one residue")
    for number, weights in enumerate(attentions, start=1):
        if weights.ndim != 3 or weights.shape[1:] != (length, length):
            raise ValueError(
                f"attentions[{number - 1}] must be (heads, {length}, {length}) for {length} "
                f"labels, got {weights.shape}"
            )
    layers = list(range(1, len(attentions) + 1)) if layers is None else list(layers)
    columns = max(weights.shape[0] for weights in attentions)
    grid = _PanelGrid(len(attentions), columns, bool(title))
    for row, (layer, weights) in enumerate(zip(layers, attentions, strict=True)):
        for column, drawn in enumerate(weights):
            ax = grid.axes(row, column)
            drawn = np.nan_to_num(np.clip(np.asarray(drawn, dtype=float), 0.0, None))
            # Each map in units of its own limit: one colour bar then serves all panels.
            image = ax.imshow(
                drawn / _colour_limit(drawn), cmap=_sequential(), norm=PowerNorm(0.5, 0.0, 1.0)
            )
            heading = _head_heading(layer, column + 1, scores)
            ax.set_title(heading, fontsize=7.5, pad=7.5 if sites else 3)
            _residue_ticks(
                ax, labels, grid.panel, left=column == 0, bottom=row == len(attentions) - 1
            )
            ax.spines[:].set(visible=True, linewidth=0.6)
            _mark(ax, [site - 1 for site in sites if site <= length])
    grid.finish(image, title)
    return grid.figure


class _PanelGrid:
    """Square panels at fixed distances in inches, with one colour bar to the right.

    A general layout engine takes seconds for a hundred panels whose sizes are known beforehand.
    """

    def __init__(self, rows: int, columns: int, has_title: bool) -> None:
        self.panel = min(2.4, max(1.45, 8.6 / columns))
        self._step = (self.panel + 0.1, self.panel + 0.27)
        self._top = 0.65 if has_title else 0.3
        self._left = 0.58
        self._grid = (
            columns * self._step[0] - 0.1,
            rows * self._step[1] - 0.27,
        )
        self._size = (self._left + self._grid[0] + 0.85, self._top + self._grid[1] + 0.58)
        self.figure = new_figure(self._size, arrange=False)

    def axes(self, row: int, column: int) -> Any:
        left = self._left + column * self._step[0]
        top = self._top + row * self._step[1]
        return self._place(left, top, self.panel, self.panel)

    def finish(self, image: Any, title: str | None) -> None:
        right, bottom = self._left + self._grid[0], self._top + self._grid[1]
        height = min(self._grid[1], 3.0)
        bar = self.figure.colorbar(image, cax=self._place(right + 0.15, self._top, 0.13, height))
        bar.set_ticks([0.0, 0.05, 0.2, 0.5, 1.0], labels=["0", ".05", ".2", ".5", "1"])
        bar.set_label("attention / end of the head's scale", fontsize=7.5)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.outline.set_visible(False)
        width, tall = self._size
        middle = (self._left + self._grid[0] / 2) / width
        style: dict[str, Any] = {"fontsize": 9, "color": INK}
        self.figure.text(middle, 0.12 / tall, "attended residue (key)", ha="center", **style)
        self.figure.text(
            0.08 / width,
            1 - (self._top + bottom) / 2 / tall,
            "attending residue (query)",
            rotation=90,
            va="center",
            **style,
        )
        if title:
            self.figure.text(
                middle,
                1 - 0.3 / tall,
                shortened(title, 90),
                ha="center",
                fontsize=11,
                color=INK,
            )

    def _place(self, left: float, top: float, width: float, height: float) -> Any:
        """New axes at a place given in inches from the upper left corner."""
        whole, tall = self._size
        return self.figure.add_axes(
            (left / whole, 1 - (top + height) / tall, width / whole, height / tall)
        )


def _mark(ax: Any, places: Sequence[int]) -> None:
    style: dict[str, Any] = {"ls": "", "color": _SITE, "ms": 3.5, "mew": 0, "clip_on": False}
    along_x, along_y = ax.get_xaxis_transform(), ax.get_yaxis_transform()
    ax.plot(places, [1.02] * len(places), marker="v", transform=along_x, **style)
    ax.plot([1.02] * len(places), places, marker="<", transform=along_y, **style)


def _head_heading(layer: int, head: int, scores: HeadScores | None) -> str:
    for score in () if scores is None else scores.heads:
        if (score.layer, score.head) == (layer, head) and math.isfinite(score.mean_distance):
            near = f"{score.band_share:.0%} ≤ {scores.band}" if scores else ""
            return f"{score.label} · {score.mean_distance:.0f} res. · {near}"
    return f"{layer}.{head}"


def _colour_limit(weights: NDArray[np.float64]) -> float:
    length = len(weights)
    return max(float(np.quantile(weights, 1 - 0.5 / length)), 10.0 / length)


def _residue_ticks(ax: Any, labels: str, panel: float, *, left: bool, bottom: bool) -> None:
    """Letters where a panel of so many inches has room for them, else residue numbers from 1."""
    if len(labels) * _INCHES_A_LETTER <= panel:
        places, names, size = list(range(len(labels))), list(labels), 5.5
    else:
        ticks = MaxNLocator(4, integer=True).tick_values(1, len(labels))
        places = [int(tick) - 1 for tick in ticks if 1 <= tick <= len(labels)]
        names, size = [str(place + 1) for place in places], 6.5
    ax.set_xticks(places, names, fontsize=size)
    ax.set_yticks(places, names, fontsize=size)
    ax.tick_params(length=2, pad=1.5, labelleft=left, labelbottom=bottom)


def _sequential() -> Colormap:
    """White to dark blue, lightness falling evenly: nothing attended stays white on paper."""
    stops = ["#ffffff", "#dbe9f6", "#9ec9e2", "#4a98c9", "#1764ab", "#08306b", "#041a3d"]
    return LinearSegmentedColormap.from_list("attention", stops)
