"""Shards give back what was written, from memory-mapped files."""

import numpy as np
import pytest

from performers.app.errors import UserError
from performers.proteins.corpus.shards import TokenShards, write_shards
from performers.proteins.inputs.tokenizer import build_protein_tokenizer, encode_sequences

LETTERS = "ACDEFGHIKLMNPQRSTVWYXBZUOJ"


def proteins(count=57, seed=0):
    random = np.random.default_rng(seed)
    return [
        (f"P{i}", "".join(random.choice(list(LETTERS), random.integers(1, 40))))
        for i in range(count)
    ]


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


def test_fingerprint_tells_residues_apart(tmp_path):
    one, other = proteins(), proteins()
    other[5] = (other[5][0], "W" + other[5][1][1:] + "W")
    prints = [
        TokenShards(tmp_path / str(i), write_shards(tmp_path / str(i), records)).fingerprint()
        for i, records in enumerate((one, one, other))
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("sequence", ["", "MKa", "MK-V", "MKé"])
def test_no_residue(tmp_path, sequence):
    with pytest.raises(UserError, match="P9 is empty or has a letter"):
        write_shards(tmp_path, [("P9", sequence)])


def test_damaged_shards(tmp_path):
    entry = write_shards(tmp_path, proteins())
    np.save(tmp_path / "00000.tokens.npy", np.zeros(3, dtype=np.uint8))
    with pytest.raises(UserError, match="not the one in the manifest"):
        TokenShards(tmp_path, entry)
    (tmp_path / "00000.tokens.npy").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        TokenShards(tmp_path, entry)
