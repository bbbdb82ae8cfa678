"""Quality against fine-tuning steps, beside time and memory against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from performers.benchmark.converted import CONVERTED, ORIGINAL
from performers.benchmark.figure import INK, MUTED, PALETTE
from performers.benchmark.results import Row
from performers.convert.distillation.results import BASELINE, ZERO_SHOT

__all__ = ["conversion_figure"]

_SHOWN = {"causal": "perplexity", "masked": "accuracy", "encoder": "cosine"}
_LABELS = {
    "perplexity": "perplexity",
    "accuracy": "accuracy of hidden tokens",
    "cosine": "cosine with the original's embedding",
}
_COLOURS = {ORIGINAL: PALETTE[1], CONVERTED: PALETTE[0]}
_STYLES = {ORIGINAL: ("--", "s"), CONVERTED: ("-", "o")}
_MEBI = 1 << 20


class _Panel(NamedTuple):
    rows: Sequence[Row]
    across: str
    column: str
    title: str
    label: str


def conversion_figure(content: Mapping[str, Any]) -> Figure:
    """Draw a conversion.

    The panel of quality begins with the converted model before training; attention transfer is
    shaded. Lines across it are the original and the baseline.

    Args:
        content: What ``ConversionRecord.content`` gives.

    Returns:
        A figure with one to five panels: quality; time and, where it was measured, memory of a
        forward pass; time and cache of decoding.
    """
    panels = [
        _Panel(content["speed"], "length", "seconds", "forward pass", "seconds"),
        _Panel(content["speed"], "length", "peak_bytes", "forward pass", "peak memory, MiB"),
        _Panel(content["decoding"], "context", "seconds", "decoding", "seconds a token"),
        _Panel(content["decoding"], "context", "cache_bytes", "decoding", "cache, MiB"),
    ]
    panels = [panel for panel in panels if any(row.get(panel.column) for row in panel.rows)]
    figure = Figure(
        figsize=(4.4 * (1 + len(panels)), 3.7),
        layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04),
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 + len(panels), squeeze=False)[0]
    _draw_quality(axes[0], content)
    for place, panel in zip(axes[1:], panels, strict=True):
        _draw_panel(place, panel)
    for place in axes:
        place.tick_params(labelsize=8)
        place.grid(True, which="major", linewidth=0.4, color="#DDDDDD")
        place.spines[["top", "right"]].set_visible(False)
        place.legend(frameon=False, fontsize=8)
    return figure


def _draw_quality(axes: Axes, content: Mapping[str, Any]) -> None:
    figure = _SHOWN[content["model"]["kind"]]
    rows = {row["model"]: row[figure] for row in content["quality"]}
    transfer = content["options"]["transfer_steps"]
    offsets = {"transfer": 0, "model": transfer}
    points = [(0, rows[ZERO_SHOT])] + [
        (offsets[entry["stage"]] + entry["step"], entry[figure])
        for entry in content["training"].get("history", [])
        if figure in entry
    ]
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, "-o", color=_COLOURS[CONVERTED], markersize=4, label=CONVERTED)
    axes.axhline(rows[ORIGINAL], color=_COLOURS[ORIGINAL], linestyle="--", label=ORIGINAL)
    axes.axhline(rows[BASELINE], color=MUTED, linestyle=":", label=f"{BASELINE}, untrained")
    if transfer and len(points) > 1:
        axes.axvspan(0, transfer, color="#EEEEEE", zorder=0)
    if figure == "perplexity":
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("fine-tuning steps (attention transfer shaded)", color=INK)
    axes.set_ylabel(_LABELS[figure], color=INK)
    axes.set_title("quality on held-out text", fontsize=10, color=INK)


def _draw_panel(axes: Axes, panel: _Panel) -> None:
    unit = _MEBI if panel.column.endswith("bytes") else 1
    for name in (ORIGINAL, CONVERTED):
        points = [
            (row[panel.across], row[panel.column] / unit)
            for row in panel.rows
            if row["model"] == name and row[panel.column]
        ]
        if points:
            line, marker = _STYLES[name]
            axes.plot(
                *zip(*points, strict=True),
                linestyle=line,
                marker=marker,
                markersize=4.5,
                color=_COLOURS[name],
                label=name,
            )
    lengths = sorted({row[panel.across] for row in panel.rows})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_xlabel(f"{panel.across}, tokens", color=INK)
    axes.set_ylabel(panel.label, color=INK)
    axes.set_title(panel.title, fontsize=10, color=INK)
