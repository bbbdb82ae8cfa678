"""The figure of a probe: each kind of features, each metric, spread over the splits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from performers.app.figures import INK, MUTED, PALETTE, new_figure, shortened, styled

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
# The model's features in blue, what they must beat in orange and greys.
_FIRST, _OTHERS = PALETTE[0], (PALETTE[4], "#999999", "#BBBBBB", "#D5D5D5")


@styled
def probe_figure(content: Mapping[str, Any]) -> Figure:
    """Draw means over the splits as bars, standard deviations as error bars, splits as dots.

    `content` is the result of `run_probe`. There is a panel for each metric, with what guessing
    scores as a dotted line.
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
            ax.bar(place, values["mean"], yerr=values["sd"], color=colour, width=0.7)
            dots = [place] * len(values["values"])
            ax.plot(dots, values["values"], ls="", marker="o", ms=2.5, color=INK, alpha=0.6)
        if guessing.get(metric) is not None:
            ax.axhline(guessing[metric], color=MUTED, linewidth=1.2, linestyle=":")
        names = [shortened(name, 24) for name in features]
        ax.set_xticks(range(len(names)), names, rotation=35, ha="right", rotation_mode="anchor")
        ax.set_title(METRICS[metric])
        ax.set_ylim(0, 1)
        ax.grid(axis="y")
    return figure
