"""Figures: panels, texts apart, files."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from performers.app.figures import save_figure
from performers.proteins.inputs.records import ProteinRecord
from performers.proteins.inputs.tokenizer import AMINO_ACIDS
from performers.proteins.reading.analysis import ModelAnalysis
from performers.proteins.reading.head_scores import local_global_score
from studies.proteins.figures import attention_maps_figure, heads_figure

SCORES = local_global_score([torch.eye(9)[None]], torch.ones(9, dtype=torch.bool))


def analysis(maps, *, scored=True):
    length = maps[0].shape[-1]
    tensors = [torch.from_numpy(weights) for weights in maps]
    scores = local_global_score(tensors, torch.ones(length, dtype=torch.bool))
    labels = (AMINO_ACIDS * (length // 20 + 1))[:length]
    record = ProteinRecord("P1", "", labels)
    sizes = {"sequences": 1, "available": 1, "cropped": 0, "max_length": length}
    return ModelAnalysis(
        record, **sizes, embeddings=np.eye(20), labels=labels, maps=tuple(maps),
        scores=scores if scored else None,
    )  # fmt: skip


def drawn_maps(layers, heads, length):
    raw = np.random.default_rng(0).exponential(size=(layers, heads, length, length))
    return list(raw / raw.sum(-1, keepdims=True))


@pytest.mark.parametrize(("layers", "heads", "length"), [(1, 1, 1), (1, 12, 24), (3, 4, 700)])
def test_attention_maps_have_a_panel_per_head_and_texts_apart(layers, heads, length):
    found = analysis(drawn_maps(layers, heads, length))
    figure = attention_maps_figure(found, "A protein")
    titles = [ax.get_title() for ax in figure.axes if ax.get_title()]
    assert len(titles) == layers * heads
    assert titles[0].startswith("1.1 · ")
    assert f"{found.scores.heads[0].band_share:.0%} ≤ 8" in titles[0]
    figure.canvas.draw()
    texts = [x for x in figure.findobj(Text) if x.get_text() and x.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts]
    width, height = figure.canvas.get_width_height()
    for number, (name, box) in enumerate(boxes):
        assert min(box.x0, box.y0) >= -1, name
        # One panel of one residue is narrower than its title.
        assert length == 1 or (box.x1 <= width + 1 and box.y1 <= height + 1), name
        for other, against in boxes[:number] if length > 1 else ():
            # Tick labels may touch; text drawn over text may not.
            shared_x = min(box.x1, against.x1) - max(box.x0, against.x0)
            shared_y = min(box.y1, against.y1) - max(box.y0, against.y0)
            assert shared_x <= 1.5 or shared_y <= 1.5, (name, other)


def test_attention_maps_survive_odd_weights():
    maps = drawn_maps(2, 2, 10)
    maps[0][0] = 0.0
    maps[0][1, 0, 0] = math.nan
    maps[1][0, 2, 2] = -1.0
    figure = attention_maps_figure(analysis(maps, scored=False), "")
    assert [ax.get_title() for ax in figure.axes[:4]] == ["1.1", "1.2", "2.1", "2.2"]
    for ax in figure.axes[:4]:
        drawn = np.asarray(ax.images[0].get_array())
        assert np.isfinite(drawn).all()
        assert drawn.min() >= 0
    length = 60
    even, sharp = np.full((1, length, length), 1 / length), np.eye(length)[None]
    figure = attention_maps_figure(analysis([even, sharp]), "")
    drawn = [np.asarray(ax.images[0].get_array()).max() for ax in figure.axes[:2]]
    assert drawn == pytest.approx([0.1, 1.0]), "an even head is pale"


def test_files_hold_images(tmp_path):
    figure = heads_figure({"a": SCORES})
    path = save_figure(figure, tmp_path / "new" / "folder" / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name in ("curve.svg", "curve.pdf"):
        assert save_figure(figure, tmp_path / name).read_bytes()
    ElementTree.parse(tmp_path / "curve.svg")
    with pytest.raises(ValueError, match=r"curve\.doc"):
        save_figure(figure, tmp_path / "curve.doc")
