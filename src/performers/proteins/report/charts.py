"""Charts of the report as Vega-Lite specifications, drawn by the page and as PNG files.

Colours of categories follow Okabe and Ito (2008), those of values are perceptually uniform: both
survive colour blindness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import vl_convert
from numpy.typing import NDArray

from performers.app.figures import PALETTE, shortened
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.learnt import finite
from performers.proteins.reading.relative_shares import RelativeShares
from performers.proteins.report.payload import JOINED

RESIDUE_ORDER = "CSTPAGNDEQHRKMILVFYW"
"""Amino acids as BLOSUM62 was printed (Henikoff and Henikoff, 1992), groups side by side."""

_NAMES = """
alanine cysteine aspartate glutamate phenylalanine glycine histidine isoleucine lysine leucine
methionine asparagine proline glutamine arginine serine threonine valine tryptophan tyrosine
"""
NAMES = dict(zip(AMINO_ACIDS, _NAMES.split(), strict=True))
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

MOST_RELATIVES = 40
"""Relatives that are drawn."""
_COLUMNS = 300


@cache
def chart_script() -> str:
    """Vega, Vega-Lite and Vega-Embed (BSD-3-Clause) as one script."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def png(chart: Chart) -> bytes:
    """A picture of a chart."""
    steps = {"width": chart["height"] if isinstance(chart["height"], dict) else 460}
    config = {**chart.get("config", {}), "range": {"category": list(CATEGORIES["light"])}}
    still = {**chart, **steps, "background": "white", "config": config}
    return vl_convert.vegalite_to_png(finite(still), scale=2)


def map_chart(
    places: NDArray[np.float64],
    shares: Sequence[float],
    proteins: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
) -> tuple[Chart, list[Chart]]:
    """Proteins as points, coloured by surprise, and the encodings of the colour to choose from.

    Places are (proteins, 2), `shares` those of the variance along the axes. Proteins have values of
    the labels as `label0` and so on; `labels` are their headings.
    """
    points = [
        {**protein, "number": number, "x": round(float(x), 4), "y": round(float(y), 4)}
        for number, (protein, (x, y)) in enumerate(zip(proteins, places, strict=True))
    ]
    colours = [
        _field(
            name,
            title=f"{name} ({unit})",
            scale={"scheme": "viridis"},
            legend={"gradientLength": 160},
        )
        for name, unit in (("surprise", "bits"), ("length", "residues"))
    ]
    for number, label in enumerate(labels):
        values = dict.fromkeys(protein[f"label{number}"] for protein in proteins)
        scale = {"domain": sorted(values, key=JOINED.__contains__)}
        legend = {"labelLimit": 150, "symbolOpacity": 1}
        colours.append(_field(f"label{number}", "nominal", title=label, scale=scale, legend=legend))
    axes = {
        axis: _field(
            axis,
            title=f"{name} main direction ({100 * share:.0f}% of the differences)",
            axis={"labels": False, "ticks": False, "grid": False},
            scale={"zero": False, "padding": 12},
        )
        for axis, name, share in zip("xy", ("first", "second"), shares, strict=True)
    }
    tooltip = [
        {"field": "name", "title": "protein"},
        _field("length", title="length"),
        _field("surprise", title="surprise, bits", format=".2f"),
        _field("accuracy", title="guessed right", format=".0%"),
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

    The matrix is (20, 20), in the order of `AMINO_ACIDS`; the colour scale ends at `limit`, the
    largest value by default.
    """
    values: list[Chart] = [
        {
            "row": a,
            "column": b,
            "pair": f"{NAMES[a]} ({a}) and {NAMES[b]} ({b})",
            "value": round(float(matrix[AMINO_ACIDS.index(a), AMINO_ACIDS.index(b)]), 3),
        }
        for a in RESIDUE_ORDER
        for b in RESIDUE_ORDER
        if a != b
    ]
    end = limit or max(abs(x["value"]) for x in values)
    order = list(RESIDUE_ORDER)
    letters: Chart = {"sort": order, "scale": {"domain": order}, "title": None}
    top = {"grid": False, "orient": "top", "labelAngle": 0}
    return {
        "description": f"{name}: similarity of each pair of amino acids.",
        "title": {"text": name, "anchor": "start"},
        "height": {"step": 15},
        "data": {"values": values},
        "mark": {"type": "rect", "invalid": None},
        "encoding": {
            "x": _field("column", "nominal", **letters, axis=top),
            "y": _field("row", "nominal", **letters, axis={"grid": False}),
            "color": _field(
                "value",
                title=unit,
                scale={"scheme": "blueorange", "reverse": True, "domain": [-end, end]},
                legend={"orient": "bottom", "gradientLength": 180},
            ),
            "tooltip": [{"field": "pair", "title": "pair"}, _field("value", title=unit)],
        },
    }


def track_chart() -> Chart:
    """Probability along one protein, whose residues the page puts in."""
    place = _field(
        "place",
        title="residue number",
        scale={"nice": False, "zero": False},
        axis={"tickMinStep": 1},
    )
    share: Chart = {
        "title": "probability",
        "scale": {"type": "sqrt", "domain": [0, 1]},
        "axis": {"format": ".0%", "values": [0, 0.05, 0.2, 0.5, 1]},
    }
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
                    "y": _field("probability", **share),
                    "y2": {"datum": 0},
                    "color": _where_chosen("place", PALETTE[1], PALETTE[5]),
                    "strokeWidth": _where_chosen("place", 4, 1.6),
                    "tooltip": tooltip,
                },
            },
            {
                "transform": [{"window": [smooth], "frame": [-7, 7]}],
                "mark": {"type": "line", "color": PALETTE[1], "strokeWidth": 2},
                "encoding": {"y": _field("smooth", **share)},
            },
        ],
    }


def relatives_chart(read: RelativeShares) -> Chart:
    """Attention of a protein's residues to its relatives, those that receive most.

    Of a long protein each column is the mean over neighbouring residues.
    """
    sequence = read.protein.sequence
    step = -(-len(sequence) // _COLUMNS)
    order = np.argsort(-read.shares.mean(1), kind="stable")[:MOST_RELATIVES]
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
            "x": _field("place", "ordinal", title="residue number", axis=axis),
            "y": _field("relative", "nominal", sort=names, title=None),
            "color": _field(
                "share",
                title="share of attention",
                scale={"scheme": "blues"},
                legend={"format": ".1%", "orient": "bottom", "gradientLength": 180},
            ),
            "tooltip": [
                {"field": "relative"},
                {"field": "residue"},
                _field("share", format=".2%"),
            ],
        },
    }


def learning_chart(
    histories: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, baseline: float
) -> Chart | None:
    """A metric, "loss" or "accuracy", against the training step; None where no log has it.

    A log has dictionaries with "step" and any of "loss", "<split>_loss", "accuracy" and
    "<split>_accuracy", as in the `log_history` of transformers' trainer_state.json. The metric of
    guessing by frequencies alone, `baseline`, is a dotted line.
    """
    points: dict[tuple[str, str, float], float] = {}
    for name, history in histories.items():
        for entry in history:
            for key, value in entry.items():
                split = _split(key, metric)
                if split and math.isfinite(value):
                    # The last value wins where a resumed run logged a step again.
                    points[name, split, entry["step"]] = float(value)
    if not points:
        return None
    values = [
        {"model": name, "part": shortened(split), "step": step, "value": value}
        for (name, split, step), value in points.items()
    ]
    series = {(name, split) for name, split, _ in points}
    names = {"loss": "loss (nats per residue)", "accuracy": "guessed right"}
    value_axis: Chart = {"title": names[metric], "scale": {"zero": False}}
    if metric == "accuracy":
        value_axis["axis"] = {"format": ".0%"}
    dashes = {"symbolType": "stroke", "symbolStrokeColor": "#8a8a8a"}
    colours = {"symbolType": "stroke"}
    lines: Chart = {
        "data": {"values": values},
        # A single point has no line to show it.
        "mark": {"type": "line", "point": len(values) == len(series), "strokeWidth": 1.6},
        "encoding": {
            "x": _field("step", title="training step"),
            "y": _field("value", **value_axis),
            "strokeDash": _field("part", "nominal", sort=None, title="proteins", legend=dashes),
            "color": _field("model", "nominal", sort=None, title="model", legend=colours),
            "tooltip": [
                {"field": "model"},
                {"field": "part", "title": "proteins"},
                {"field": "step"},
                {"field": "value", "title": metric, "format": ".3f"},
            ],
        },
    }
    constant = {
        "data": {"values": [{"value": baseline}]},
        "mark": {"type": "rule", "strokeDash": [2, 3], "color": "#8a8a8a"},
        "encoding": {"y": _field("value", **value_axis)},
    }
    return {
        "description": f"{names[metric].capitalize()} against the training step.",
        "height": 240,
        "layer": [lines, constant],
        "config": {"legend": {"orient": "bottom", "labelLimit": 200, "columns": 2}},
    }


def _split(key: str, metric: str) -> str | None:
    """Name of the split that an entry of a log is of; None of another metric.

    "train" for the bare metric, "validation" for "eval_<metric>". "train_loss", a mean over the
    run, is left out.
    """
    if key == metric:
        return "train"
    if not key.endswith(f"_{metric}") or key == "train_loss" or "baseline" in key:
        return None
    split = key.removesuffix(f"_{metric}").removeprefix("eval_")
    return "validation" if split == "eval" else split


def _where_chosen(field: str, value: object, other: object) -> Chart:
    return {"condition": {"test": f"datum.{field} === chosen", "value": value}, "value": other}


def _field(name: str, kind: str = "quantitative", **more: Any) -> Chart:
    """The encoding of a field of the data."""
    return {"field": name, "type": kind, **more}
