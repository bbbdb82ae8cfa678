"""Pictures as rows of pixel values in raster order, channels innermost: 64 x 64 x 3 = 12,288.

A row predicts value ``t`` from the values before it. Its inputs begin with the token ``BEGIN`` and
are one place behind its labels, so that position ``t``, the one that axial tables with the shape
``(rows, columns, channels)`` know, is that of the value which is predicted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from performers.app.errors import UserError
from performers.streams.pictures import Picture, Pictures

BEGIN = 256
"""First token of each row, after the 256 values."""
VOCABULARY = 257
"""The values and ``BEGIN``."""
REDUCTION = 1.5
"""Least ratio of a crop's sides to those of the picture that is made of it."""

# Of the area of a photograph, and of the ratio of its sides.
_LEAST_AREA = 0.5
_RATIO = 4 / 3
_TRIES = 10


def least_side(size: int) -> int:
    """Least rows and columns of a photograph, so that every crop is downsampled by ``REDUCTION``.

    Pictures at their native resolution are another distribution: they cost a lossless codec about
    three quarters of the bits.
    """
    return math.ceil(REDUCTION * size)


def split_pictures(pictures: Pictures, test: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for testing: whole pictures, before any crop.

    The test pictures are those whose keys have the smallest hashes with the seed: photographs
    whatever their files are named, pictures of arrays by their index.

    Raises:
        UserError: No picture would be left for training, or none for testing.
    """
    if not 0 < test < len(pictures):
        raise UserError(
            f"{test} test pictures of {len(pictures)} leave none for one of both; give fewer test "
            "pictures, at least 1, or more pictures"
        )

    def draw(index: int) -> bytes:
        return hashlib.sha256(f"{seed}:{pictures.key(index)}".encode()).digest()

    order = sorted(range(len(pictures)), key=draw)
    return sorted(order[test:]), sorted(order[:test])


def pixel_row(picture: Picture) -> dict[str, Tensor]:
    """The row of a picture.

    Returns:
        ``input_ids``, the token ``BEGIN`` and all values but the last, and the values as ``labels``
        and ``shift_labels``, which models leave in their places; int64, ``(rows * columns * 3,)``.
    """
    values = torch.from_numpy(picture.reshape(-1).astype(np.int64))
    inputs = torch.cat((values.new_tensor([BEGIN]), values[:-1]))
    return {"input_ids": inputs, "labels": values, "shift_labels": values}


def row_picture(values: Tensor, size: int) -> Picture:
    """The picture ``(size, size, 3)`` of values ``(size * size * 3,)``, without ``BEGIN``.

    Raises:
        ValueError: The number of values differs, or one is outside 0..255.
    """
    if values.shape != (3 * size * size,) or int(values.min()) < 0 or int(values.max()) > 255:
        raise ValueError(
            f"values must be {3 * size * size} integers from 0 to 255, got shape "
            f"{tuple(values.shape)} from {int(values.min())} to {int(values.max())}"
        )
    return values.to(torch.uint8).cpu().numpy().reshape(size, size, 3)


class RandomCrops(Dataset[dict[str, Tensor]]):
    """Rows of random crops and flips, box-downsampled; the same ones whenever they are read.

    Place ``p`` of training is the ``p mod n``-th of ``n`` pictures in an order that is drawn anew
    for each pass; its crop is drawn from the seed and ``p``. A run that resumes at a place goes on
    as it would have. Crops have half of the photograph's area or more, sides whose ratio is at most
    4/3, and ``least_side(size)`` rows and columns at least; where none of ten draws fits, as in a
    panorama, the largest square in the middle is taken. Whole pictures are only flipped.

    Args:
        pictures: The pictures.
        indices: Those to train on.
        size: Rows and columns of the pictures that are made.
        seed: Random seed.
        places: Number of rows.
    """

    def __init__(
        self, pictures: Pictures, indices: Sequence[int], *, size: int, seed: int, places: int
    ) -> None:
        self.pictures, self.indices = pictures, tuple(indices)
        self.size, self.seed, self.places = size, seed, places

    def __len__(self) -> int:
        return self.places

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return pixel_row(self.picture(place))

    def picture(self, place: int) -> Picture:
        """The picture at a place, ``(size, size, 3)``.

        Raises:
            IndexError: The place is not below the number of rows.
        """
        if not 0 <= place < self.places:
            raise IndexError(f"place: expected 0 to {self.places - 1}, got {place}")
        epoch, offset = divmod(place, len(self.indices))
        picture = self.pictures[self.indices[_order(len(self.indices), self.seed, epoch)[offset]]]
        random = np.random.default_rng((self.seed, 1, place))
        if self.pictures.size is None:
            box = _draw_box(random, picture.shape[0], picture.shape[1], least_side(self.size))
            picture = _downsample(picture, box, self.size)
        return np.ascontiguousarray(picture[:, ::-1]) if random.random() < 0.5 else picture


class CentreCrops(Dataset[dict[str, Tensor]]):
    """Rows of the largest square in the middle of each picture, box-downsampled.

    Those at ``indices`` are read, and made into pictures of ``size`` rows and columns.
    """

    def __init__(self, pictures: Pictures, indices: Sequence[int], *, size: int) -> None:
        self.pictures, self.indices, self.size = pictures, tuple(indices), size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return pixel_row(self.picture(index))

    def picture(self, index: int) -> Picture:
        """The picture at an index, ``(size, size, 3)``."""
        picture = self.pictures[self.indices[index]]
        if self.pictures.size is not None:
            return picture
        return _downsample(picture, _centre_box(*picture.shape[:2]), self.size)


Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels."""


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> npt.NDArray[np.intp]:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


def _draw_box(random: np.random.Generator, rows: int, columns: int, least: int) -> Box:
    """A box of random area, ratio and place; the square in the middle where ten tries fail."""
    for _ in range(_TRIES):
        area = random.uniform(_LEAST_AREA, 1.0) * rows * columns
        ratio = math.exp(random.uniform(-math.log(_RATIO), math.log(_RATIO)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if least <= width <= columns and least <= height <= rows:
            left = int(random.integers(columns - width + 1))
            upper = int(random.integers(rows - height + 1))
            return left, upper, left + width, upper + height
    return _centre_box(rows, columns)


def _centre_box(rows: int, columns: int) -> Box:
    side = min(rows, columns)
    left, upper = (columns - side) // 2, (rows - side) // 2
    return left, upper, left + side, upper + side


def _downsample(picture: Picture, box: Box, size: int) -> Picture:
    image = Image.fromarray(picture)
    return np.array(image.resize((size, size), Image.Resampling.BOX, box=box))
