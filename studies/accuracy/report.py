"""Tables and figures of the results of ``python -m studies.accuracy``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.table
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from performers.app.figures import INK, MUTED, new_figure, styled
from performers.benchmark.case import MEASURED, Row, select
from performers.benchmark.measure import Results
from performers.benchmark.plot import draw_lines, length_axis, look, shared_legend, style
from performers.features import ESTIMATORS, PROJECTIONS
from studies.accuracy.approximations import SDPA
from studies.accuracy.kernel import ISOTROPIC
from studies.accuracy.pretrained import FINAL, MEAN
from studies.pages import Table, digits, pivot

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
_OUTPUT = "relative error of the output"
# Zeros in place of the output have an error of 1; settings far worse would stretch the axis.
_WORST = 2.0


def tables(content: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of a command's ``results.json``, by name."""
    make = {
        "accuracy kernel": _kernel_tables,
        "accuracy heads": _heads_tables,
        "accuracy models": _models_tables,
        "accuracy plan": _plan_tables,
    }[content["benchmark"]]
    return make(content["rows"], content["settings"])


def console_tables(results: Results) -> list[rich.table.Table]:
    """The tables for the console; a caption gives the reason of each setting that failed."""
    made = tables(results.content())
    shown = [table.rich(name) for name, table in made.items() if table.rows]
    reasons: dict[str, str] = {}
    for row in results.rows:
        if row["status"] != MEASURED and "layer" in row:
            setting = f"{row['setting']}, {row['num_features']:,} features"
            reasons.setdefault(setting, f"layer {row['layer']}: {row['reason']}")
    if shown and reasons:
        shown[-1].caption = "\n".join(f"{name}: {reason}" for name, reason in reasons.items())
    return shown


def _kernel_tables(rows: list[Row], settings: Mapping[str, Any]) -> dict[str, Table]:
    """Means over draws of the output's squared error, medians of the kernel's relative one."""
    counts = sorted({row["num_features"] for row in rows})
    isotropic = [row for row in rows if row["data"].startswith(ISOTROPIC)]
    paper = [row for row in isotropic if (row["estimator"], row["projection"]) in _PAPER]
    most = select(isotropic, {"num_features": counts[-1]})
    middle = [
        {**row, "column": f"{row['data']}: {name}", "value": row[measure]}
        for row in select(
            rows, {"projection": "orthogonal", "num_features": counts[len(counts) // 2]}
        )
        if row not in isotropic
        for name, measure in (
            ("mean", "kernel_relative"),
            ("median", "kernel_relative_median"),
            ("output", "output_error_median"),
        )
    ]
    kinds = ("data", "estimator", "projection")
    return {
        "paper": pivot(paper, kinds, "num_features", lambda row: digits(row["output_mse"])),
        "estimators": pivot(
            most, kinds[:2], "projection", lambda row: digits(row["kernel_relative_median"])
        ),
        "anisotropic": pivot(middle, kinds[1:2], "column", lambda row: digits(row["value"])),
    }


def _heads_tables(rows: list[Row], settings: Mapping[str, Any]) -> dict[str, Table]:
    """Errors by layer, by number of features, and of the settings on the front with times."""
    means = [row for row in rows if row["layer"] == MEAN]
    some = [row for row in rows if row["num_features"] in (0, settings["num_features"])]
    front = sorted((row for row in means if row.get("front")), key=lambda row: row["seconds"])
    names = _with_several_counts(rows)
    counted = [row for row in means if row["setting"] in names]

    def error(row: Mapping[str, Any]) -> str:
        return digits(row["error"])

    lines = [
        [row["setting"], str(row["num_features"] or "")]
        + [digits(x) for x in (row["error"], 1e3 * row["seconds"], row["sdpa_ratio"])]
        for row in front
    ]
    columns = ("on the front", "features", "error", "ms a call", "SDPA / this")
    return {
        "layers": pivot(
            (row for row in some if row["setting"] != SDPA), ("setting",), "layer", error
        ),
        "counts": pivot(counted, ("setting",), "num_features", error),
        "front": Table(columns, lines),
    }


def _models_tables(rows: list[Row], settings: Mapping[str, Any]) -> dict[str, Table]:
    """Final hidden states and perplexity under each setting, after those of the model itself."""
    final = select(rows, {"layer": FINAL})
    lines = [
        [row["setting"], *(digits(row.get(x)) for x in ("error", "cosine", "replaced_perplexity"))]
        for row in final
    ]
    original = next((row["perplexity"] for row in final if row.get("perplexity")), None)
    columns = ["setting", "error of the hidden states", "cosine", "perplexity"]
    if original is None:
        return {"end": Table(columns[:-1], [line[:-1] for line in lines])}
    return {"end": Table(columns, [["exact attention", "0", "1", digits(original)], *lines])}


def _plan_tables(rows: list[Row], settings: Mapping[str, Any]) -> dict[str, Table]:
    """The setting that ``plan`` recommends for each layer, its promised and its measured error."""
    lines = [
        (
            f"{row['layer']}",
            f"{row['setting']}, {row['num_features']} features",
            digits(row["promised"]),
            digits(row["error"]),
            f"{row['error'] / row['promised']:.2f}",
        )
        for row in rows
        if row["status"] == MEASURED
    ]
    columns = ("layer", "recommended", "promised", "measured", "measured / promised")
    return {"layers": Table(columns, lines, names=2)}


def _with_several_counts(rows: Iterable[Row]) -> list[str]:
    """The settings that were measured with several numbers of features."""
    counts: dict[str, set[int]] = {}
    for row in rows:
        counts.setdefault(row["setting"], set()).add(row["num_features"])
    return [name for name, found in counts.items() if len(found) > 1]


@styled
def kernel_figure(results: Results) -> Figure:
    """Errors on random data against the number of features.

    Two lines of panels for each isotropic data, the error of the kernel matrix and that of the
    output: the paper's comparison, all estimators (trigonometric in the first panel alone), all
    projections of two of them. Then the kernel matrix of the anisotropic data. Lines are means over
    draws, bands go from the smallest draw to the largest.
    """
    names = list(dict.fromkeys(row["data"] for row in results.rows))
    isotropic = [name for name in names if name.startswith(ISOTROPIC)]
    grid = [
        [(name, *panel, measure) for panel in _PANELS]
        for name in isotropic
        for measure in ("kernel_mse", "output_mse")
    ]
    if others := [name for name in names if name not in isotropic]:
        grid.append([(name, "", *_PANELS[1][1:], "kernel_relative") for name in others])
    width, height = max(map(len, grid), default=1), max(len(grid), 1)
    figure = new_figure((3.5 * width, 2.9 * height))
    axes = figure.subplots(height, width, squeeze=False)
    for places, line in zip(axes, grid or [[]], strict=True):
        for place, (name, title, pairs, which, measure) in zip(places, line, strict=False):
            _draw_kernel(place, select(results.rows, {"data": name}), pairs, which, measure)
            style(place, f"{name}: {title}" if title else name)
            if place is places[0]:
                place.set_ylabel(_LABELS[measure])
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
    _plain_ticks(axes.yaxis)
    _feature_axis(axes, rows)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6.5)


@styled
def heads_figure(results: Results) -> Figure:
    """Errors on the heads of a model.

    By layer and against the number of features for the settings with several numbers of features;
    against time for all settings with an error of at most 2, with the front of those that no other
    beats and the time of exact attention.
    """
    means = select(results.rows, {"layer": MEAN})
    main = _with_several_counts(results.rows)
    middle = int(results.settings["num_features"])
    figure = new_figure((13.8, 3.9))
    by_layer, by_count, by_time = figure.subplots(1, 3)
    rows = [row for row in select(results.rows, {"num_features": middle}) if row["layer"] != MEAN]
    _draw_errors(by_layer, rows, "layer", main)
    style(by_layer, f"by layer, {middle} features")
    _draw_errors(by_count, means, "num_features", main)
    style(by_count, "mean over layers")
    if means:
        _feature_axis(by_count, [row for row in means if row["setting"] in main])
    _draw_times(by_time, means, main)
    shared_legend(figure, 3)
    return figure


def models_figure(results: Results) -> Figure:
    """The error of the hidden states after each layer, a line for each setting."""
    rows = [row for row in results.rows if row["layer"] != FINAL]
    names = list(dict.fromkeys(row["setting"] for row in rows))
    return _layers_figure(rows, names, "relative error of the hidden states")


def plan_figure(results: Results) -> Figure:
    """Promised and measured errors by layer."""
    rows = [
        {"layer": row["layer"], "error": row[column], "setting": name}
        for row in results.rows
        for name, column in (("promised", "promised"), ("measured", "error"))
    ]
    return _layers_figure(rows, ["promised", "measured"], _OUTPUT)


@styled
def _layers_figure(rows: Sequence[Row], names: list[str], label: str) -> Figure:
    figure = new_figure((6.4, 4.4))
    axes = figure.subplots()
    _draw_errors(axes, rows, "layer", names)
    axes.set_ylabel(label)
    style(axes)
    shared_legend(figure, 2)
    return figure


def _draw_errors(axes: Axes, rows: Sequence[Row], across: str, names: list[str]) -> None:
    draw_lines(axes, rows, across, "error", "setting", names)
    axes.set_yscale("log")
    _plain_ticks(axes.yaxis)
    axes.set_xlabel(across)
    axes.set_ylabel(_OUTPUT)


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
        looks: dict[str, Any] = {"color": MUTED, "marker": "."}
        if row["setting"] in main:
            looks = look(main.index(row["setting"]))
        axes.plot(time, value, **looks | {"markersize": 4, "linestyle": "none"})
    front = sorted(x[:2] for x in timed if x[2]["front"] and x[2]["setting"] != SDPA)
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=0.9, zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
    axes.set_xlabel("milliseconds a call")
    style(axes, "error against time; the line: none is faster and better")


def _feature_axis(axes: Axes, rows: Iterable[Row]) -> None:
    """A logarithmic axis of numbers of features, a tick at each."""
    length_axis(axes, [row["num_features"] for row in rows], "")
    axes.set_xlabel("random features")


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, also between powers of ten where it is short."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.set_tick_params(which="minor", labelsize=7.5)
