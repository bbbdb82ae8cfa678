"""Figures: panels, texts apart, hostile names."""

import base64
import math
import os
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from performers.app.figures import Pictures, save_figure
from performers.proteins.reading.head_scores import local_global_score
from performers.proteins.reading.mantel import load_reference_matrix
from performers.proteins.reading.similarity import AMINO_ACIDS
from performers.proteins.report.attention_figure import attention_maps_figure
from performers.proteins.report.figures import (
    RESIDUE_ORDER,
    curves,
    learning_curve_figure,
    similarity_figure,
)

PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {"step": 10, "loss": 2.9, "learning_rate": 1e-3},
    {"step": 20, "loss": 2.7},
    {"step": 20, "eval_loss": 2.8, "eval_accuracy": 0.12, "eval_ood_loss": 2.85},
    {"step": 20, "train_loss": 2.75, "train_runtime": 3.0},
]


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


@pytest.mark.parametrize(
    ("layers", "heads", "length"), [(1, 1, 1), (2, 3, 12), (3, 8, 150), (1, 12, 24), (6, 4, 700)]
)
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


def test_attention_maps_number_the_layers_given_and_survive_odd_weights():
    maps = _maps(2, 2, 10)
    maps[0][0] = 0.0
    maps[0][1, 0, 0] = math.nan
    maps[1][0, 2, 2] = -1.0
    figure = attention_maps_figure(maps, _letters(10), layers=[1, 12])
    assert [ax.get_title() for ax in figure.axes[:4]] == ["1.1", "1.2", "12.1", "12.2"]
    for ax in figure.axes[:4]:
        drawn = np.asarray(ax.images[0].get_array())
        assert np.isfinite(drawn).all()
        assert drawn.min() >= 0
    length = 60
    even, sharp = np.full((1, length, length), 1 / length), np.eye(length)[None]
    figure = attention_maps_figure([even, sharp], _letters(length))
    drawn = [np.asarray(ax.images[0].get_array()).max() for ax in figure.axes[:2]]
    assert drawn == pytest.approx([0.1, 1.0]), "an even head is pale"
    with pytest.raises(ValueError, match=r"attentions\[1\]"):
        attention_maps_figure([*_maps(1, 2, 10), *_maps(1, 2, 11)], _letters(10))
    with pytest.raises(ValueError, match="at least one"):
        attention_maps_figure([], "")


def test_similarity_figure_shows_each_matrix_in_the_same_order():
    reference = load_reference_matrix("BLOSUM62", AMINO_ACIDS)
    generator = np.random.default_rng(0)
    matrix = np.corrcoef(generator.normal(size=(20, 30)))
    matrix[3] = matrix[:, 3] = np.nan
    figure = similarity_figure({"$\\bad": matrix, "Above 0.1": matrix}, reference)
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
    with pytest.raises(ValueError, match="small"):
        similarity_figure({"small": matrix[:5, :5]}, reference)
    assert sorted(RESIDUE_ORDER) == sorted(AMINO_ACIDS)


def test_curves_reads_a_trainer_log():
    assert curves(HISTORY, "loss") == {
        "train": ([10, 20], [2.9, 2.7]),
        "validation": ([20], [2.8]),
        "ood": ([20], [2.85]),
    }
    assert curves(HISTORY, "accuracy") == {"validation": ([20], [0.12])}
    # No numbers are left out, and the last of a repeated step counts.
    points = [(1, math.nan), (2, "2.0"), (None, 2.0), (4, 1.0), (3, np.float32(1.5)), (4, 1.25)]
    history = [{"step": step, "loss": loss} for step, loss in points]
    assert curves([*history, {"loss": 2.0}], "loss") == {"train": ([3, 4], [1.5, 1.25])}
    figure = learning_curve_figure({"a": [{"step": 1, "loss": 2.0}]})
    assert len(figure.axes) == 1, "no panel of accuracy"
    assert figure.axes[0].lines[0].get_marker() == "o"
    assert learning_curve_figure({"a": []}).axes


def test_learning_curves_draw_every_split_and_hostile_names():
    names = ["_hidden", "$\\frac{1$", "x" * 200]
    figure = learning_curve_figure(
        dict.fromkeys(names, HISTORY), baseline_loss=2.89, baseline_accuracy=0.097
    )
    loss, accuracy = figure.axes
    assert len(loss.lines) == 3 * 3 + 1
    assert len(accuracy.lines) == 3 + 1
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels[:2] == names[:2]
    assert len(labels[2]) < 60
    assert labels[3:] == ["train", "validation", "ood", "unigram baseline"]
    _assert_texts_apart(figure)


def test_files_and_uris_hold_images(tmp_path):
    figure = learning_curve_figure({"a": HISTORY})
    path = save_figure(figure, tmp_path / "new" / "folder" / "curve.png")
    assert path.read_bytes().startswith(PNG)
    for name in ("curve.svg", "curve.pdf"):
        assert save_figure(figure, tmp_path / name).read_bytes()
    ElementTree.parse(tmp_path / "curve.svg")
    uri = Pictures(tmp_path / "pictures").add("one", figure)
    assert uri.startswith("data:image/png;base64,")
    assert base64.b64decode(uri.split(",", 1)[1]) == (tmp_path / "pictures/one.png").read_bytes()


def test_what_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    figure, path = learning_curve_figure({"a": HISTORY}), tmp_path / "curve.png"
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
