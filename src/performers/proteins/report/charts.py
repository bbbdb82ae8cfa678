"""Charts of the report as Vega-Lite specifications, drawn by the page and as PNG files.

Colours of categories follow Okabe and Ito (2008), those of values are perceptually uniform: both
survive colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
import vl_convert
from numpy.typing import NDArray

from performers.app.figures import PALETTE, shortened
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.relative_shares import RelativeShares
from performers.proteins.report.payload import JOINED

RESIDUE_ORDER = "CSTPAGNDEQHRKMILVFYW"
"""Amino acids as BLOSUM62 was printed (Henikoff and Henikoff, 1992), groups side by side."""

NAMES = dict(
    zip(
        AMINO_ACIDS,
        (
            *("alanine", "cysteine", "aspartate", "glutamate", "phenylalanine", "glycine"),
            *("histidine", "isoleucine", "lysine", "leucine", "methionine", "asparagine"),
            *("proline", "glutamine", "arginine", "serine", "threonine", "valine"),
            *("tryptophan", "tyrosine"),
        ),
        strict=True,
    )
)
"""Amino acids by letter."""

Chart = dict[str, Any]
CATEGORIES = {
    "light": (*PALETTE[:6], "#8c6d31", "#8a8a8a"),
    "dark": (
        *("#5fb0e8", "#ff9a4d", "#2fc49a", "#e29ac6"),
        *("#ffc14d", "#a8dcff", "#c9a66b", "#a0a0a0"),
    ),
}
"""Colours of categories on a light and on a dark page."""


@cache
def chart_script() -> str:
    """Vega, Vega-Lite and Vega-Embed (BSD-3-Clause) as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def png(chart: Chart) -> bytes:
    """A picture of a chart."""
    steps = {"width": chart["height"] if isinstance(chart["height"], dict) else 460}
    config = {**chart.get("config", {}), "range": {"category": list(CATEGORIES["light"])}}
    still = {**chart, **steps, "background": "white", "config": config}
    return vl_convert.vegalite_to_png(still, scale=2)


def map_chart(
    places: NDArray[np.float64],
    shares: Sequence[float],
    proteins: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
) -> tuple[Chart, list[Chart]]:
    """Proteins as points, coloured by surprise.

    Args:
        places: Coordinates, (proteins, 2).
        shares: Shares of the variance along the axes.
        proteins: Each with name, length, surprise and accuracy, and labels in `labels`.
        labels: Keys of the labels.

    Returns:
        The chart, and the encodings of the colour to choose from, each with its title.
    """
    points = [
        {**protein, "number": number, "x": round(float(x), 4), "y": round(float(y), 4)}
        for number, (protein, (x, y)) in enumerate(zip(proteins, places, strict=True))
    ]
    colours = [
        _colour("surprise", "surprise (bits)", "viridis"),
        _colour("length", "length (residues)", "viridis"),
    ]
    for number, label in enumerate(labels):
        values = (protein[f"label{number}"] for protein in proteins)
        colours.append(
            {
                "field": f"label{number}",
                "type": "nominal",
                "title": label,
                "scale": {"domain": sorted(dict.fromkeys(values), key=JOINED.__contains__)},
                "legend": {"labelLimit": 150, "symbolOpacity": 1},
            }
        )
    axes = {
        axis: {
            "field": axis,
            "type": "quantitative",
            "title": f"{name} main direction ({100 * share:.0f}% of the differences)",
            "axis": {"labels": False, "ticks": False, "grid": False},
            "scale": {"zero": False, "padding": 12},
        }
        for axis, name, share in zip("xy", ("first", "second"), shares, strict=True)
    }
    tooltip = [
        {"field": "name", "title": "protein"},
        {"field": "length", "title": "length", "type": "quantitative"},
        {"field": "surprise", "title": "surprise, bits", "format": ".2f", "type": "quantitative"},
        {"field": "accuracy", "title": "guessed right", "format": ".0%", "type": "quantitative"},
        *({"field": f"label{i}", "title": label} for i, label in enumerate(labels)),
    ]
    chart = {
        "description": "Map of the proteins. The table below has the same proteins.",
        "height": 400,
        "params": [{"name": "chosen", "value": -1}],
        "data": {"values": points},
        "mark": {"type": "circle", "opacity": 0.85, "cursor": "pointer"},
        "encoding": {
            **axes,
            "color": colours[0],
            "size": _where_chosen("number", 240, 70),
            "stroke": _where_chosen("number", PALETTE[1], None),
            "strokeWidth": {"value": 3},
            "tooltip": tooltip,
        },
    }
    return chart, colours


def similarity_chart(
    matrix: NDArray[np.float64], name: str, *, unit: str, limit: float | None = None
) -> Chart:
    """A similarity of the amino acids, in the order of `RESIDUE_ORDER`, without its diagonal.

    Args:
        matrix: (20, 20), in the order of `AMINO_ACIDS`.
        name: Heading.
        unit: Unit of the values.
        limit: End of the colour scale; the largest value by default.
    """
    values = [
        {
            "row": a,
            "column": b,
            "pair": f"{NAMES[a]} ({a}) and {NAMES[b]} ({b})",
            "value": round(float(value), 3) if math.isfinite(value) else None,
        }
        for a in RESIDUE_ORDER
        for b in RESIDUE_ORDER
        if a != b
        for value in [matrix[AMINO_ACIDS.index(a), AMINO_ACIDS.index(b)]]
    ]
    sizes = [abs(x["value"]) for x in values if isinstance(x["value"], float)]
    end = limit or max(sizes, default=1.0)
    axis = {"grid": False}
    letters: Chart = {
        "type": "nominal",
        "axis": axis,
        "sort": list(RESIDUE_ORDER),
        "scale": {"domain": list(RESIDUE_ORDER)},
        "title": None,
    }
    return {
        "description": f"{name}: similarity of each pair of amino acids.",
        "title": {"text": name, "anchor": "start"},
        "height": {"step": 15},
        "data": {"values": values},
        "mark": {"type": "rect", "invalid": None},
        "encoding": {
            "x": {
                **letters,
                "field": "column",
                "axis": {**axis, "orient": "top", "labelAngle": 0},
            },
            "y": {**letters, "field": "row"},
            "color": {
                "field": "value",
                "type": "quantitative",
                "title": unit,
                "scale": {"scheme": "blueorange", "reverse": True, "domain": [-end, end]},
                "legend": {"orient": "bottom", "gradientLength": 180},
            },
            "tooltip": [
                {"field": "pair", "title": "pair"},
                {"field": "value", "title": unit, "type": "quantitative"},
            ],
        },
    }


def track_chart() -> Chart:
    """Probability along one protein, whose residues the page puts in."""
    place: Chart = {"field": "place", "type": "quantitative", "title": "residue number"}
    place |= {"scale": {"nice": False, "zero": False}, "axis": {"tickMinStep": 1}}
    share = {"type": "quantitative", "scale": {"type": "sqrt", "domain": [0, 1]}}
    share |= {"title": "probability", "axis": {"format": ".0%", "values": [0, 0.05, 0.2, 0.5, 1]}}
    smooth = {"op": "mean", "field": "probability", "as": "smooth"}
    tooltip = [
        {"field": "residue", "title": "residue"},
        {"field": "probability", "title": "probability", "format": ".1%"},
        {"field": "others", "title": "likeliest others"},
    ]
    return {
        "description": "Probability of each residue along the protein.",
        "height": 150,
        "data": {"values": []},
        "params": [{"name": "chosen", "value": 0}],
        "encoding": {"x": place},
        "layer": [
            {
                "mark": "rule",
                "encoding": {
                    "y": {**share, "field": "probability"},
                    "y2": {"datum": 0},
                    "color": _where_chosen("place", PALETTE[1], PALETTE[5]),
                    "strokeWidth": _where_chosen("place", 4, 1.6),
                    "tooltip": tooltip,
                },
            },
            {
                "transform": [{"window": [smooth], "frame": [-7, 7]}],
                "mark": {"type": "line", "color": PALETTE[1], "strokeWidth": 2},
                "encoding": {"y": {**share, "field": "smooth"}},
            },
        ],
    }


def relatives_chart(read: RelativeShares, most: int = 40, columns: int = 300) -> Chart:
    """Attention of a protein's residues to its relatives, those that receive most.

    Args:
        read: The shares of attention.
        most: Most relatives that are drawn.
        columns: Most columns; of a longer protein each is the mean over neighbouring residues.
    """
    sequence = read.protein.sequence
    step = -(-len(sequence) // columns)
    order = np.argsort(-read.shares.mean(1), kind="stable")[:most]
    names = [f"{rank}. {shortened(read.names[n])}" for rank, n in enumerate(order, start=1)]
    values = [
        {
            "relative": name,
            "place": start + 1,
            "residue": f"{sequence[start : start + step]}{start + 1}",
            "share": round(float(read.shares[n, start : start + step].mean()), 4),
        }
        for name, n in zip(names, order, strict=True)
        for start in range(0, len(sequence), step)
    ]
    axis = {"labelOverlap": True, "labelAngle": 0}
    return {
        "description": "Share of each residue's attention that each relative receives.",
        "height": {"step": 14},
        "data": {"values": values},
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "place", "type": "ordinal", "title": "residue number", "axis": axis},
            "y": {"field": "relative", "type": "nominal", "sort": names, "title": None},
            "color": {
                "field": "share",
                "type": "quantitative",
                "title": "share of attention",
                "scale": {"scheme": "blues"},
                "legend": {"format": ".1%", "orient": "bottom", "gradientLength": 180},
            },
            "tooltip": [
                {"field": "relative"},
                {"field": "residue"},
                {"field": "share", "format": ".2%", "type": "quantitative"},
            ],
        },
    }


def learning_chart(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, baseline: float | None
) -> Chart | None:
    """One metric against the training step; None where no log has it.

    Args:
        histories: Model name to its log, see `curves`.
        metric: "loss" or "accuracy".
        baseline: The metric of guessing by frequencies alone, drawn as a dotted line.
    """
    values = [
        {"model": name, "part": shortened(split), "step": step, "value": value}
        for name, history in histories.items()
        for split, (steps, found) in curves(history, metric).items()
        for step, value in zip(steps, found, strict=True)
    ]
    if not values:
        return None
    series = {(value["model"], value["part"]) for value in values}
    names = {"loss": "loss (nats per residue)", "accuracy": "guessed right"}
    value_axis = {"type": "quantitative", "title": names[metric], "scale": {"zero": False}}
    if metric == "accuracy":
        value_axis["axis"] = {"format": ".0%"}
    step = {"field": "step", "type": "quantitative", "title": "training step"}
    lines: Chart = {
        "data": {"values": values},
        # A single point has no line to show it.
        "mark": {"type": "line", "point": len(values) == len(series), "strokeWidth": 1.6},
        "encoding": {
            "x": step,
            "y": {**value_axis, "field": "value"},
            "strokeDash": {
                "field": "part",
                "type": "nominal",
                "sort": None,
                "title": "proteins",
                "legend": {"symbolType": "stroke", "symbolStrokeColor": "#8a8a8a"},
            },
            "color": {
                "field": "model",
                "type": "nominal",
                "sort": None,
                "title": "model",
                "legend": {"symbolType": "stroke"},
            },
            "tooltip": [
                {"field": "model"},
                {"field": "part", "title": "proteins"},
                {"field": "step"},
                {"field": "value", "title": metric, "format": ".3f"},
            ],
        },
    }
    constant = {
        "data": {"values": [{"value": baseline}] if baseline is not None else []},
        "mark": {"type": "rule", "strokeDash": [2, 3], "color": "#8a8a8a"},
        "encoding": {"y": {**value_axis, "field": "value"}},
    }
    return {
        "description": f"{names[metric].capitalize()} against the training step.",
        "height": 240,
        "layer": [lines, constant],
        "config": {"legend": {"orient": "bottom", "labelLimit": 200, "columns": 2}},
    }


def curves(
    history: Sequence[Mapping[str, Any]], metric: str
) -> dict[str, tuple[list[float], list[float]]]:
    """The curves of one metric in a training log.

    Args:
        history: Dictionaries with "step" and any of "loss", "<split>_loss", "accuracy" and
            "<split>_accuracy", as in the `log_history` of transformers' trainer_state.json.
            "train_loss", a mean over the run, is left out.
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
                found.setdefault(split, {})[step] = float(value)
    return {
        split: (sorted(points), [points[step] for step in sorted(points)])
        for split, points in found.items()
    }


def _where_chosen(field: str, value: object, other: object) -> Chart:
    return {"condition": {"test": f"datum.{field} === chosen", "value": value}, "value": other}


def _colour(field: str, title: str, scheme: str) -> Chart:
    return {
        "field": field,
        "type": "quantitative",
        "title": title,
        "scale": {"scheme": scheme},
        "legend": {"gradientLength": 160},
    }


def _is_number(value: object) -> TypeGuard[float]:
    # A log may hold None or a string; True would pass for 1.
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
