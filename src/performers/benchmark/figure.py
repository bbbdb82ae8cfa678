"""Log-log figures of the results: time and memory against length, like the paper's Figure 3."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from performers.benchmark.results import Results, Row

INK, MUTED = "#222222", "#767676"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "*")
# What no attention can beat is drawn as the paper draws it.
_IDENTITY = "identity"
_PANEL = (4.4, 3.4)
_KILO = 1024
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class _Panel(NamedTuple):
    title: str
    rows: list[Row]
    column: str
    label: str


def benchmark_figure(results: Results) -> Figure:
    """Draw what a run has measured so far.

    Args:
        results: Of the attention, the model or the decode benchmark.

    Returns:
        A figure: a panel for each kind of time and of memory, a line for each contestant; the
        dashed line X is attention that returns its values.

    Raises:
        ValueError: The results are of another benchmark.
    """
    layouts = {"attention": _attention, "model": _model, "decode": _decode}
    if results.benchmark not in layouts:
        raise ValueError(f"results must be of one of {', '.join(layouts)}; got {results.benchmark}")
    across, name, rows_of_panels = layouts[results.benchmark](results.rows)
    # Memory is not always measured, and an empty panel says nothing.
    rows_of_panels = [
        [panel for panel in panels if any(row[panel.column] for row in panel.rows)]
        for panels in rows_of_panels
    ]
    columns = max((len(panels) for panels in rows_of_panels), default=1) or 1
    lines = max(len(rows_of_panels), 1)
    figure = Figure(
        figsize=(_PANEL[0] * columns, _PANEL[1] * lines + 0.5),
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(row[name] for row in results.rows))
    axes = figure.subplots(lines, columns, squeeze=False)
    for line, panels in zip(axes, rows_of_panels or [[]], strict=True):
        for place, panel in zip(line, panels, strict=False):
            _draw(place, panel, across, name, names)
        for place in line[len(panels) :]:
            place.set_axis_off()
    handles = {
        label: handle
        for place in axes.flat
        for handle, label in zip(*place.get_legend_handles_labels(), strict=True)
    }
    if handles:
        figure.legend(
            handles.values(),
            handles.keys(),
            loc="outside lower center",
            ncols=min(len(handles), 4 if columns < 3 else 7),
            frameon=False,
            fontsize=9,
        )
    return figure


_Layout = tuple[str, str, list[list[_Panel]]]


def _attention(rows: Sequence[Row]) -> _Layout:
    lines = []
    for direction in _distinct(rows, "direction"):
        of_direction = [row for row in rows if row["direction"] == direction]
        panels = []
        for passes in _distinct(of_direction, "passes"):
            here = [row for row in of_direction if row["passes"] == passes]
            panels.append(_Panel(f"{direction}, {passes}", here, "seconds", "seconds"))
        # The larger of the memories: the last of the passes.
        panels.append(_Panel(f"{panels[-1].title}", panels[-1].rows, "peak_bytes", "peak memory"))
        lines.append(panels)
    return "length", "contestant", lines


def _model(rows: Sequence[Row]) -> _Layout:
    title = "training step, {size} model, {objective}".format(**rows[0]) if rows else ""
    return (
        "length",
        "attention",
        [
            [
                _Panel(title, list(rows), "seconds", "seconds"),
                _Panel(title, list(rows), "peak_bytes", "peak memory"),
            ]
        ],
    )


def _decode(rows: Sequence[Row]) -> _Layout:
    lines = []
    for level in _distinct(rows, "level"):
        here = [row for row in rows if row["level"] == level]
        title = "decoding, one layer" if level == "layer" else "decoding, regular model"
        lines.append(
            [
                _Panel(title, here, "seconds", "seconds per token"),
                _Panel(title, here, "state_bytes", "state"),
            ]
        )
    return "context", "contestant", lines


def _draw(axes: Axes, panel: _Panel, across: str, name: str, names: list[str]) -> None:
    for number, one in enumerate(names):
        points = [
            (row[across], row[panel.column])
            for row in panel.rows
            if row[name] == one and (row[panel.column] or 0) > 0
        ]
        if not points:
            continue
        identity = one == _IDENTITY
        axes.plot(
            *zip(*sorted(points), strict=True),
            label="X (identity)" if identity else one,
            color=MUTED if identity else PALETTE[number % len(PALETTE)],
            linestyle="--" if identity else "-",
            marker="x" if identity else MARKERS[number % len(MARKERS)],
            markersize=4.5,
            linewidth=1.4,
        )
    lengths = sorted({row[across] for row in panel.rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(axis="x", labelrotation=45 if len(lengths) > 6 else 0, labelsize=8)
    axes.tick_params(axis="y", labelsize=8)
    if panel.column.endswith("bytes"):
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
    axes.set_xlabel("context, tokens" if across == "context" else "length, tokens", color=INK)
    axes.set_ylabel(panel.label, color=INK)
    axes.set_title(panel.title, fontsize=10, color=INK)
    axes.grid(True, which="major", linewidth=0.4, color="#DDDDDD")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _distinct(rows: Iterable[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _bytes(value: float) -> str:
    for unit in _UNITS[:-1]:
        if value < _KILO:
            return f"{value:.3g} {unit}"
        value /= _KILO
    return f"{value:.3g} {_UNITS[-1]}"
