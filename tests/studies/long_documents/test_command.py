"""``python -m studies.long_documents``: its results, resuming, and the ranks it counts."""

import json

import numpy as np
import pytest
import torch

from performers.convert import to_performer
from performers.convert.distillation.pretrained import load_model
from studies.long_documents.__main__ import LongDocumentsOptions, app
from studies.long_documents.documents import read_documents, text_tokens
from studies.long_documents.retrieval import difference, interpolate_positions_, ranks
from tests.benchmark.tiny_models import words
from tests.cli import commands
from tests.convert.sentence_models import POSITIONS, save_sentence_model
from tests.studies import study


@pytest.fixture
def folders(tmp_path):
    original = save_sentence_model(tmp_path / "original", positions=512)
    converted = to_performer(load_model(original).model, window=8)
    converted.save_pretrained(tmp_path / "converted")
    (tmp_path / "texts").mkdir()
    for index in range(2):
        (tmp_path / "texts" / f"{index}.txt").write_text(words(5000, index + 1))
    return [original, tmp_path / "converted", tmp_path / "texts"]


def test_the_study(folders, tmp_path):
    out = tmp_path / "out"
    arguments = [
        *folders, "--lengths", "512,1024", "--exact-up-to", 512, "--per-file", 2, "--passages", 2,
        "--passage-tokens", 16,
    ]  # fmt: skip
    content, _ = study.run(app, out, *arguments)
    rows = content["tables"]["retrieval"]["rows"]
    assert [row[1] for row in rows] == [
        "first chunk", "mean of chunks", "nearest chunk", "original, positions repeated",
        "original, positions interpolated", "converted",
        "first chunk", "mean of chunks", "nearest chunk", "converted",
    ]  # fmt: skip
    # One chunk is the whole document, which the original reads as it is.
    short = content["parts"]["512, chunks"]
    assert short["first chunk"]["ranks"] == short["mean of chunks"]["ranks"]
    whole = content["parts"]["512, original, positions repeated"]
    assert whole["original, positions repeated"]["ranks"] == short["first chunk"]["ranks"]
    assert len(short["first chunk"]["ranks"]) == 8
    assert content["settings"]["files"] == ["0.txt", "1.txt"]
    # A part that was interrupted takes the embeddings it has.
    del content["parts"]["1024, converted"]
    (out / "results.json").write_text(json.dumps(content))
    kept = out / "embeddings" / "1024-converted.npz"
    stored = commands.arrays(kept)
    stored["seconds"][:] = 7.0
    np.savez(kept, **{name: x[:3] for name, x in stored.items()})
    content, lines = study.run(app, out, *arguments, "--resume")
    assert "1024 converted: 4 of 4 documents" in lines
    assert "1024 converted: 3 of 4 documents" not in lines
    assert content["parts"]["1024, converted"]["converted"]["seconds"] == 7.0


def test_what_is_refused(tmp_path):
    arguments = [*("model", "converted", tmp_path), "--output", tmp_path / "out"]
    assert "multiples of 512" in commands.refusal(*arguments, "--lengths", "500", app=app)
    assert "TEXTS" in commands.refusal(*arguments, app=app)


def test_passages_are_cut_out_of_documents(folders):
    tokenizer = load_model(folders[0]).tokenizer
    file = folders[2] / "0.txt"
    model, converted, texts = map(str, folders)
    options = LongDocumentsOptions(
        model=model, converted=converted, texts=texts, output_folder=file.parent,
        lengths=(512, 1024), per_file=2, passages=3, passage_tokens=16,
    )  # fmt: skip
    short, long = (read_documents(tokenizer, [file], x, options) for x in options.lengths)
    assert short.texts.shape == (2, text_tokens(512))
    assert short.passages.shape == (2, 3, 16)
    assert long.texts.shape == (2, 2 * 510)
    # Put back where it was cut, a passage completes the file.
    tokens = tokenizer(file.read_text(), add_special_tokens=False).input_ids
    text, passage = short.texts[0].tolist(), short.passages[0, 0].tolist()
    places = [i for i in range(500) if tokens[i : i + 16] == passage and tokens[:i] == text[:i]]
    assert places
    assert tokens[places[0] + 16 :][:20] == text[places[0] :][:20]
    assert torch.equal(short.texts[1, :10], long.texts[1, :10])


def test_ranks_count_from_one_and_ties_against():
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.8, 0.2], [0.1, 0.3]])
    assert ranks(scores).tolist() == [1, 2, 2, 1]


def test_an_interval_of_a_difference():
    own, other = np.array([[1, 1], [1, 3]] * 20), np.array([[1, 1], [2, 3]] * 20)
    low, high = difference(own, other)
    assert 0.1 < low < 0.25 < high < 0.4
    assert difference(own, own) == (0, 0)


def test_interpolated_positions_keep_their_ends(folders):
    model = load_model(folders[0]).model
    before = model.embeddings.position_embeddings.weight.clone()
    interpolate_positions_(model, 1023)
    after = model.embeddings.position_embeddings.weight
    assert POSITIONS < len(after) == 1023
    torch.testing.assert_close(after[::2], before)
    torch.testing.assert_close(after[1], (before[0] + before[1]) / 2)
