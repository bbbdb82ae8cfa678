"""Figures: panels, texts apart, hostile names."""

import math
import os
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from performers.app.figures import save_figure
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.head_scores import local_global_score
from performers.proteins.reading.mantel import load_reference_matrix
from studies.proteins.figures import (
    RESIDUE_ORDER,
    attention_maps_figure,
    heads_figure,
    similarity_figure,
)

PNG = b"\x89PNG\r\n\x1a\n"
SCORES = local_global_score([torch.eye(9)[None, None]], torch.ones(1, 9, dtype=torch.bool))


def _maps(layers, heads, length):
    generator = np.random.default_rng(0)
    raw = generator.exponential(size=(layers, heads, length, length))
    return list(raw / raw.sum(-1, keepdims=True))


def _letters(length):
    return (AMINO_ACIDS * (length // 20 + 1))[:length]


def _texts(figure):
    """All texts that are drawn: titles, labels and tick labels, with their boxes on the canvas."""
    figure.canvas.draw()
    found = []
    for ax in figure.axes:
        sides = [(ax.xaxis, "labelbottom"), (ax.yaxis, "labelleft")]
        for axis, side in sides:
            if axis.get_tick_params().get(side, True):
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
                found += [label for place, label in ticks if low <= place <= high]
        found += [ax.title, ax.xaxis.label, ax.yaxis.label]
    found += figure.texts
    return [text for text in found if text.get_text() and text.get_visible()]


def _assert_texts_apart(figure):
    boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
    width, height = figure.canvas.get_width_height()
    for number, (name, box) in enumerate(boxes):
        assert box.x0 >= -1, name
        assert box.y0 >= -1, name
        assert box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name
        for other, against in boxes[:number]:
            # Tick labels may touch; text drawn over text may not.
            shared_x = min(box.x1, against.x1) - max(box.x0, against.x0)
            shared_y = min(box.y1, against.y1) - max(box.y0, against.y0)
            assert shared_x <= 1.5 or shared_y <= 1.5, (name, other)


@pytest.mark.parametrize(("layers", "heads", "length"), [(1, 1, 1), (1, 12, 24), (3, 4, 700)])
def test_attention_maps_have_a_panel_per_head_and_texts_apart(layers, heads, length):
    maps = _maps(layers, heads, length)
    tensors = [torch.from_numpy(weights)[None] for weights in maps]
    scores = local_global_score(tensors, torch.ones(1, length, dtype=torch.bool))
    figure = attention_maps_figure(maps, _letters(length), scores=scores, title="A protein")
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == layers * heads
    assert titles[0].startswith("1.1 · ")
    assert f"{scores.heads[0].band_share:.0%} ≤ 8" in titles[0]
    if length > 1:
        _assert_texts_apart(figure)


def test_attention_maps_survive_odd_weights():
    maps = _maps(2, 2, 10)
    maps[0][0] = 0.0
    maps[0][1, 0, 0] = math.nan
    maps[1][0, 2, 2] = -1.0
    figure = attention_maps_figure(maps, _letters(10), title="")
    assert [ax.get_title() for ax in figure.axes[:4]] == ["1.1", "1.2", "2.1", "2.2"]
    for ax in figure.axes[:4]:
        drawn = np.asarray(ax.images[0].get_array())
        assert np.isfinite(drawn).all()
        assert drawn.min() >= 0
    length = 60
    even, sharp = np.full((1, length, length), 1 / length), np.eye(length)[None]
    figure = attention_maps_figure([even, sharp], _letters(length), title="")
    drawn = [np.asarray(ax.images[0].get_array()).max() for ax in figure.axes[:2]]
    assert drawn == pytest.approx([0.1, 1.0]), "an even head is pale"
    with pytest.raises(ValueError, match=r"attentions\[1\]"):
        attention_maps_figure([*_maps(1, 2, 10), *_maps(1, 2, 11)], _letters(10), title="")
    with pytest.raises(ValueError, match="at least one"):
        attention_maps_figure([], "", title="")


def test_similarity_figure_shows_each_matrix_in_the_same_order():
    reference = load_reference_matrix("BLOSUM62", AMINO_ACIDS)
    generator = np.random.default_rng(0)
    matrix = np.corrcoef(generator.normal(size=(20, 30)))
    matrix[3] = matrix[:, 3] = np.nan
    figure = similarity_figure({"$\\bad": matrix, "Above 0.1": matrix}, reference, "BLOSUM62")
    _assert_texts_apart(figure)
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["$\\bad", "Above 0.1", "BLOSUM62"]
    for ax, expected in zip(panels, (matrix, matrix, reference), strict=True):
        letters = "".join(label.get_text() for label in ax.get_xticklabels())
        assert letters == RESIDUE_ORDER
        assert "".join(label.get_text() for label in ax.get_yticklabels()) == RESIDUE_ORDER
        drawn = np.ma.filled(ax.images[0].get_array(), np.nan)
        assert np.isnan(np.diag(drawn)).all()
        row, column = RESIDUE_ORDER.index("I"), RESIDUE_ORDER.index("V")
        assert drawn[row, column] == expected[AMINO_ACIDS.index("I"), AMINO_ACIDS.index("V")]
    assert sorted(RESIDUE_ORDER) == sorted(AMINO_ACIDS)


def test_files_hold_images(tmp_path):
    figure = heads_figure({"a": SCORES})
    path = save_figure(figure, tmp_path / "new" / "folder" / "curve.png")
    assert path.read_bytes().startswith(PNG)
    for name in ("curve.svg", "curve.pdf"):
        assert save_figure(figure, tmp_path / name).read_bytes()
    ElementTree.parse(tmp_path / "curve.svg")


def test_what_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    figure, path = heads_figure({"a": SCORES}), tmp_path / "curve.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=r"curve\.doc"):
        save_figure(figure, tmp_path / "curve.doc")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, path)
    assert [file.name for file in tmp_path.iterdir()] == ["curve.png"]
    assert path.read_bytes() == b"old"
