"""Tables and figure of ``python -m studies.images``."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from statistics import fmean

from matplotlib.figure import Figure

from performers.app.figures import MUTED, PALETTE, add_legend, new_figure, styled
from studies.images.codecs import CODECS
from studies.images.models import Size, contestants
from studies.images.training import GROUP
from studies.pages import Table
from studies.parts import Part

FLOORS, COMPLETIONS = "codecs", "completions"
"""Names of the parts that are no contestants."""

# Groups of pictures in a point of the figure.
_SPAN = 4


def tables(size: Size, parts: Mapping[str, Part]) -> dict[str, Table]:
    """Bits per dimension, floors and completions, as far as they are measured."""
    made: dict[str, Table] = {}
    trained = {name: parts[name] for name in contestants(size) if name in parts}
    floors = parts.get(FLOORS)
    if trained:
        common = min(len(part["bits"]) for part in trained.values())
        png = fmean(floors["PNG"][:common]) if floors else None
        made["contestants"] = Table.of(
            {
                "attention": name,
                "steps": f"{part['steps']:,}",
                "s a step": f"{part['processor_seconds'] / part['steps']:.2f}",
                "million positions": f"{part['steps'] * size.length / 1e6:.2f}",
                f"bits/dim, first {common}": f"{fmean(part['bits'][:common]):.2f}",
                "to PNG": f"{fmean(part['bits'][:common]) - png:+.2f}" if png else "",
                "bits/dim, all scored": f"{fmean(part['bits']):.2f} ({len(part['bits'])})",
            }
            for name, part in trained.items()
        )
    if floors:
        files = [("unigram of the training pictures", f"{fmean(floors['unigram']):.2f}", "")]
        for codec in CODECS:
            whole, pixels = (fmean(floors[name]) for name in (codec, f"{codec}, pixels"))
            files.append((codec, f"{whole:.2f}", f"{pixels:.2f}"))
        headings = ("", "bits/dim, whole file", "compressed pixels alone")
        made["codecs"] = Table(headings, files)
    if part := parts.get(COMPLETIONS):
        drawn = part["pictures"] * part["samples"]
        cells = {
            "attention": part["contestant"],
            "values each": f"{part['values']:,}",
            "pictures": str(drawn),
            "seconds": f"{part['seconds']:.0f}",
            "ms a value": f"{1e3 * part['seconds'] / part['values'] / drawn:.2f}",
            "state, KiB": f"{part['cache_bytes'] / 1024:,.0f}",
            "keys and values, KiB": f"{part['exact_bytes'] / 1024:,.0f}",
        }
        made["completions"] = Table.of([cells])
    return made


@styled
def curves(size: Size, parts: Mapping[str, Part]) -> Figure:
    """Bits per dimension in training against processor time, with the files' sizes as lines.

    A point is the mean over 20 pictures, or over 5 of a model that was trained on few.
    """
    figure = new_figure((7.0, 4.6))
    axes = figure.add_subplot()
    entries = []
    for number, (name, colour) in enumerate(zip(contestants(size), cycle(PALETTE), strict=False)):
        part = parts[name]
        seconds = GROUP * part["processor_seconds"] / part["steps"]
        bits = part["curve"]
        span = _SPAN if len(bits) > 2 * _SPAN else 1
        ends = range(span, len(bits) + 1)
        means = [fmean(bits[end - span : end]) for end in ends]
        times = [seconds * (end - span / 2) for end in ends]
        marker = "osv^D<>P"[number % 8]
        style = "-" if number < len(PALETTE) else "--"
        (line,) = axes.plot(
            times, means, color=colour, marker=marker, markevery=0.15, linestyle=style
        )
        entries.append((name, line))
    for codec in ("unigram", *CODECS):
        height = fmean(parts[FLOORS][codec])
        axes.axhline(height, color=MUTED, linestyle="--", linewidth=0.8)
        axes.text(size.seconds, height, codec, color=MUTED, ha="right", va="bottom")
    axes.set_xlabel("processor seconds of training")
    axes.set_ylabel("bits per dimension")
    add_legend(figure, entries, "outside lower center", 2)
    return figure
