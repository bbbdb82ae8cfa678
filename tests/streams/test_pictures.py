"""Files of every kind: read right, or skipped with a reason, and always counted."""

import io
import os
import struct
import zlib

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.streams.pictures import UnusablePicture, open_pictures, read_photograph

Image = pytest.importorskip("PIL.Image")


def noise(rows=100, columns=120, channels=3, *, seed=0, high=256):
    shape = (rows, columns, channels) if channels > 1 else (rows, columns)
    values = np.random.default_rng(seed).integers(0, high, shape)
    return values.astype(np.uint16 if high > 256 else np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def png_of_16_bit_colours(values):
    """A PNG file written by hand: pillow has no mode for it."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows, columns = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", columns, rows, 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("channels", "high", "changes"),
    [
        (3, 256, ()),
        (1, 256, ("from greyscale",)),
        (3, 1 << 16, ()),
        (1, 1 << 16, ("from 16 bits", "from greyscale")),
    ],
)
def test_values_are_kept(tmp_path, channels, high, changes):
    """The upper 8 of 16 bits: to clip instead would make nearly everything white."""
    values, path = noise(channels=channels, high=high), tmp_path / "a.png"
    if values.dtype == np.uint16 and channels == 3:
        path.write_bytes(png_of_16_bit_colours(values))
    else:
        Image.fromarray(values).save(path)
    wanted = values >> 8 if high > 256 else values
    found, said = read_photograph(path)
    assert np.array_equal(found, wanted if channels > 1 else np.stack([wanted] * 3, axis=-1))
    assert said == changes


def test_cmyk_is_converted(tmp_path):
    """Cyan ink takes red away."""
    inks = np.zeros((100, 100, 4), np.uint8)
    inks[:50, :, 0] = 255
    path = saved(tmp_path / "a.jpg", Image.fromarray(inks, "CMYK"), quality=100)
    found, changes = read_photograph(path)
    assert changes == ("from CMYK",)
    assert np.abs(found[10, 10].astype(int) - (0, 255, 255)).max() < 8
    assert np.abs(found[90, 10].astype(int) - 255).max() < 8


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    values = noise(channels=4)
    values[:50, :, 3] = 0
    values[50:, :, 3] = 255
    image, path = Image.fromarray(values), tmp_path / "a.png"
    if mode == "P":
        palette = Image.fromarray(values[..., :3]).quantize(16)
        index = np.asarray(palette).copy()
        index[:50] = 3
        again = Image.fromarray(index)
        again.putpalette(palette.getpalette())
        again.save(path, transparency=3)
    else:
        saved(path, image.convert(mode))
    found, changes = read_photograph(path)
    assert (found[:50] == 255).all()
    assert "transparent, over white" in changes
    if mode == "RGBA":
        assert np.array_equal(found[50:], values[50:, :, :3])


def test_the_transparent_value_of_16_bits_is_white(tmp_path):
    values = noise(channels=1, high=65536)
    values[:2] = 700
    Image.fromarray(values).save(tmp_path / "a.png", transparency=700)
    picture, changes = read_photograph(tmp_path / "a.png")
    expected = np.where(values == 700, 255, values >> 8)
    assert np.array_equal(picture, np.stack([expected] * 3, axis=-1))
    assert changes == ("from 16 bits", "transparent, over white")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(tmp_path, orientation):
    """Against the table of the EXIF standard: what is at the upper left of the scene."""
    values = noise(rows=100, columns=120)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(values), exif=exif)
    found, changes = read_photograph(path)
    turned = values if orientation < 5 else values.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    assert np.array_equal(found, turned[::rows, ::columns])
    assert changes == (() if orientation == 1 else ("rotated",))


def jpeg():
    buffer = io.BytesIO()
    Image.fromarray(noise(200, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


def tiff(mode):
    buffer = io.BytesIO()
    Image.fromarray(noise(channels=1)).convert(mode).save(buffer, "TIFF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"no picture at all, but text", "not a picture"),
        (bytes(range(256)) * 40, "not a picture"),
        (b"\x7fELF" + bytes(2000), "not a picture"),
        (jpeg()[:5000], "damaged"),
        (png_of_16_bit_colours(noise(high=1 << 16))[:20000], "damaged"),
        (tiff("F"), "values without a range"),
        (tiff("I"), "values without a range"),
    ],
    ids=["empty", "text", "binary", "program", "cut JPEG", "cut PNG", "floats", "integers"],
)
def test_files_that_are_skipped(tmp_path, content, reason):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    with pytest.raises(UnusablePicture) as error:
        read_photograph(path)
    assert error.value.reason == reason
    assert str(path) in str(error.value)


def test_bombs_are_skipped(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.png", Image.fromarray(noise()))
    for most, pixels in ((100 * 120 - 1, "11999"), (1000, "1000")):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(UnusablePicture, match=f"more than {pixels} pixels"):
            read_photograph(path)


def test_a_folder_of_everything_is_counted(tmp_path):
    good = noise(seed=1)
    saved(tmp_path / "a.jpg", Image.fromarray(noise(150, 130, seed=2)))
    (tmp_path / "below" / "deeper").mkdir(parents=True)
    saved(tmp_path / "below" / "deeper" / "b.PNG", Image.fromarray(good))
    saved(tmp_path / "below" / "same.png", Image.fromarray(good))
    saved(tmp_path / "below" / "grey.jpg", Image.fromarray(noise(channels=1, seed=3)))
    # A name says nothing.
    saved(tmp_path / "no_suffix", Image.fromarray(noise(96, 300, seed=4)), format="PNG")
    saved(tmp_path / "small.png", Image.fromarray(noise(95, 300)))
    saved(tmp_path / "tiny.png", Image.fromarray(noise(63, 63)))
    saved(tmp_path / "white.png", Image.new("RGB", (200, 200), "white"))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "cut.jpg").write_bytes(jpeg()[:4000])
    (tmp_path / "notes.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    pictures = open_pictures(tmp_path)
    assert pictures.size is None
    assert {pictures[index].shape[:2] for index in range(len(pictures))} == {
        (150, 130),
        (100, 120),
        (96, 300),
    }
    counts = pictures.counts
    assert counts["files"] == 12
    assert counts["pictures"] == len(pictures) == 4
    assert counts["changed"] == {"from greyscale": 1}
    assert counts["skipped"] == {
        "smaller than 96 pixels": 2,
        "same as another": 1,
        "of one colour": 1,
        "empty file": 1,
        "damaged": 1,
        "not a picture": 1,
        "not a regular file": 1,
    }
    assert sum(counts["skipped"].values()) + counts["pictures"] == counts["files"]
    assert "4 pictures of 12 files" in pictures.summary()
    assert "damaged 1" in pictures.summary()


def test_folders_without_a_picture_are_refused_with_the_counts(tmp_path):
    with pytest.raises(UserError, match=r"no picture that can be used: 0 pictures of 0 files"):
        open_pictures(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.jpg").touch()
    with pytest.raises(UserError, match="not a picture 1, empty file 1"):
        open_pictures(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        open_pictures(tmp_path / "missing")
    with pytest.raises(UserError, match="neither a folder"):
        open_pictures(tmp_path / "a.txt")


def test_a_folder_of_small_pictures_alone_is_taken_whole(tmp_path):
    values = [noise(64, 64, seed=seed) for seed in range(3)]
    for number, picture in enumerate(values):
        saved(tmp_path / f"{number}.png", Image.fromarray(picture))
    pictures = open_pictures(tmp_path)
    assert pictures.size == 64
    assert all(np.array_equal(pictures[i], values[i]) for i in range(3))
    # Beside a photograph they would be another distribution.
    saved(tmp_path / "photograph.png", Image.fromarray(noise(200, 200)))
    mixed = open_pictures(tmp_path)
    assert (mixed.size, len(mixed)) == (None, 1)
    assert mixed.counts["skipped"] == {"smaller than 96 pixels": 3}


LAYOUTS = {
    "planes in rows": lambda x: x.transpose(0, 3, 1, 2).reshape(len(x), -1),
    "planes": lambda x: x.transpose(0, 3, 1, 2),
    "channels last": lambda x: x,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_arrays_in_each_layout(tmp_path, layout):
    values = np.stack([noise(8, 8, seed=seed) for seed in range(5)])
    stored = np.ascontiguousarray(LAYOUTS[layout](values))
    np.savez(tmp_path / "train_data_batch_10.npz", data=stored[3:], labels=np.arange(2))
    np.savez(tmp_path / "train_data_batch_9.npz", data=stored[:3], labels=np.arange(3))
    np.save(tmp_path.parent / "all.npy", stored)
    for path in (tmp_path, tmp_path.parent / "all.npy"):
        pictures = open_pictures(path, size=8)
        assert (pictures.size, len(pictures)) == (8, 5)
        for index in range(5):
            assert np.array_equal(pictures[index], values[index])
        with pytest.raises(IndexError):
            pictures[5]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.npy", np.zeros((2, 12), np.uint8), "uint8 of shape"),
        ("a.npy", np.zeros((2, 192), np.float32), "float32"),
        ("a.npy", np.zeros((0, 192), np.uint8), "(0, 192)"),
        ("a.npy", np.array([{"data": 1}], dtype=object), "cannot be read"),
        ("a.npz", {"pixels": np.zeros((2, 192), np.uint8)}, "no array named data"),
        ("a.npz", b"PK cut off", "cannot be read"),
        ("a.npy", b"", "cannot be read"),
    ],
    ids=str,
)
def test_arrays_that_are_refused(tmp_path, name, content, words):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError) as error:
        open_pictures(path, size=8)
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_pickles_and_mixed_folders_are_refused(tmp_path):
    (tmp_path / "train_data_batch_1").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="a pickle, which can run any code"):
        open_pictures(tmp_path)
    (tmp_path / "train_data_batch_1").unlink()
    np.save(tmp_path / "a.npy", np.zeros((2, 192), np.uint8))
    (tmp_path / "b.jpg").write_bytes(jpeg())
    with pytest.raises(UserError, match=r"1 \.npy or \.npz files and 1 others"):
        open_pictures(tmp_path, size=8)


def test_other_arrays_have_another_fingerprint(tmp_path):
    prints = []
    for name, value in (("a", 1), ("b", 1), ("c", 2)):
        np.save(tmp_path / f"{name}.npy", np.full((3, 4, 4, 3), value, np.uint8))
        prints.append(open_pictures(tmp_path / f"{name}.npy", size=4).fingerprint())
    assert prints[0] == prints[1] != prints[2]
