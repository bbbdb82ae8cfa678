"""``python -m studies.images``: codecs, completions, its results, and resuming."""

import io
import json

import numpy as np
import pytest
import torch

from performers.models import PerformerForCausalLM
from performers.streams.images import BEGIN, pixel_row
from studies.images.__main__ import app
from studies.images.codecs import CODECS, file_bits, unigram_bits
from studies.images.completions import complete
from studies.images.models import QUICK, Size, contestants, make_model
from studies.images.training import score
from tests.cli import commands
from tests.studies import study

Image = pytest.importorskip("PIL.Image")

SMALL = Size(**QUICK)


def picture(seed, rows=40, columns=30):
    return np.random.default_rng(seed).integers(0, 256, (rows, columns, 3)).astype(np.uint8)


@pytest.mark.parametrize("codec", CODECS)
def test_files_hold_the_picture_and_headers(codec):
    """Noise needs its eight bits in any codec, and pixels of one colour next to none."""
    noise = picture(0, 64, 64)
    whole, pixels = file_bits(noise, codec)
    assert 7.99 < pixels < whole < pixels + 0.06 < 8.2
    grey = np.full((64, 64, 3), 128, np.uint8)
    assert file_bits(grey, codec)[1] < 0.1


def test_codecs_are_lossless():
    values = picture(1)
    for options in CODECS.values():
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, **options)
        assert np.array_equal(np.asarray(Image.open(buffer).convert("RGB")), values)


def test_the_unigram_is_the_cross_entropy_of_frequencies():
    trained = np.array([[[0, 0, 1]]], np.uint8)
    scored = np.array([[[0, 1, 2]]], np.uint8)
    # Counts 2 and 1, plus one each, of 3 + 256.
    expected = -np.log2(np.array([3, 2, 1]) / 259).mean()
    assert unigram_bits([trained], [scored]) == [pytest.approx(expected)]


class Crops:
    """The test pictures of a study."""

    size = 8

    def __init__(self, count):
        self.pictures = [picture(seed, 8, 8) for seed in range(count)]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return pixel_row(self.pictures[index])


def test_bits_per_dimension_are_the_loss_over_log_2():
    """An untrained output layer of zeros knows nothing: log2 of its vocabulary."""
    model = make_model({"attention": "favor-relu"}, SMALL)
    with torch.no_grad():
        model.performer.embeddings.weight.zero_()
        model.lm_head.bias.zero_()
    bits = score(model, Crops(3), 60.0)
    assert bits == [pytest.approx(np.log2(257), rel=1e-5)] * 3
    assert len(score(model, Crops(3), 0.0)) == 1


def test_neighbouring_values_and_coordinates_begin_alike():
    model = make_model(list(contestants(SMALL).values())[-1], SMALL)
    tables = [model.performer.embeddings.weight[:256]]
    tables += [table.weight for table in model.performer.positions.tables[:2]]
    for table in tables:
        near = (table[1:] - table[:-1]).norm(dim=1)
        far = (table[1:] - table[0]).norm(dim=1)
        assert near.max() < far.max()
        assert torch.allclose(near, near[0], rtol=1e-4)


def test_heads_begin_at_the_pixel_to_the_left_and_above():
    """Input ``s`` holds value ``s - 1``: the places of values ``t - 3`` and ``t - 24``."""
    model = make_model({"attention": "exact"}, SMALL).eval()
    row = pixel_row(picture(0, 8, 8))["input_ids"][None]
    weights = model(row, output_attentions=True).attentions[0][0]
    for head, distance in enumerate((2, 23)):
        favourites = weights[head].argmax(-1)[distance:]
        wanted = torch.arange(192 - distance)
        assert (favourites == wanted).float().mean() > 0.8


@pytest.mark.parametrize(
    "options",
    [{"attention": "favor-softmax", "window": 24}, {"attention": "favor-relu"}],
    ids=["window", "relu"],
)
def test_completions_keep_what_is_given_and_follow_the_model(options):
    """A state carried value by value draws as the whole row read again does."""
    model = make_model(options, SMALL).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    values = torch.stack([pixel_row(picture(seed, 8, 8))["labels"] for seed in range(2)])
    found = complete(model, values, 180, seed=3)
    assert torch.equal(found[:, :180], values[:, :180])
    assert found.shape == values.shape
    assert found.max() <= 255
    torch.manual_seed(3)
    row = torch.cat((values.new_full((2, 1), BEGIN), values[:, :180]), dim=1)
    with torch.no_grad():
        for _ in range(12):
            logits = model(row, use_cache=False).logits[:, -1].float()
            logits[:, BEGIN] = -torch.inf
            row = torch.cat((row, torch.multinomial(logits.softmax(-1), 1)), dim=1)
    assert torch.equal(row[:, 1:], found)


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "photographs"
    place.mkdir()
    for seed in range(5):
        Image.fromarray(picture(seed)).save(place / f"{seed}.png")
    (place / "notes.txt").write_text("text")
    return place


def test_the_study(folder, tmp_path):
    out = tmp_path / "out"
    content, lines = study.run(app, out, folder, "--quick")
    assert "5 pictures of 6 files; skipped: not a picture 1" in lines
    assert set(content["tables"]) == {"contestants", "codecs", "completions"}
    assert len(content["tables"]["contestants"]["rows"]) == 8
    for name in contestants(SMALL):
        part = content["parts"][name]
        assert part["processor_seconds"] >= 0.3
        assert len(part["curve"]) == part["steps"] // 5
    assert content["parts"]["completions"]["contestant"].startswith("Performer")
    assert (out / "curves.png").stat().st_size > 1000
    with Image.open(out / "completions.png") as sheet:
        assert sheet.size == (4 * 26, 26)
    # Models are those of their folders.
    assert PerformerForCausalLM.from_pretrained(out / "runs" / "7").config.axial_shape == [8, 8, 3]
    # A part that is missing is measured again, from a run that had ended.
    exact = content["parts"].pop("exact")
    (out / "results.json").write_text(json.dumps(content))
    again = study.run(app, out, folder, "--quick", "--resume")[0]["parts"]["exact"]
    assert (again["steps"], again["bits"][0]) == (exact["steps"], exact["bits"][0])
    assert again["curve"] == exact["curve"]


def test_too_few_photographs_are_refused(folder, tmp_path):
    line = commands.refusal(folder, "--output", tmp_path / "out", app=app)
    assert "no picture that can be used" in line
    assert "smaller than 96 pixels 5" in line
    assert not (tmp_path / "out").exists()
