"""The figure of a probe: each kind of features, each metric, spread over the splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import INK, MUTED, new_figure, shortened

METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "macro_average_precision": "average precision",
    "micro_average_precision": "average precision, pooled",
    "macro_auroc": "AUROC",
    "micro_auroc": "AUROC, pooled",
}
"""Metrics in the order of tables and figures, and what they are called there."""

_DRAWN = ("accuracy", "macro_f1", "macro_average_precision", "macro_auroc")
# Okabe and Ito (2008): the model's own features in blue, what it must beat in greys and orange.
_FIRST, _OTHERS = "#0072B2", ("#E69F00", "#999999", "#BBBBBB", "#D5D5D5")


def probe_figure(content: Mapping[str, Any], *, title: str | None = None) -> Figure:
    """Draws means over the splits as bars, standard deviations as error bars, splits as dots.

    Args:
        content: What `run_probe` returned.
        title: Heading of the figure.

    Returns:
        The figure: a panel for each metric, with what guessing scores as a dotted line.
    """
    features: Mapping[str, Any] = content["features"]
    known = next(iter(features.values()))["metrics"]
    shown = [name for name in _DRAWN if name in known]
    shares = [label["share"] for label in content["labels"].values()]
    guessing = {
        "macro_auroc": 0.5,
        "macro_average_precision": sum(shares) / len(shares),
        "accuracy": content.get("majority_accuracy", {}).get("mean"),
    }
    figure = new_figure((3.0 * len(shown) + 0.4, 3.6))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for ax, metric in zip(panels, shown, strict=True):
        for place, found in enumerate(features.values()):
            values = found["metrics"][metric]
            colour = _FIRST if place == 0 else _OTHERS[(place - 1) % len(_OTHERS)]
            ax.bar(place, values["mean"], yerr=values["sd"], color=colour, width=0.7, capsize=3)
            dots = [place] * len(values["values"])
            ax.plot(dots, values["values"], ls="", marker="o", ms=2.5, color=INK, alpha=0.6)
        if guessing.get(metric) is not None:
            ax.axhline(guessing[metric], color=MUTED, linewidth=1.2, linestyle=":")
        # One number for each name: names come from callers and may hold what matplotlib reads.
        ax.set_xticks(range(len(features)), [""] * len(features))
        for place, name in enumerate(features):
            ax.annotate(
                shortened(name, 24),
                (place, 0),
                xytext=(3, -5),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=35,
                ha="right",
                va="top",
                fontsize=8,
                color=INK,
                parse_math=False,
            )
        ax.set_title(METRICS[metric], fontsize=10, color=INK)
        ax.set_ylim(0, 1)
        ax.grid(axis="y", color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8, color="#bbbbbb")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#bbbbbb")
    if title:
        figure.suptitle(shortened(title, 90), fontsize=11, color=INK, parse_math=False)
    return figure
