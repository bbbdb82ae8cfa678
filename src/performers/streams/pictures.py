"""Pictures of a folder or of arrays, checked and counted once, read when they are asked for.

A folder is read with its subfolders, whatever its files are named. Each file is a picture, perhaps
changed into one of 8-bit RGB values, or it is skipped for a reason; `Pictures.counts` has the
number of either, so that nothing is lost unseen.
"""

from __future__ import annotations

import hashlib
import os
import struct
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from performers.app.errors import UserError

try:
    from PIL import Image, ImageOps, UnidentifiedImageError
except ImportError as error:
    raise ImportError(
        "performers.streams.pictures needs pillow: pip install 'performers[proteins]'"
    ) from error

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Picture = npt.NDArray[np.uint8]
"""Values of a picture, (rows, columns, 3)."""

_ARRAYS = (".npy", ".npz")
_BATCH = "train_data_batch_"
_ROWS = 1024
_ORIENTATION = 0x0112
_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY = ("1", "L", *_SIXTEEN_BITS)


class UnusablePicture(UserError):
    """A file is no picture that can be used; ``reason`` says why without its name."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class Pictures(ABC):
    """Pictures by index.

    Attributes:
        size: Rows and columns of all pictures, where they are to be taken whole; None if they are
            photographs to be cropped.
        counts: Numbers of files and pictures, of those that were changed and how, and of those
            that were skipped and why.
    """

    size: int | None
    counts: dict[str, Any]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Picture:
        """The picture, shape ``(rows, columns, 3)``."""

    @abstractmethod
    def key(self, index: int) -> str:
        """A text that tells the picture from all others."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of all pictures, in hexadecimal digits."""

    def summary(self) -> str:
        """The counts in one line."""
        parts = [f"{self.counts['pictures']} pictures of {self.counts['files']} files"]
        for what in ("changed", "skipped"):
            if found := self.counts[what]:
                listed = ", ".join(f"{reason} {number}" for reason, number in found.items())
                parts.append(f"{what}: {listed}")
        return "; ".join(parts)


class Photographs(Pictures):
    """The pictures of a folder and its subfolders.

    All files are decoded once, to be checked; a picture whose values equal those of an earlier one
    is skipped, so that a split keeps its parts apart. If all pictures have exactly ``size`` rows
    and columns they are whole pictures; otherwise they are photographs, and those with fewer than
    ``least`` rows or columns are skipped.

    Args:
        folder: The folder.
        size: Rows and columns of the pictures to be made.
        least: Least rows and columns of a photograph.

    Raises:
        UserError: The folder cannot be read or holds no picture that can be used.
    """

    def __init__(self, folder: Path, size: int, least: int) -> None:
        found: dict[str, tuple[Path, tuple[int, ...]]] = {}
        changed, skipped = Counter[str](), Counter[str]()
        files = list(_files(folder))
        for path in files:
            try:
                picture, changes = read_photograph(path)
            except UnusablePicture as error:
                skipped[error.reason] += 1
                continue
            digest = hashlib.sha256(str(picture.shape).encode() + picture.tobytes()).hexdigest()
            if digest in found:
                skipped["same as another"] += 1
            elif picture.min() == picture.max():
                skipped["of one colour"] += 1
            else:
                found[digest] = path, picture.shape
                changed.update(changes)
        shapes = {shape for _, shape in found.values()}
        self.size = size if shapes == {(size, size, 3)} else None
        if self.size is None:
            small = [digest for digest, (_, shape) in found.items() if min(shape[:2]) < least]
            skipped.update([f"smaller than {least} pixels"] * len(small))
            for digest in small:
                del found[digest]
        self.counts = {
            "files": len(files),
            "pictures": len(found),
            "changed": dict(changed),
            "skipped": dict(skipped),
        }
        if not found:
            raise UserError(f"{folder} holds no picture that can be used: {self.summary()}")
        self._digests = list(found)
        self._paths = [path for path, _ in found.values()]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> Picture:
        return read_photograph(self._paths[index])[0]

    def key(self, index: int) -> str:
        """SHA-256 of the picture's shape and values."""
        return self._digests[index]

    def fingerprint(self) -> str:
        """SHA-256 of all keys."""
        return hashlib.sha256("".join(f"{x}\n" for x in self._digests).encode()).hexdigest()


class PictureArrays(Pictures):
    """Pictures in NumPy files, such as those of ImageNet64 (``train_data_batch_1.npz``).

    ``.npy`` files, which are mapped and not read, hold one array and ``.npz`` files one named
    ``data``: uint8, ``(N, size, size, 3)``, ``(N, 3, size, size)``, or ``(N, 3 size size)`` with
    the three channels in succession, which is ImageNet64's layout. Pictures are not compared with
    one another.

    Args:
        files: The files, in their order.
        size: Rows and columns of a picture.

    Raises:
        UserError: A file cannot be read, or its array has another type or shape.
    """

    def __init__(self, files: list[Path], size: int) -> None:
        self.size: int | None = size
        self._arrays = [_open_array(file, size) for file in files]
        self._ends = np.cumsum([len(array) for array in self._arrays])
        self.counts = {"files": len(files), "pictures": len(self), "changed": {}, "skipped": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Picture:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        file = int(np.searchsorted(self._ends, index, side="right"))
        array, size = self._arrays[file], self.size
        assert size is not None
        picture = array[index - int(self._ends[file]) + len(array)]
        if picture.shape == (size, size, 3):
            return np.array(picture)
        return np.ascontiguousarray(picture.reshape(3, size, size).transpose(1, 2, 0))

    def key(self, index: int) -> str:
        """The index among all pictures, and their number."""
        return f"{index} of {len(self)}"

    def fingerprint(self) -> str:
        """SHA-256 of the shapes and values of all arrays, which are read for it."""
        digest = hashlib.sha256()
        for array in self._arrays:
            digest.update(str(array.shape).encode())
            for first in range(0, len(array), _ROWS):
                digest.update(array[first : first + _ROWS].tobytes())
        return digest.hexdigest()


def open_pictures(path: Path, *, size: int = 64, least: int = 96) -> Pictures:
    """Open a folder of photographs, or arrays: a ``.npy`` or ``.npz`` file, or a folder of them.

    Args:
        path: The folder or file.
        size: Rows and columns of the pictures to be made.
        least: Least rows and columns of a photograph.

    Raises:
        UserError: The path does not exist, holds nothing that can be used, or mixes arrays with
            photographs.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; give a folder of photographs")
    if not path.is_dir():
        if path.suffix.lower() not in _ARRAYS:
            raise UserError(f"{path} is neither a folder nor a .npy or .npz file")
        return PictureArrays([path], size)
    files = [file for file in _files(path) if file.is_file()]
    pickles = [file.name for file in files if file.name.startswith(_BATCH) and not file.suffix]
    if pickles:
        raise UserError(
            f"{path} has {pickles[0]}, a pickle, which can run any code and is not read; give the "
            ".npz files of ImageNet64"
        )
    arrays = [file for file in files if file.suffix.lower() in _ARRAYS]
    if not arrays:
        return Photographs(path, size, least)
    if len(arrays) < len(files):
        raise UserError(
            f"{path} has {len(arrays)} .npy or .npz files and {len(files) - len(arrays)} others; "
            "give a folder of one kind"
        )
    # 10 after 9.
    return PictureArrays(sorted(arrays, key=lambda file: (len(file.name), file.name)), size)


def read_photograph(path: Path) -> tuple[Picture, tuple[str, ...]]:
    """Decode a file into 8-bit RGB values, upright; animations by their first picture.

    Returns:
        The values, and the changes that were made to those of the file.

    Raises:
        UserError: The file is empty, cut off, no picture, or has values without a range.
    """
    if not path.is_file():
        raise UnusablePicture(path, "not a regular file")
    try:
        if path.stat().st_size == 0:
            raise UnusablePicture(path, "empty file")
        with warnings.catch_warnings():
            # Of metadata that is not used.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                changes = [] if getattr(image, "n_frames", 1) == 1 else ["first of several"]
                if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
                    changes.append("rotated")
                upright = ImageOps.exif_transpose(image)
                return _rgb(path, upright, image.format, changes), tuple(changes)
    except UnidentifiedImageError as error:
        raise UnusablePicture(path, "not a picture") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnusablePicture(path, f"more than {Image.MAX_IMAGE_PIXELS} pixels") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError) as error:
        # The system's errors have a number, those of decoders none.
        unreadable = getattr(error, "errno", None) is not None
        raise UnusablePicture(path, "unreadable" if unreadable else "damaged") from error


def _rgb(path: Path, image: PilImage, kind: str | None, changes: list[str]) -> Picture:
    """The values as 8-bit RGB; appends to ``changes``."""
    mode = image.mode
    if mode == "F" or (mode == "I" and kind != "PNG"):
        raise UnusablePicture(path, "values without a range")
    if mode == "I" or mode in _SIXTEEN_BITS:
        changes.append("from 16 bits")
        values, absent = np.asarray(image), image.info.get("transparency")
        # As pillow reads the 16 bits of colours.
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if absent is not None:
            image.putalpha(Image.fromarray(np.where(values == absent, 0, 255).astype(np.uint8)))
    if image.has_transparency_data:
        changes.append("transparent, over white")
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    elif mode in _GREY or mode == "I":
        changes.append("from greyscale")
    elif mode != "RGB":
        changes.append(f"from {'palette' if mode == 'P' else mode}")
    return np.array(image.convert("RGB"))


def _files(folder: Path) -> Iterator[Path]:
    """Everything below a folder but folders, in the order of names; links are followed once."""

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = sorted(x for x in folders if os.path.realpath(Path(place, x)) not in seen)
        yield from (Path(place, name) for name in sorted(names))


def _open_array(file: Path, size: int) -> npt.NDArray[np.uint8]:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array as archive:
                if "data" not in archive.files:
                    raise UserError(f"{file} has no array named data, only {archive.files}")
                array = archive["data"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as a NumPy file: {error}") from error
    shapes = ((size, size, 3), (3, size, size), (3 * size * size,))
    if array.dtype != np.uint8 or array.shape[1:] not in shapes or not len(array):
        wanted = ", ".join(f"(N, {', '.join(map(str, shape))})" for shape in shapes)
        raise UserError(
            f"{file} must hold uint8 of shape {wanted}, got {array.dtype} of shape {array.shape}"
        )
    return array
