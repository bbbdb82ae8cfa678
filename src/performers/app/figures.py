"""What all figures share: making them without pyplot, writing them to files and data URIs."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from performers.app.files import write_atomically

INK, MUTED = "#222222", "#767676"
"""Colours of text and of what stands behind the data."""

_MEDIA_TYPES = {"png": "image/png", "svg": "image/svg+xml"}
# A creation date would make two runs of the same data differ.
_METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}


def new_figure(size: tuple[float, float], *, arrange: bool = True) -> Figure:
    """An empty white figure of a size in inches.

    Args:
        size: Width and height.
        arrange: Whether axes are moved so that labels do not overlap; otherwise they stay where
            they are put.

    Returns:
        The figure.
    """
    engine = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, wspace=0.04) if arrange else None
    figure = Figure(figsize=size, layout=engine, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def shortened(name: str, length: int = 48) -> str:
    """A name of at most `length` characters, on one line."""
    printable = "".join(c if c.isprintable() else " " for c in name)
    return printable if len(printable) <= length else printable[: length - 1] + "…"


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 144) -> Path:
    """Writes a figure whole or not at all.

    Args:
        figure: The figure.
        path: The file, whose suffix (.png, .svg or .pdf) is its format; one that exists is
            replaced, missing folders are made.
        dpi: Pixels per inch, for pixels.

    Returns:
        The path.

    Raises:
        ValueError: If the suffix is another.
    """
    path = Path(path)
    image_format = path.suffix.removeprefix(".").lower()
    if image_format not in _METADATA:
        raise ValueError(f"path must end with .png, .svg or .pdf, got {path.name!r}")
    write_atomically(path, _render(figure, image_format, dpi))
    return path


def figure_to_data_uri(figure: Figure, *, image_format: str = "png", dpi: int = 144) -> str:
    """The figure as a data URI, to be the source of an HTML image.

    Args:
        figure: The figure.
        image_format: "png", or "svg" for drawings of few elements.
        dpi: Pixels per inch, for "png".

    Returns:
        The URI.

    Raises:
        ValueError: If `image_format` is another.
    """
    if image_format not in _MEDIA_TYPES:
        raise ValueError(
            f"image_format must be one of {', '.join(_MEDIA_TYPES)}; got {image_format!r}"
        )
    return _data_uri(_render(figure, image_format, dpi), image_format)


class Pictures:
    """A folder of PNG files, each handed out as a data URI as well.

    Args:
        folder: The folder; made when the first picture comes.
        dpi: Pixels per inch.
    """

    def __init__(self, folder: str | os.PathLike[str], *, dpi: int = 120) -> None:
        self.folder = Path(folder)
        self.dpi = dpi

    def add(self, name: str, figure: Figure) -> str:
        """Writes the figure to `<name>.png`, replacing one that exists, and returns its URI."""
        data = _render(figure, "png", self.dpi)
        write_atomically(self.folder / f"{name}.png", data)
        return _data_uri(data, "png")


def _render(figure: Figure, image_format: str, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=image_format, dpi=dpi, metadata=_METADATA[image_format])
    return buffer.getvalue()


def _data_uri(data: bytes, image_format: str) -> str:
    encoded = base64.b64encode(data).decode("ascii")
    return f"data:{_MEDIA_TYPES[image_format]};base64,{encoded}"
