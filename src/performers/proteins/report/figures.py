"""Figures of the protein report: attention maps, amino-acid similarity, learning curves.

Each function returns a matplotlib `Figure` of its own, drawn without pyplot, so that nothing
global is touched and any number of figures can be made at a time. Colours follow Okabe and Ito
(2008) for categories and perceptually uniform maps for values; both survive colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from performers.app.figures import (
    INK,
    MUTED,
    figure_to_data_uri,
    new_figure,
    save_figure,
    shortened,
)
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.report.attention_figure import attention_maps_figure

__all__ = [
    "RESIDUE_ORDER",
    "attention_maps_figure",
    "curves",
    "figure_to_data_uri",
    "learning_curve_figure",
    "save_figure",
    "similarity_figure",
]

RESIDUE_ORDER = "CSTPAGNDEQHRKMILVFYW"
"""Amino acids as BLOSUM62 was printed (Henikoff and Henikoff, 1992), groups side by side."""

_GROUP_SIZES = (1, 5, 4, 3, 4, 3)
_PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = (("-", ""), ("--", "o"), ("-.", "s"), (":", "^"), ((0, (5, 1, 1, 1, 1, 1)), "D"))
_MARKERS_AT_MOST = 40


def similarity_figure(
    similarities: Mapping[str, NDArray[np.float64]],
    reference: NDArray[np.float64],
    *,
    reference_name: str = "BLOSUM62",
    unit: str = "correlation over heads",
    title: str | None = None,
) -> Figure:
    """Draws similarity matrices of the amino acids beside a reference, all in one order.

    The order is `RESIDUE_ORDER`; lines part its physicochemical groups. Blue is similar, orange
    is not, white is 0. The diagonal, which is not compared, is left grey, and so is what is NaN.

    Args:
        similarities: Heading to (20, 20) similarities in the order of `AMINO_ACIDS`.
        reference: (20, 20) scores in the order of `AMINO_ACIDS`.
        reference_name: Heading of the reference.
        unit: What the similarities are, -1 to 1.
        title: Heading of the figure.

    Returns:
        The figure.

    Raises:
        ValueError: If a matrix is not (20, 20).
    """
    panels: list[tuple[str, NDArray[np.float64], float | None, str]] = [
        (name, matrix, 1.0, unit) for name, matrix in similarities.items()
    ]
    panels.append((reference_name, reference, None, "score"))
    figure = new_figure((3.7 * len(panels), 4.0))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    order = [AMINO_ACIDS.index(letter) for letter in RESIDUE_ORDER]
    for ax, (name, matrix, limit, meaning) in zip(axes, panels, strict=True):
        if matrix.shape != (len(order), len(order)):
            raise ValueError(f"the matrix {name!r} must be (20, 20), got {matrix.shape}")
        drawn = np.array(matrix, dtype=float)[np.ix_(order, order)]
        np.fill_diagonal(drawn, np.nan)
        limit = float(np.nanmax(np.abs(drawn))) if limit is None else limit
        image = ax.imshow(drawn, cmap=_diverging(), vmin=-limit, vmax=limit)
        ax.set_xticks(range(len(order)), RESIDUE_ORDER, fontsize=8)
        ax.set_yticks(range(len(order)), RESIDUE_ORDER, fontsize=8)
        ax.tick_params(length=0, labeltop=True, labelbottom=False, pad=2)
        for edge in np.cumsum(_GROUP_SIZES)[:-1] - 0.5:
            ax.axhline(edge, color="#555555", linewidth=0.6)
            ax.axvline(edge, color="#555555", linewidth=0.6)
        ax.spines[:].set(color="#bbbbbb", linewidth=0.6)
        ax.set_title(shortened(name), fontsize=10, color=INK, pad=6, parse_math=False)
        bar = figure.colorbar(image, ax=ax, location="bottom", shrink=0.75, aspect=30, pad=0.03)
        bar.set_label(meaning, fontsize=8)
        bar.locator = MaxNLocator(4, integer=limit > 1)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    _title(figure, title)
    return figure


def learning_curve_figure(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    baseline_loss: float | None = None,
    baseline_accuracy: float | None = None,
    title: str | None = None,
) -> Figure:
    """Draws loss and accuracy against the training step for several models.

    Args:
        histories: Model name to its log: dictionaries with "step" and any of "loss",
            "<split>_loss", "accuracy" and "<split>_accuracy", as in the `log_history` of
            transformers' trainer_state.json. "train_loss", a mean over the run, is left out.
        baseline_loss: Loss of the unigram baseline, nats per residue; a dotted line.
        baseline_accuracy: Accuracy of the unigram baseline, in [0, 1]; a dotted line.
        title: Heading of the figure.

    Returns:
        The figure; the panel of accuracy is there only if some history has one.
    """
    losses = {name: curves(history, "loss") for name, history in histories.items()}
    accuracies = {name: curves(history, "accuracy") for name, history in histories.items()}
    panels = [("loss (nats per residue)", losses, baseline_loss)]
    if any(accuracies.values()):
        panels.append(("accuracy", accuracies, baseline_accuracy))
    figure = new_figure((5.0 * len(panels), 3.7))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    splits = list(dict.fromkeys(s for _, data, _ in panels for c in data.values() for s in c))
    styles = {
        split: _LINES[i % len(_LINES)] for i, split in enumerate(sorted(splits, key=_split_rank))
    }
    for ax, (label, data, baseline) in zip(axes, panels, strict=True):
        for colour, by_split in zip(_colours(len(data)), data.values(), strict=True):
            for split, (steps, values) in by_split.items():
                dash, marker = styles[split]
                if len(steps) > _MARKERS_AT_MOST:
                    marker = ""
                elif len(steps) == 1:
                    # A single point has no line to show it.
                    marker = marker or "o"
                # Training loss is noisy: thin and pale, it does not hide the other splits.
                width, alpha = (1.0, 0.55) if split == "train" else (1.6, 1.0)
                ax.plot(
                    steps,
                    values,
                    color=colour,
                    ls=dash,
                    marker=marker,
                    lw=width,
                    ms=3.5,
                    alpha=alpha,
                )
        if baseline is not None and math.isfinite(baseline):
            ax.axhline(baseline, color=MUTED, linewidth=1.2, linestyle=":")
        ax.set_xlabel("training step", fontsize=9, color=INK)
        ax.set_ylabel(label, fontsize=9, color=INK)
        ax.grid(color="#e4e4e4", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8, color="#bbbbbb")
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#bbbbbb")
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        if label == "accuracy":
            ax.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    names = [
        (name, Line2D([], [], color=colour, lw=3))
        for name, colour in zip(histories, _colours(len(histories)), strict=True)
    ]
    lines = [
        (split, Line2D([], [], color=INK, ls=dash, marker=marker, lw=1.4, ms=3.5))
        for split, (dash, marker) in styles.items()
    ]
    if baseline_loss is not None or baseline_accuracy is not None:
        lines.append(("unigram baseline", Line2D([], [], color=MUTED, lw=1.2, ls=":")))
    _legend(figure, names, "outside upper center", 2 * len(panels))
    _legend(figure, lines, "outside lower center", 2 * len(panels))
    _title(figure, title)
    return figure


def curves(
    history: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of one metric in a training log.

    Args:
        history: Dictionaries with "step" and metrics; see `learning_curve_figure`.
        metric: "loss" or "accuracy".

    Returns:
        Name of the split to (steps, values), finite values only; "train" for the bare metric and
        "validation" for "eval_<metric>".
    """
    found: dict[str, dict[float, float]] = {}
    for entry in history:
        step = entry.get("step")
        for key, value in entry.items():
            if key == metric:
                split = "train"
            elif key.endswith(f"_{metric}") and key != "train_loss" and "baseline" not in key:
                split = key.removesuffix(f"_{metric}").removeprefix("eval_")
                split = "validation" if split == "eval" else split
            else:
                continue
            if _is_number(step) and _is_number(value):
                # The last value wins where a resumed run logged a step again.
                found.setdefault(split, {})[step] = value
    return {
        split: (sorted(points), [points[step] for step in sorted(points)])
        for split, points in found.items()
    }


def _is_number(value: object) -> TypeGuard[float]:
    # A log may hold None or a string; True would pass for 1.
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _split_rank(split: str) -> tuple[int, str]:
    known = ("train", "validation", "test", "ood")
    return (known.index(split) if split in known else len(known), split)


def _colours(count: int) -> list[str]:
    return [_PALETTE[i % len(_PALETTE)] for i in range(count)]


def _legend(
    figure: Figure, entries: Sequence[tuple[str, Line2D]], place: str, columns: int
) -> None:
    if not entries:
        return
    # Placeholders first: matplotlib drops labels that begin with an underscore and reads "$" as
    # mathematics, and the names come from users.
    legend = figure.legend(
        [line for _, line in entries],
        [str(number) for number in range(len(entries))],
        loc=place,
        ncols=min(columns, len(entries)),
        fontsize=8.5,
        frameon=False,
    )
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(shortened(name))


def _title(figure: Figure, title: str | None) -> None:
    if title:
        figure.suptitle(shortened(title, 90), fontsize=11, color=INK, parse_math=False)


def _diverging() -> Colormap:
    """Orange, white, blue; grey where undefined."""
    stops = ["#8c2d04", "#d95f0e", "#fdbe85", "#ffffff", "#9ecae1", "#3182bd", "#08306b"]
    return LinearSegmentedColormap.from_list("similarity", stops).with_extremes(bad="#d9d9d9")
