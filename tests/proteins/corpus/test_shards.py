"""Shards give back what was written, from memory-mapped files, and so do copies of a corpus."""

import sys
import tracemalloc

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.app.files import read_json, write_json
from performers.proteins.corpus.export import export_mds
from performers.proteins.corpus.shards import (
    FORMAT,
    VOCABULARY,
    Corpus,
    ShardWriter,
    TokenShards,
    encode,
)
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences
from tests.cli.commands import refusal

LETTERS = "ACDEFGHIKLMNPQRSTVWYXBZUOJ"


def proteins(count=57, seed=0):
    random = np.random.default_rng(seed)
    return [
        (f"P{i}", "".join(random.choice(list(LETTERS), random.integers(1, 40))))
        for i in range(count)
    ]


def write_shards(folder, records, shard_tokens=1 << 25, at_once=7):
    writer = ShardWriter(folder, shard_tokens)
    for start in range(0, len(records), at_once):
        some = records[start : start + at_once]
        names, sequences = zip(*some, strict=True)
        writer.extend(names, *encode(sequences))
    return writer.close()


def write_corpus(folder, splits, **options):
    """A corpus of the records of some splits."""
    entries = {name: write_shards(folder / name, some, **options) for name, some in splits.items()}
    manifest = {"format": FORMAT, "vocabulary": list(VOCABULARY), "splits": entries}
    write_json(folder / "manifest.json", manifest)
    return folder


def test_tokens_are_the_tokenizers(tmp_path):
    records = proteins()
    entry = write_shards(tmp_path, records, shard_tokens=200)
    shards = TokenShards(tmp_path, entry)
    assert len(entry["shards"]) > 3
    expected = encode_sequences(build_protein_tokenizer(), [sequence for _, sequence in records])
    assert len(shards) == len(expected)
    for got, wanted in zip(shards, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert shards.lengths.tolist() == [len(tokens) for tokens in expected]
    assert shards.names == [name for name, _ in records]
    assert [shards.sequence(i) for i in range(len(shards))] == [s for _, s in records]
    assert entry["residues"] == sum(len(sequence) for _, sequence in records)
    assert entry["tokens"] == sum(len(tokens) for tokens in expected)


def test_sequences_are_views_of_the_files(tmp_path):
    shards = TokenShards(tmp_path, write_shards(tmp_path, proteins()))
    assert isinstance(shards[3].base, np.memmap)
    assert not shards[3].flags.writeable


def test_names_of_an_open_shard_take_the_memory_of_their_letters(tmp_path):
    writer = ShardWriter(tmp_path)
    tracemalloc.start()
    for start in range(0, 20_000, 1000):
        names = [f"UniRef50_A{i:09d}" for i in range(start, start + 1000)]
        writer.extend(names, *encode(["M"] * 1000))
    del names
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A name of 19 letters and its end, 3 tokens, a length of 8 bytes.
    assert held < 1.3 * 20_000 * (20 + 3 + 8)


def test_fingerprint_tells_residues_apart(tmp_path):
    one, other = proteins(), proteins()
    other[5] = (other[5][0], "W" + other[5][1][1:] + "W")
    prints = [
        TokenShards(tmp_path / str(i), write_shards(tmp_path / str(i), records)).fingerprint()
        for i, records in enumerate((one, one, other))
    ]
    assert prints[0] == prints[1] != prints[2]


def test_shards_end_at_the_same_sequences_however_many_come_at_once(tmp_path):
    entries = [
        write_shards(tmp_path / str(i), proteins(), shard_tokens=100, at_once=i) for i in (1, 5, 57)
    ]
    assert entries[0] == entries[1] == entries[2]
    # Each has its tokens, and had fewer before its last sequence.
    shards = TokenShards(tmp_path / "5", entries[0])
    lengths, start = shards.lengths, 0
    for shard in entries[0]["shards"][:-1]:
        inside = lengths[start : start + shard["sequences"]]
        assert inside[:-1].sum() < 100 <= inside.sum() == shard["tokens"]
        start += shard["sequences"]


def test_damaged_shards(tmp_path):
    entry = write_shards(tmp_path, proteins())
    np.save(tmp_path / "00000.tokens.npy", np.zeros(3, dtype=np.uint8))
    with pytest.raises(UserError, match="not the one in the manifest"):
        TokenShards(tmp_path, entry)
    (tmp_path / "00000.tokens.npy").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        TokenShards(tmp_path, entry)


@pytest.fixture
def corpus(tmp_path):
    splits = {"train": proteins(57, 0), "test": proteins(5, 1)}
    return Corpus(write_corpus(tmp_path / "corpus", splits, shard_tokens=300))


def test_a_copy_is_read_back_by_the_library_that_it_is_for(corpus, tmp_path):
    streaming = pytest.importorskip("streaming")
    seen, out = [], tmp_path / "mds"
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
