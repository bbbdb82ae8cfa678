"""Rows of pixels: order, crops that repeat, splits by picture."""

import math

import numpy as np
import pytest
import torch

from performers.app.errors import UserError
from performers.models import PerformerConfig, PerformerForCausalLM
from performers.streams.images import (
    BEGIN,
    VOCABULARY,
    CentreCrops,
    RandomCrops,
    least_side,
    pixel_row,
    row_picture,
    split_pictures,
)
from performers.streams.pictures import open_pictures

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten photographs of different sizes, each of its own blue."""
    place = tmp_path_factory.mktemp("photographs")
    random = np.random.default_rng(0)
    for number in range(10):
        values = random.integers(0, 256, (30 + number, 50 - 2 * number, 3)).astype(np.uint8)
        values[..., 2] = 20 * number
        Image.fromarray(values).save(place / f"{number}.png")
    return place


@pytest.fixture(scope="module")
def pictures(folder):
    return open_pictures(folder, size=8, least=least_side(8))


def test_rows_are_in_raster_order():
    picture = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    row = pixel_row(picture)
    assert row["labels"].tolist() == list(range(12))
    assert row["input_ids"].tolist() == [BEGIN, *range(11)]
    assert torch.equal(row["shift_labels"], row["labels"])
    assert np.array_equal(row_picture(row["labels"], 2), picture)
    for values in (torch.arange(11), torch.arange(12) + 245, torch.arange(12) - 1):
        with pytest.raises(ValueError, match="12 integers from 0 to 255"):
            row_picture(values, 2)


def test_the_loss_of_a_model_is_that_of_each_value_given_those_before():
    """Labels are not shifted a second time, and none is left out."""
    config = PerformerConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, is_decoder=True, position_embedding="axial", axial_shape=(4, 4, 3),
        max_position_embeddings=48, pad_token_id=None, hidden_dropout_prob=0.0,
        initializer_range=0.3,
    )  # fmt: skip
    model = PerformerForCausalLM(config).eval()
    values = torch.randint(0, 256, (48,))
    row = pixel_row(values.numpy().astype(np.uint8).reshape(4, 4, 3))
    with torch.no_grad():
        loss = model(**{name: x[None] for name, x in row.items()}).loss
        before, total = [BEGIN], 0.0
        for value in values.tolist():
            logits = model(torch.tensor([before]), use_cache=False).logits[0, -1]
            total -= logits.log_softmax(-1)[value].item()
            before.append(value)
    assert loss.item() == pytest.approx(total / 48, rel=1e-5)


def test_crops_repeat_and_differ(pictures):
    crops = RandomCrops(pictures, range(8), size=8, seed=3, places=40)
    again = RandomCrops(pictures, range(8), size=8, seed=3, places=100)
    other = RandomCrops(pictures, range(8), size=8, seed=4, places=40)
    found = [crops.picture(place) for place in range(40)]
    # In another order, as a resumed run reads them.
    for place in reversed(range(40)):
        assert np.array_equal(again.picture(place), found[place])
    assert len({picture.tobytes() for picture in found}) == 40
    assert any(not np.array_equal(other.picture(place), found[place]) for place in range(8))
    assert [crops[5][name].shape for name in ("input_ids", "labels")] == [(192,), (192,)]
    for place in (-1, 40):
        with pytest.raises(IndexError):
            crops[place]


def test_each_pass_has_every_picture_once(pictures):
    """By its blue, which no crop changes; pictures outside the split never appear."""
    indices = [0, 2, 3, 7, 9]
    crops = RandomCrops(pictures, indices, size=8, seed=0, places=15)
    blues = [int(crops.picture(place)[0, 0, 2]) for place in range(15)]
    wanted = sorted(int(pictures[index][0, 0, 2]) for index in indices)
    passes = [blues[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(each) == wanted for each in passes)
    assert passes[0] != passes[1] or passes[1] != passes[2]


def test_every_crop_is_downsampled(pictures, monkeypatch):
    from performers.streams import images

    boxes = []
    original = images._downsample

    def watch(picture, box, size):
        boxes.append((*box, *picture.shape[:2]))
        return original(picture, box, size)

    monkeypatch.setattr(images, "_downsample", watch)
    crops = RandomCrops(pictures, range(10), size=8, seed=1, places=200)
    for place in range(200):
        crops.picture(place)
    least = math.ceil(1.5 * 8)
    for left, upper, right, lower, rows, columns in boxes:
        assert 0 <= left < right <= columns
        assert 0 <= upper < lower <= rows
        assert min(right - left, lower - upper) >= least
        assert (right - left) * (lower - upper) >= 0.45 * min(rows, columns) ** 2
    assert len(set(boxes)) > 150


def test_half_of_the_crops_are_flipped(tmp_path):
    """Whole pictures are flipped and nothing else."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", picture[None])
    crops = RandomCrops(open_pictures(tmp_path, size=8), [0], size=8, seed=0, places=100)
    flipped = 0
    for place in range(100):
        found = crops.picture(place)
        if np.array_equal(found, picture[:, ::-1]):
            flipped += 1
        else:
            assert np.array_equal(found, picture)
    assert 30 < flipped < 70


def test_the_test_crop_is_the_mean_of_boxes_in_the_middle(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (24, 40, 3)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    pictures = open_pictures(tmp_path, size=8, least=12)
    centre = CentreCrops(pictures, [0], size=8)
    expected = values[:, 8:32].reshape(8, 3, 8, 3, 3).mean((1, 3))
    assert np.abs(centre.picture(0) - expected).max() <= 1
    assert len(centre) == 1
    assert torch.equal(centre[0]["labels"], pixel_row(centre.picture(0))["labels"])


def test_splits_are_by_picture_and_do_not_depend_on_names(folder, pictures, tmp_path):
    train, test = split_pictures(pictures, 3, seed=0)
    assert sorted(train + test) == list(range(10))
    assert len(test) == 3
    keys = {pictures.key(index) for index in test}
    for number, file in enumerate(sorted(folder.iterdir(), reverse=True)):
        (tmp_path / f"renamed{number}.png").write_bytes(file.read_bytes())
    renamed = open_pictures(tmp_path, size=8, least=12)
    again = split_pictures(renamed, 3, seed=0)[1]
    assert {renamed.key(index) for index in again} == keys
    drawn = {tuple(split_pictures(pictures, 3, seed=seed)[1]) for seed in range(6)}
    assert len(drawn) > 1
    for count in (0, 10, 11):
        with pytest.raises(UserError, match="leave none"):
            split_pictures(pictures, count, seed=0)
