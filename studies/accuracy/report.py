"""Tables and figures of the results of ``python -m studies.accuracy``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, NullLocator
from rich.table import Table

from performers.benchmark.case import MEASURED, Row, select
from performers.benchmark.measure import Results
from performers.benchmark.plot import INK, MARKERS, MUTED, PALETTE, look, new_figure, style
from performers.benchmark.table import new_table, seconds, times
from performers.features import ESTIMATORS, PROJECTIONS
from studies.accuracy.approximations import SDPA
from studies.accuracy.kernel import ISOTROPIC
from studies.accuracy.pretrained import FINAL, MEAN

_MEASURES = {
    "kernel_relative": "squared relative error of exp(scale q . k)",
    "output_error": "relative error of the output",
}
_LABELS = {
    "kernel_mse": "mean squared error of A",
    "output_mse": "mean squared error of the output",
    "kernel_relative": "squared relative error of A",
}
# The paper's figure compares these.
_PAPER = [
    (name, row) for name in ("trigonometric", "positive") for row in ("gaussian", "orthogonal")
]
# Panels: title, pairs of estimator and projection, and which of the two names a line (None: both).
# The errors of trigonometric features would hide all others.
_PANELS: list[tuple[str, list[tuple[str, str]], int | None]] = [
    ("as in the paper", _PAPER, None),
    ("estimators", [(x, "orthogonal") for x in ESTIMATORS if x != "trigonometric"], 0),
    ("positive", [("positive", x) for x in PROJECTIONS], 1),
    ("data_aware", [("data_aware", x) for x in PROJECTIONS], 1),
]
# Zeros in place of the output have an error of 1; settings far worse would stretch the axis.
_WORST = 2.0


def kernel_tables(results: Results) -> list[Table]:
    """Errors against the number of features: two tables for each kind of data, means over draws."""
    tables = []
    for data in _distinct(results.rows, "data"):
        rows = select(results.rows, {"data": data})
        counts = _distinct(rows, "num_features")
        pairs = list(dict.fromkeys((row["estimator"], row["projection"]) for row in rows))
        values = {(row["estimator"], row["projection"], row["num_features"]): row for row in rows}
        for measure, label in _MEASURES.items():
            headings = [f"{count:,}" for count in counts]
            table = new_table(f"{data}: {label}", ["estimator", "projection"], headings)
            for number, pair in enumerate(pairs):
                first = number == 0 or pairs[number - 1][0] != pair[0]
                cells = [values.get((*pair, count), {}).get(measure) for count in counts]
                table.add_row(pair[0] if first else "", pair[1], *map(error, cells))
            tables.append(table)
    return tables


def heads_tables(results: Results) -> list[Table]:
    """Errors by layer, and the means beside the times; captions give the reasons of failures."""
    means = select(results.rows, {"layer": MEAN})
    rows = [row for row in results.rows if row["layer"] != MEAN]
    layers = _distinct(rows, "layer")
    middle = results.settings["num_features"]
    title = f"relative error of the output by layer, {middle} features"
    by_layer = new_table(title, ["setting"], map(str, layers))
    errors = {(row["setting"], row["num_features"], row["layer"]): row["error"] for row in rows}
    for setting, count in dict.fromkeys((row["setting"], row["num_features"]) for row in rows):
        if count in (0, middle):
            cells = [errors.get((setting, count, layer)) for layer in layers]
            by_layer.add_row(setting, *map(error, cells))
    title = "mean over layers; front: no other is both faster and better"
    by_time = _columns(
        title,
        means,
        {
            "features": _features,
            "mean\nerror": lambda row: error(row["error"]),
            "a call": lambda row: seconds(row["seconds"]),
            "SDPA\n/ this": lambda row: times(row["sdpa_ratio"]),
            "": lambda row: "front" if row.get("front") else "",
        },
    )
    by_time.caption = _reasons(results.rows)
    return [by_layer, by_time]


def models_tables(results: Results) -> list[Table]:
    """Final hidden states and perplexity under each setting."""
    rows = select(results.rows, {"layer": FINAL})
    table = _columns(
        "the end of the model",
        rows,
        {
            "features": _features,
            "error of\nhidden states": lambda row: error(row.get("error")),
            "cosine": lambda row: "" if row.get("cosine") is None else f"{row['cosine']:.3f}",
            "perplexity": lambda row: error(row.get("replaced_perplexity")),
            "of the\noriginal": lambda row: error(row.get("perplexity")),
        },
    )
    table.caption = _reasons(rows)
    return [table]


def error(value: float | None) -> str:
    """An error with three digits; powers of ten where it is tiny or huge; empty for None."""
    if value is None:
        return ""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    return f"{value:.1e}"


def _features(row: Row) -> str:
    return f"{row['num_features']:,}" if row["num_features"] else ""


def _columns(title: str, rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> Table:
    """A table of settings; columns without a value are left out."""
    shown = {name: show for name, show in columns.items() if any(show(row) for row in rows)}
    table = new_table(title, ["setting"], shown)
    for row in rows:
        table.add_row(row["setting"], *(show(row) for show in shown.values()))
    return table


def _reasons(rows: Iterable[Row]) -> str | None:
    """Reasons of failed settings, one each."""
    reasons: dict[str, str] = {}
    for row in rows:
        if row["status"] != MEASURED:
            setting = f"{row['setting']}, {row['num_features']:,} features"
            reasons.setdefault(setting, f"layer {row['layer']}: {row['reason']}")
    return "\n".join(f"{name}: {reason}" for name, reason in reasons.items()) or None


def kernel_figure(results: Results) -> Figure:
    """Errors on random data against the number of features.

    Two lines of panels for each isotropic data, the error of the kernel matrix and that of the
    output: the paper's comparison, all estimators (trigonometric in the first panel alone), all
    projections of two of them. Then the kernel matrix of the anisotropic data. Lines are means over
    draws, bands go from the smallest draw to the largest.
    """
    names = _distinct(results.rows, "data")
    isotropic = [name for name in names if name.startswith(ISOTROPIC)]
    grid = [
        [(name, *panel, measure) for panel in _PANELS]
        for name in isotropic
        for measure in ("kernel_mse", "output_mse")
    ]
    others = [name for name in names if name not in isotropic]
    if others:
        grid.append([(name, "", *_PANELS[1][1:], "kernel_relative") for name in others])
    width, height = max(map(len, grid), default=1), max(len(grid), 1)
    figure = new_figure((3.5 * width, 2.9 * height))
    axes = figure.subplots(height, width, squeeze=False)
    for places, line in zip(axes, grid or [[]], strict=True):
        for place, (name, title, pairs, which, measure) in zip(places, line, strict=False):
            _draw_kernel(place, select(results.rows, {"data": name}), pairs, which, measure)
            style(place, f"{name}: {title}" if title else name)
            if place is places[0]:
                place.set_ylabel(_LABELS[measure], fontsize=8, color=INK)
        for place in places[len(line) :]:
            place.set_axis_off()
    return figure


def _draw_kernel(
    axes: Axes, rows: list[Row], pairs: list[tuple[str, str]], which: int | None, measure: str
) -> None:
    for number, pair in enumerate(pairs):
        points = sorted(
            (row["num_features"], row[f"{measure}_low"], row[measure], row[f"{measure}_high"])
            for row in rows
            if (row["estimator"], row["projection"]) == pair and row[measure] is not None
        )
        if points:
            counts, low, mean, high = zip(*points, strict=True)
            label = ", ".join(pair) if which is None else pair[which]
            axes.plot(counts, mean, label=label, **look(number))
            axes.fill_between(counts, low, high, color=look(number)["color"], alpha=0.12)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)
    feature_axis(axes, _distinct(rows, "num_features"))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6.5, frameon=False)


def heads_figure(results: Results) -> Figure:
    """Errors on the heads of a model.

    By layer and against the number of features for the settings with several numbers of features;
    against time for all settings with an error of at most 2, with the front of those that no other
    beats and the time of exact attention.
    """
    means = select(results.rows, {"layer": MEAN})
    counted: dict[str, set[int]] = {}
    for row in results.rows:
        counted.setdefault(row["setting"], set()).add(row["num_features"])
    main = [name for name, counts in counted.items() if len(counts) > 1]
    middle = int(results.settings["num_features"])
    figure = new_figure((13.8, 3.9))
    by_layer, by_count, by_time = figure.subplots(1, 3)
    rows = [row for row in select(results.rows, {"num_features": middle}) if row["layer"] != MEAN]
    _draw_settings(by_layer, main, rows, "layer")
    by_layer.set_xlabel("layer", fontsize=8, color=INK)
    style(by_layer, f"by layer, {middle} features")
    _draw_settings(by_count, main, means, "num_features")
    style(by_count, "mean over layers")
    if means:
        feature_axis(by_count, sorted(set().union(*(counted[name] for name in main))))
    _draw_times(by_time, means, main)
    for axes in (by_layer, by_count):
        axes.set_ylabel("relative error of the output", fontsize=8, color=INK)
    _legend(figure, by_count if means else by_layer, 3)
    return figure


def models_figure(results: Results) -> Figure:
    """The error of the hidden states after each layer, a line for each setting."""
    rows = [row for row in results.rows if row["layer"] != FINAL]
    figure = new_figure((6.4, 4.4))
    axes = figure.subplots()
    _draw_settings(axes, _distinct(rows, "setting"), rows, "layer")
    axes.set_xlabel("layer", fontsize=8, color=INK)
    axes.set_ylabel("relative error of the hidden states", fontsize=8, color=INK)
    style(axes)
    _legend(figure, axes, 2)
    return figure


def _draw_settings(axes: Axes, names: Sequence[str], rows: Iterable[Row], across: str) -> None:
    rows = list(rows)
    for number, name in enumerate(names):
        points = sorted(
            (row[across], row["error"])
            for row in select(rows, {"setting": name})
            if row["error"] is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **look(number))
    axes.set_yscale("log")
    plain_ticks(axes.yaxis)


def _draw_times(axes: Axes, means: list[Row], main: list[str]) -> None:
    timed = [
        (1e3 * row["seconds"], row["error"], row)
        for row in means
        if row["seconds"] and row["error"] is not None and row["error"] <= _WORST
    ]
    for time, value, row in timed:
        if row["setting"] == SDPA:
            axes.axvline(time, color=MUTED, linestyle="--", linewidth=1)
            axes.text(time, 0.97, " exact", transform=axes.get_xaxis_transform(), fontsize=7)
            continue
        number = main.index(row["setting"]) if row["setting"] in main else None
        color = MUTED if number is None else PALETTE[number % len(PALETTE)]
        marker = "." if number is None else MARKERS[number % len(MARKERS)]
        axes.plot(time, value, color=color, marker=marker, markersize=4, linestyle="none")
    front = sorted(x[:2] for x in timed if x[2]["front"] and x[2]["setting"] != SDPA)
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=0.9, zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes.xaxis)
        plain_ticks(axes.yaxis)
    axes.set_xlabel("milliseconds a call", fontsize=8, color=INK)
    style(axes, "error against time; the line: none is faster and better")


def feature_axis(axes: Axes, counts: Sequence[int]) -> None:
    """A logarithmic axis of numbers of features, a tick at each."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("random features", fontsize=8, color=INK)


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, also between powers of ten where it is short."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_tick_params(which="minor", labelsize=7.5)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        place = "outside lower center"
        figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=8)


def _distinct(rows: Iterable[Row], column: str) -> list[Any]:
    return list(dict.fromkeys(row[column] for row in rows))
