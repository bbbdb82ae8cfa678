"""Figures: one style, made without pyplot, written to files."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from performers.app.files import write_atomically

INK, MUTED = "#222222", "#767676"
"""Colours of text and of what stands behind the data."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that can be told apart with any colour vision (Okabe and Ito 2008)."""

_STYLE = Path(__file__).with_suffix(".mplstyle")
# A creation date would make two runs of the same data differ.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}

_P = ParamSpec("_P")
_T = TypeVar("_T")


def styled(draw: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate a function that draws: inside it, matplotlib's settings are those of the style."""

    @wraps(draw)
    def in_style(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with style.context(_STYLE):
            return draw(*args, **kwargs)

    return in_style


def new_figure(
    size: tuple[float, float], *, title: str | None = None, arrange: bool = True
) -> Figure:
    """An empty figure of a size in inches; ``arrange`` moves axes so that no labels overlap."""
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04) if arrange else None
    figure = Figure(figsize=size, layout=engine)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(shortened(title, 90), color=INK)
    return figure


def add_legend(
    figure: Figure, entries: Sequence[tuple[str, Any]], place: str, columns: int
) -> None:
    """Add a legend of (name, line) entries outside the axes."""
    if not entries:
        return
    # Placeholders first: matplotlib drops labels that begin with an underscore.
    legend = figure.legend(
        [line for _, line in entries],
        [str(number) for number in range(len(entries))],
        loc=place,
        ncols=min(columns, len(entries)),
    )
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_text(shortened(name))


def shortened(name: str, length: int = 48) -> str:
    """A name of at most `length` characters, on one line."""
    printable = "".join(c if c.isprintable() else " " for c in name)
    return printable if len(printable) <= length else printable[: length - 1] + "…"


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure to a file, which is returned, whole or not at all; make missing folders.

    Raises:
        ValueError: The suffix is none of .png, .svg and .pdf.
    """
    path = Path(path)
    image_format = path.suffix.removeprefix(".").lower()
    if image_format not in _METADATA:
        raise ValueError(f"path must end with .png, .svg or .pdf, got {path.name!r}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=image_format, dpi=144, metadata=_METADATA[image_format])
    write_atomically(path, buffer.getvalue())
    return path
