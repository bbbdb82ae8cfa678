"""Rows of a corpus are those that the in-memory functions make."""

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.proteins.corpus import ShardedRows, TokenShards
from performers.proteins.inputs.packing import pack_sequences, split_windows
from tests.proteins.corpus.test_shards import proteins, write_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return TokenShards(folder, write_shards(folder, proteins(83), shard_tokens=300))


def residues(tokens):
    return int((np.asarray(tokens) > 4).sum())


@pytest.mark.parametrize("max_length", [3, 4, 7, 16, 100])
def test_windows(shards, max_length):
    expected = [
        window
        for tokens in shards
        for window in split_windows(tokens, max_length)
        if residues(window) > 1
    ]
    rows = ShardedRows(shards, max_length=max_length)
    assert rows.lengths.tolist() == [len(window) for window in expected]
    for i, window in enumerate(expected):
        example = rows[7, i]
        np.testing.assert_array_equal(example["input_ids"], window)
        assert (example["epoch"], example["index"]) == (7, i)
        assert "sequence_ids" not in example


@pytest.mark.parametrize("max_length", [3, 5, 32, 1000, 10_000])
@pytest.mark.parametrize("seed", [0, 1])
def test_packed(shards, max_length, seed):
    order = np.random.default_rng(seed).permutation(len(shards))
    expected = pack_sequences([shards[i] for i in order], max_length)
    expected = [row for row in expected if residues(row.input_ids) > 1]
    rows = ShardedRows(shards, max_length=max_length, packed=True, seed=seed)
    assert len(rows) == len(expected)
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(rows[i]["input_ids"], row.input_ids)
        np.testing.assert_array_equal(rows[i]["sequence_ids"], row.sequence_ids)


def test_index_out_of_range(shards):
    rows = ShardedRows(shards, max_length=50)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_nothing_to_learn_from(tmp_path):
    entry = write_shards(tmp_path, [("P", "M"), ("Q", "K")])
    with pytest.raises(UserError, match="no two residues"):
        ShardedRows(TokenShards(tmp_path, entry), max_length=10)
