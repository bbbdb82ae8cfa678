"""Bits per dimension of lossless files, and of a unigram."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from performers.streams.images import CentreCrops
from performers.streams.pictures import Picture
from studies.parts import Part

CODECS: dict[str, dict[str, Any]] = {
    "PNG": {"format": "PNG", "optimize": True},
    "WebP lossless": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}
"""Pillow's options of each codec: the smallest file that it makes."""


def file_bits(picture: Picture, codec: str) -> tuple[float, float]:
    """Bits per dimension of a file, and of the compressed pixels in it.

    The second leaves out what every file of the codec has: signature, header and the frames of
    chunks in PNG, the RIFF and chunk headers in WebP.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, **CODECS[codec])
    data = buffer.getvalue()
    size = _png_pixels(data) if codec == "PNG" else _webp_pixels(data)
    return 8 * len(data) / picture.size, 8 * size / picture.size


def unigram_bits(trained: Iterable[Picture], scored: Sequence[Picture]) -> list[float]:
    """Bits per dimension of each picture by the frequencies of values in others, plus one each."""
    counts = np.ones(256)
    for picture in trained:
        counts += np.bincount(picture.reshape(-1), minlength=256)
    bits = -np.log2(counts / counts.sum())
    return [float(bits[picture].mean()) for picture in scored]


def measure_codecs(trained: CentreCrops, scored: CentreCrops) -> Part:
    """Bits per dimension of each test picture by codec, whole and pixels alone, and unigram."""
    pictures = [scored.picture(index) for index in range(len(scored))]
    part: Part = {
        "unigram": unigram_bits(map(trained.picture, range(len(trained))), pictures),
    }
    for codec in CODECS:
        files = [file_bits(picture, codec) for picture in pictures]
        part[codec] = [whole for whole, _ in files]
        part[f"{codec}, pixels"] = [pixels for _, pixels in files]
    return part


def _png_pixels(data: bytes) -> int:
    """Bytes in IDAT chunks."""
    place, size = 8, 0
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        size += length if data[place + 4 : place + 8] == b"IDAT" else 0
        place += 12 + length
    return size


def _webp_pixels(data: bytes) -> int:
    """Bytes in the VP8L chunk of a file that has no other."""
    assert data[12:16] == b"VP8L", data[12:16]
    return int.from_bytes(data[16:20], "little")
