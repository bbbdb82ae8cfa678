"""Copies of a corpus for object stores, read back by the library they are for."""

import sys

import numpy as np
import pytest

from performers.app.files import read_json
from performers.proteins.corpus import Corpus
from performers.proteins.corpus.export import export_mds
from tests.cli.commands import refusal
from tests.proteins.corpus.test_shards import proteins, write_corpus


@pytest.fixture
def corpus(tmp_path):
    splits = {"train": proteins(57, 0), "test": proteins(5, 1)}
    return Corpus(write_corpus(tmp_path / "corpus", splits, shard_tokens=300))


def test_round_trip(corpus, tmp_path):
    streaming = pytest.importorskip("streaming")
    seen = []
    out = tmp_path / "mds"
    export_mds(corpus, out, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (62, 62)
    assert read_json(out / "manifest.json") == corpus.manifest
    for name in ("train", "test"):
        ours = corpus.split(name)
        theirs = streaming.StreamingDataset(local=str(out / name), batch_size=1)
        assert [theirs[i]["name"] for i in range(theirs.num_samples)] == ours.names
        for index, tokens in enumerate(ours):
            np.testing.assert_array_equal(theirs[index]["tokens"], tokens)
            assert theirs[index]["tokens"].dtype == np.uint8


def test_what_cannot_be_exported(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "streaming", None)
    out = ["--output", tmp_path / "out"]
    assert "mosaicml-streaming" in refusal("data", "export", corpus.folder, "--format", "mds", *out)
    assert "--format must be one of mds" in refusal(
        "data", "export", corpus.folder, "--format", "webdataset", *out
    )
    assert "does not exist" in refusal("data", "export", tmp_path / "no", "--format", "mds", *out)
    full = ["--output", corpus.folder]
    assert "is not empty" in refusal("data", "export", corpus.folder, "--format", "mds", *full)
