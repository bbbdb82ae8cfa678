"""Draws results: time and memory against length, like Figure 3 of Choromanski et al. 2021."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from performers.app.figures import MUTED, PALETTE, add_legend, new_figure, styled
from performers.benchmark.case import Benchmark, Row, select
from performers.benchmark.table import by_title, nbytes

MARKERS = ("o", "s", "^", "D", "v", "P", "*")

# Attention that returns its values, drawn as the paper draws it.
_IDENTITY = "identity"
_PANEL = (4.4, 3.4)
_QUALITY = {
    "causal": ("perplexity", "perplexity"),
    "masked": ("accuracy", "accuracy of hidden tokens"),
    "encoder": ("cosine", "cosine with the original's embedding"),
}


@styled
def benchmark_figure(benchmark: Benchmark, rows: Sequence[Row]) -> Figure:
    """Draw the rows of a benchmark.

    Returns:
        A figure: a panel for each title and kind of time and memory, a line for each contestant;
        the dashed line X is attention that returns its values.
    """
    first, *others = benchmark.plotted
    across, series = benchmark.across, benchmark.series
    grid = []
    for value in dict.fromkeys(row[benchmark.titles[0]] for row in rows):
        parts = by_title(benchmark, select(rows, {benchmark.titles[0]: value}))
        line = [(title, part, *first) for title, part in parts.items()]
        # The memory of a line is that of its last title, the larger one.
        line += [(*line[-1][:2], *other) for other in others]
        # Memory is not always measured.
        grid.append([panel for panel in line if any(row[panel[2]] for row in panel[1])])
    columns = max(map(len, grid), default=1) or 1
    size = (_PANEL[0] * columns, _PANEL[1] * max(len(grid), 1) + 0.5)
    figure = new_figure(size)
    axes = figure.subplots(max(len(grid), 1), columns, squeeze=False)
    names = list(dict.fromkeys(row[series] for row in rows))
    for places, line in zip(axes, grid or [[]], strict=True):
        for place, (title, part, column, label) in zip(places, line, strict=False):
            draw_panel(place, part, across, column, label, series, names, title)
        for place in places[len(line) :]:
            place.set_axis_off()
    shared_legend(figure, 4 if columns < 3 else 7)
    return figure


@styled
def conversion_figure(content: dict[str, Any]) -> Figure:
    """Draw a conversion.

    The panel of quality begins with the converted model before training; attention transfer is
    shaded. Lines across it are the original and the baseline.

    Args:
        content: JSON of a ``ConversionRecord``.

    Returns:
        A figure with one to five panels: quality; time and, where it was measured, memory of a
        forward pass; time and cache of decoding.
    """
    panels = [
        (content["speed"], "length", "seconds", "forward pass", "seconds"),
        (content["speed"], "length", "peak_bytes", "forward pass", "peak memory"),
        (content["decoding"], "context", "seconds", "decoding", "seconds a token"),
        (content["decoding"], "context", "cache_bytes", "decoding", "cache"),
    ]
    panels = [panel for panel in panels if any(row.get(panel[2]) for row in panel[0])]
    figure = new_figure((_PANEL[0] * (1 + len(panels)), 3.7))
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    _draw_quality(axes[0], content)
    for place, (rows, across, column, title, label) in zip(axes[1:], panels, strict=True):
        names = ["converted", "original"]
        draw_panel(place, rows, across, column, label, "model", names, title)
    for place in axes:
        place.legend()
    return figure


def _draw_quality(axes: Axes, content: dict[str, Any]) -> None:
    from performers.convert.distillation.results import BASELINE, ORIGINAL, ZERO_SHOT

    figure, label = _QUALITY[content["model"]["kind"]]
    rows = {row["model"]: row[figure] for row in content["quality"]}
    transfer = content["options"]["transfer_steps"]
    offsets = {"transfer": 0, "model": transfer}
    points = [(0, rows[ZERO_SHOT])] + [
        (offsets[entry["stage"]] + entry["step"], entry[figure])
        for entry in content["training"].get("history", [])
        if figure in entry
    ]
    axes.plot(*zip(*points, strict=True), color=PALETTE[0], marker="o", label=ZERO_SHOT)
    axes.axhline(rows[ORIGINAL], color=PALETTE[1], linestyle="--", label=ORIGINAL)
    axes.axhline(rows[BASELINE], color=MUTED, linestyle=":", label=f"{BASELINE}, untrained")
    if transfer and len(points) > 1:
        axes.axvspan(0, transfer, color="#EEEEEE", zorder=0)
    if figure == "perplexity":
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("fine-tuning steps (attention transfer shaded)")
    axes.set_ylabel(label)
    style(axes, "quality on held-out text")


def look(number: int) -> dict[str, Any]:
    """Colour and marker of a line; dashed beyond the palette."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "-" if number < len(PALETTE) else "--",
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def draw_lines(
    axes: Axes, rows: Sequence[Row], across: str, column: str, series: str, names: Sequence[str]
) -> None:
    """Draw a line for each name through the rows that have a positive value."""
    for number, name in enumerate(names):
        points = sorted(
            (row[across], row[column])
            for row in rows
            if row[series] == name and (row[column] or 0) > 0
        )
        if not points:
            continue
        looks = look(number)
        if name == _IDENTITY:
            looks |= {"color": MUTED, "linestyle": "--", "marker": "x"}
        label = "X (identity)" if name == _IDENTITY else name
        axes.plot(*zip(*points, strict=True), label=label, **looks)


def draw_panel(
    axes: Axes,
    rows: Sequence[Row],
    across: str,
    column: str,
    label: str,
    series: str,
    names: Sequence[str],
    title: str = "",
) -> None:
    """Draw lines between logarithmic axes: lengths, each with a tick, and seconds or bytes."""
    draw_lines(axes, rows, across, column, series, names)
    length_axis(axes, [row[across] for row in rows], f"{across}, tokens")
    size_axis(axes, column, label)
    style(axes, title)


def length_axis(axes: Axes, lengths: Iterable[int], label: str) -> None:
    """A logarithmic axis of lengths, each with a tick."""
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45 if len(ticks) > 6 else 0)
    axes.set_xlabel(label)


def size_axis(axes: Axes, column: str, label: str) -> None:
    """A logarithmic axis of seconds, or of bytes."""
    axes.set_yscale("log", base=2 if column.endswith("bytes") else 10)
    if column.endswith("bytes"):
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: nbytes(value)))
    axes.set_ylabel(label)


def style(axes: Axes, title: str = "") -> None:
    """A title and a grid."""
    axes.set_title(title)
    axes.grid(True)


def shared_legend(figure: Figure, columns: int) -> None:
    """One legend below all panels."""
    handles = {
        label: handle
        for place in figure.axes
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    add_legend(figure, list(handles.items()), "outside lower center", columns)
