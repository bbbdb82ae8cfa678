"""Figure of time and memory against the number of nodes."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from performers.app.figures import new_figure, styled
from performers.benchmark.plot import draw_lines, length_axis, shared_legend, size_axis, style
from studies.graphs.report import rows_of_scaling
from studies.parts import Part


@styled
def scaling_figure(parts: Mapping[str, Part]) -> Figure:
    """A panel of seconds and one of peak memory, a line for each attention."""
    rows = rows_of_scaling(parts)
    names = list(dict.fromkeys(row["attention"] for row in rows))
    figure = new_figure((8.8, 3.9))
    panels = (("seconds", "seconds"), ("peak_bytes", "peak memory"))
    for axes, (column, label) in zip(figure.subplots(1, 2), panels, strict=True):
        draw_lines(axes, rows, "nodes", column, "attention", names)
        length_axis(axes, [row["nodes"] for row in rows], "nodes")
        axes.set_xlabel("nodes")
        size_axis(axes, column, label)
        style(axes)
    shared_legend(figure, 4)
    return figure
