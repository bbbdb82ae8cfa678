"""Figures of a study: accuracies with their spread, cost against length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import MUTED, new_figure
from performers.study.summary import Row
from performers.study.tables import OBJECTIVES, label

# Okabe and Ito (2008): told apart with any colour vision.
_COLOURS = {"test": "#0072B2", "ood": "#D55E00"}
_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
_MARKERS = "osD^v"


def accuracy_figure(rows: Sequence[Row], title: str) -> Figure:
    """A point per seed, a bar at the mean, the unigram baseline as a line; a panel an objective.

    Args:
        rows: Of ``summarise``; at least one.
        title: Heading.

    Returns:
        The figure.
    """
    objectives = list(dict.fromkeys(row.objective for row in rows))
    tallest = max(sum(row.objective == objective for row in rows) for objective in objectives)
    figure = new_figure((5.4 * len(objectives), 1.2 + 0.42 * tallest))
    axes = figure.subplots(1, len(objectives), squeeze=False)[0]
    for ax, objective in zip(axes, objectives, strict=True):
        shown = [row for row in rows if row.objective == objective]
        for number, (split, colour) in enumerate(_COLOURS.items()):
            baseline = 100 * shown[0].baseline[split, "accuracy"]
            ax.axvline(baseline, color=colour, linestyle=":", linewidth=1)
            for place, row in enumerate(shown):
                spread = row.scores[split, "accuracy"]
                height = place + 0.16 * (2 * number - 1)
                values = [100 * value for value in spread.values.values()]
                ax.plot(values, [height] * len(values), "o", color=colour, markersize=4, alpha=0.6)
                ax.plot([100 * spread.mean], [height], "|", color=colour, markersize=14, mew=2)
        ax.set_yticks(range(len(shown)), [label(row.attention) for row in shown])
        ax.invert_yaxis()
        ax.set_xlabel("accuracy, %")
        ax.set_title(OBJECTIVES[objective], fontsize=10)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    for split, colour in _COLOURS.items():
        axes[-1].plot([], [], "o", color=colour, label=split)
    axes[-1].plot([], [], ":", color=MUTED, label="unigram baseline")
    axes[-1].legend(frameon=False, fontsize=8, loc="best")
    figure.suptitle(title, fontsize=11)
    return figure


def contexts_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds and memory of a forward pass against length, on logarithmic axes."""
    figure = new_figure((9.6, 3.8))
    axes = figure.subplots(1, 2)
    attentions = list(dict.fromkeys(row["attention"] for row in rows))
    for ax, column, unit, text in (
        (axes[0], "seconds", 1.0, "seconds"),
        (axes[1], "peak_bytes", 2.0**30, "memory, GiB"),
    ):
        for number, attention in enumerate(attentions):
            points = sorted(
                (row["length"], row[column] / unit)
                for row in rows
                if row["attention"] == attention and row[column]
            )
            if points:
                ax.plot(
                    *zip(*points, strict=True),
                    marker=_MARKERS[number % len(_MARKERS)],
                    color=_LINES[number % len(_LINES)],
                    markersize=4,
                    label=label(attention),
                )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("tokens in one context")
        ax.set_ylabel(text)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
