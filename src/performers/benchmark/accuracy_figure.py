"""Small multiples of kernel errors against the number of features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from performers.benchmark.figure import INK, MARKERS, PALETTE
from performers.benchmark.results import Results, Row
from performers.benchmark.settings import ISOTROPIC
from performers.features import ESTIMATORS, PROJECTIONS

_PANEL = (3.5, 2.9)
# Ratios of the ends of an axis: what has powers of ten for labels, what has labels between them.
_WIDE, _SHORT = 1e5, 30
_LABELS = {
    "kernel_mse": "mean squared error of A",
    "output_mse": "mean squared error of the output",
    "kernel_relative": "squared relative error of A",
}
_Pair = tuple[str, str]
# The paper's figure compares these.
_PAPER: tuple[_Pair, ...] = (
    ("trigonometric", "gaussian"),
    ("trigonometric", "orthogonal"),
    ("positive", "gaussian"),
    ("positive", "orthogonal"),
)


# Its errors are so large that nothing else could be told apart beside it.
_OFF_SCALE = "trigonometric"


class _Column(NamedTuple):
    title: str
    pairs: Sequence[_Pair]
    label: int


def kernel_figure(results: Results) -> Figure:
    """Draw the kernel part.

    Args:
        results: Of ``run_kernel``, perhaps not finished.

    Returns:
        A figure. Two lines of panels for each isotropic data, the error of the kernel matrix and
        that of the output: the paper's comparison, all estimators (trigonometric in the first panel
        alone), all projections of two of them. Then the kernel matrix of the anisotropic data. The
        lines are means over draws, bands go from the smallest draw to the largest.
    """
    estimators = [(name, "orthogonal") for name in ESTIMATORS if name != _OFF_SCALE]
    columns = [
        _Column("as in the paper", _PAPER, -1),
        _Column("estimators", estimators, 0),
        _Column("positive", [("positive", name) for name in PROJECTIONS], 1),
        _Column("data_aware", [("data_aware", name) for name in PROJECTIONS], 1),
    ]
    by_data: dict[str, list[Row]] = {}
    for row in results.rows:
        by_data.setdefault(row["data"], []).append(row)
    lines: list[list[tuple[str, list[Row], _Column, str]]] = []
    for name in [name for name in by_data if name.startswith(ISOTROPIC)]:
        rows = by_data.pop(name)
        for measure in ("kernel_mse", "output_mse"):
            lines.append([(f"{name}: {column.title}", rows, column, measure) for column in columns])
    if by_data:
        lines.append(
            [(name, rows, columns[1], "kernel_relative") for name, rows in by_data.items()]
        )
    width = max((len(line) for line in lines), default=1)
    figure = small_multiples(len(lines), width)
    axes = figure.subplots(max(len(lines), 1), width, squeeze=False)
    for places, line in zip(axes, lines, strict=False):
        for place, (title, rows, column, measure) in zip(places, line, strict=False):
            _draw(place, rows, column, measure)
            place.set_title(title, fontsize=9, color=INK)
            if place is places[0]:
                place.set_ylabel(_LABELS[measure], fontsize=8, color=INK)
        for place in places[len(line) :]:
            place.set_axis_off()
    if not lines:
        axes[0][0].set_axis_off()
    return figure


def small_multiples(lines: int, columns: int, panel: tuple[float, float] = _PANEL) -> Figure:
    """An empty figure for a grid of panels.

    Args:
        lines: Panels one above the other.
        columns: Panels side by side.
        panel: Width and height of one, inches.

    Returns:
        The figure.
    """
    figure = Figure(
        figsize=(panel[0] * max(columns, 1), panel[1] * max(lines, 1)),
        layout=ConstrainedLayoutEngine(w_pad=0.05, h_pad=0.06, wspace=0.02),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    """A light grid, two sides, small figures.

    Args:
        axes: The panel.
    """
    axes.tick_params(labelsize=7.5)
    axes.grid(True, which="major", linewidth=0.4, color="#DDDDDD")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def feature_axis(axes: Axes, counts: Sequence[int]) -> None:
    """A logarithmic axis of numbers of features, a tick at each.

    Args:
        axes: The panel.
        counts: The numbers.
    """
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("random features", fontsize=8, color=INK)


def plain_ticks(axes: Axes) -> None:
    """Label a logarithmic vertical axis with plain numbers, at 2 and 5 too where it is short.

    Args:
        axes: The panel, its lines drawn.
    """
    low, high = axes.get_ylim()
    if high > _WIDE * low:
        return
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    short = high < _SHORT * low
    axes.yaxis.set_minor_formatter(FuncFormatter(two_and_five) if short else NullFormatter())
    axes.tick_params(axis="y", which="minor", labelsize=7.5)


def two_and_five(value: float, _: object = None) -> str:
    """The label of a minor tick of a logarithmic axis: 2 and 5 times a power of ten have one."""
    return f"{value:g}" if f"{value:.0e}"[0] in "25" else ""


def _draw(axes: Axes, rows: list[Row], column: _Column, measure: str) -> None:
    for number, pair in enumerate(column.pairs):
        points = sorted(
            (row["num_features"], row[f"{measure}_low"], row[measure], row[f"{measure}_high"])
            for row in rows
            if (row["estimator"], row["projection"]) == pair and row[measure] is not None
        )
        if not points:
            continue
        counts, low, mean, high = zip(*points, strict=True)
        color = PALETTE[number % len(PALETTE)]
        axes.plot(
            counts,
            mean,
            label=pair[column.label] if column.label >= 0 else ", ".join(pair),
            color=color,
            marker=MARKERS[number % len(MARKERS)],
            markersize=3.5,
            linewidth=1.2,
        )
        axes.fill_between(counts, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set_yscale("log")
    plain_ticks(axes)
    feature_axis(axes, sorted({row["num_features"] for row in rows}))
    style(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6.5, frameon=False)
