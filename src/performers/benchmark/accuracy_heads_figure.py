"""Figures of errors on pretrained heads and of whole pretrained models."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from performers.benchmark.accuracy_approximations import SDPA
from performers.benchmark.accuracy_figure import (
    feature_axis,
    plain_ticks,
    small_multiples,
    style,
    two_and_five,
)
from performers.benchmark.accuracy_heads import MEAN
from performers.benchmark.accuracy_model import FINAL
from performers.benchmark.figure import INK, MARKERS, MUTED, PALETTE
from performers.benchmark.results import Results, Row

_PANEL = (4.6, 3.9)
# Zeros in place of the output have an error of 1; settings far worse would stretch the axis.
_WORST = 2.0


def heads_figure(results: Results) -> Figure:
    """Draw the heads part.

    Args:
        results: Of ``run_heads``, perhaps not finished.

    Returns:
        A figure: error by layer and error against the number of features for the settings with
        several numbers of features, and error against time for all settings with an error of at
        most 2, with the front of those that no other beats and the time of exact attention.
    """
    means = [row for row in results.rows if row["layer"] == MEAN]
    counted: dict[str, set[int]] = {}
    for row in results.rows:
        counted.setdefault(row["setting"], set()).add(row["num_features"])
    main = [name for name, counts in counted.items() if len(counts) > 1]
    middle = int(results.settings["num_features"])
    figure = small_multiples(1, 3, _PANEL)
    by_layer, by_count, by_time = figure.subplots(1, 3)
    _lines(
        by_layer,
        main,
        [row for row in results.rows if row["layer"] != MEAN and row["num_features"] == middle],
        "layer",
    )
    by_layer.set_xlabel("layer", fontsize=8, color=INK)
    by_layer.set_title(f"by layer, {middle} features", fontsize=9, color=INK)
    _lines(by_count, main, means, "num_features")
    by_count.set_title("mean over layers", fontsize=9, color=INK)
    if means:
        feature_axis(by_count, sorted(set().union(*(counted[name] for name in main))))
    _against_time(by_time, means, main)
    for axes in (by_layer, by_count):
        axes.set_ylabel("relative error of the output", fontsize=8, color=INK)
        axes.set_yscale("log")
        plain_ticks(axes)
    _legend(figure, by_count if means else by_layer, 3)
    return figure


def propagation_figure(results: Results) -> Figure:
    """Draw the model part.

    Args:
        results: Of ``run_propagation``, perhaps not finished.

    Returns:
        A figure: the error of the hidden states after each layer, a line for each setting.
    """
    rows = [row for row in results.rows if row["layer"] != FINAL]
    figure = small_multiples(1, 1, (6.4, 4.4))
    axes = figure.subplots()
    _lines(axes, list(dict.fromkeys(row["setting"] for row in rows)), rows, "layer")
    axes.set_xlabel("layer", fontsize=8, color=INK)
    axes.set_ylabel("relative error of the hidden states", fontsize=8, color=INK)
    axes.set_yscale("log")
    plain_ticks(axes)
    _legend(figure, axes, 2)
    return figure


def _lines(axes: Axes, names: list[str], rows: Iterable[Row], across: str) -> None:
    rows = list(rows)
    for number, name in enumerate(names):
        points = sorted(
            (row[across], row["error"])
            for row in rows
            if row["setting"] == name and row["error"] is not None
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **_look(number))
    style(axes)


def _look(number: int) -> dict[str, Any]:
    return {
        "color": PALETTE[number % len(PALETTE)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": "-" if number < len(PALETTE) else "--",
        "markersize": 4,
        "linewidth": 1.2,
    }


def _against_time(axes: Axes, means: list[Row], main: list[str]) -> None:
    timed = [
        row
        for row in means
        if row["seconds"] and row["error"] is not None and row["error"] <= _WORST
    ]
    for row in timed:
        if row["setting"] == SDPA:
            axes.axvline(1e3 * row["seconds"], color=MUTED, linestyle="--", linewidth=1)
            axes.annotate(
                "exact",
                (1e3 * row["seconds"], 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -8),
                textcoords="offset points",
                fontsize=7,
                color=MUTED,
            )
            continue
        place = main.index(row["setting"]) if row["setting"] in main else None
        axes.plot(
            1e3 * row["seconds"],
            row["error"],
            color=MUTED if place is None else PALETTE[place % len(PALETTE)],
            marker="." if place is None else MARKERS[place % len(MARKERS)],
            markersize=4,
            linestyle="none",
        )
    front = sorted(
        (1e3 * row["seconds"], row["error"])
        for row in timed
        if row["front"] and row["setting"] != SDPA
    )
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=INK, linewidth=0.9, zorder=1)
        axes.set_xscale("log")
        axes.set_yscale("log")
        plain_ticks(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(two_and_five))
    axes.set_xlabel("milliseconds a call", fontsize=8, color=INK)
    axes.set_title("error against time; the line: none is faster and better", fontsize=9, color=INK)
    style(axes)
    axes.tick_params(which="minor", labelsize=7.5)


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
        )
