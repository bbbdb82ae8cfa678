"""Packing, windows, the data set and the batch sampler: nothing lost, all of it deterministic."""

import pickle

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from performers.app.errors import UserError
from performers.proteins.corpus import TokenShards
from performers.proteins.inputs import packing
from performers.proteins.inputs.packing import (
    LengthBucketedBatchSampler,
    TokenDataset,
    window_places,
)
from tests.proteins.corpus.test_shards import proteins, write_shards

token_sequences = st.lists(
    st.lists(st.integers(1, 30), min_size=1, max_size=25).map(lambda t: np.array(t, np.int16)),
    min_size=1,
    max_size=12,
)


def lengths(seed=0, count=3000):
    return np.random.default_rng(seed).gamma(2, 150, count).astype(int) + 1


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    return TokenShards(folder, write_shards(folder, proteins(83), shard_tokens=300))


@given(token_sequences, st.integers(1, 40))
def test_packed_rows_are_the_sequences_end_to_end(sequences, row_length):
    rows = TokenDataset(sequences, max_length=row_length, packed=True)
    assert (rows.lengths[:-1] == row_length).all()
    assert 1 <= rows.lengths[-1] <= row_length
    joined = np.concatenate([row["input_ids"] for row in rows])
    assert joined.dtype == np.int16
    assert joined.tolist() == np.concatenate(sequences).tolist()
    owner = [i for i, sequence in enumerate(sequences) for _ in sequence]
    position = 0
    for row, size in zip(rows, rows.lengths, strict=True):
        expected = owner[position : position + size]
        assert row["sequence_ids"].tolist() == [i - expected[0] for i in expected]
        position += size


def split(sequence, max_length):
    return np.array_split(sequence, -(-len(sequence) // max_length))


@given(st.lists(st.integers(1, 200), min_size=1), st.integers(1, 60))
def test_windows_lose_nothing_and_are_even(lengths, max_length):
    places = list(zip(*window_places(np.array(lengths), max_length), strict=True))
    assert places == [
        (index, window[0], len(window))
        for index, length in enumerate(lengths)
        for window in split(np.arange(length), max_length)
    ]


@pytest.mark.parametrize("max_length", [3, 4, 7, 16, 100])
def test_rows_of_a_corpus_are_windows_to_learn_from(shards, max_length):
    expected = [
        window
        for tokens in shards
        for window in split(tokens, max_length)
        if (window > 4).sum() > 1
    ]
    rows = TokenDataset(shards, max_length=max_length, learnable=True)
    assert rows.lengths.tolist() == [len(window) for window in expected]
    for i, window in enumerate(expected):
        example = rows[7, i]
        np.testing.assert_array_equal(example["input_ids"], window)
        assert (example["epoch"], example["index"]) == (7, i)
        assert "sequence_ids" not in example


@pytest.mark.parametrize("max_length", [3, 5, 32, 1000, 10_000])
def test_packed_rows_of_a_corpus_are_shuffled_with_the_seed(shards, max_length):
    order = np.random.default_rng(1).permutation(len(shards))
    ordered = TokenDataset([shards[i] for i in order], max_length=max_length, packed=True)
    expected = [row for row in ordered if (row["input_ids"] > 4).sum() > 1]
    rows = TokenDataset(shards, max_length=max_length, packed=True, seed=1, learnable=True)
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in expected]
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(rows[i]["input_ids"], row["input_ids"])
        np.testing.assert_array_equal(rows[i]["sequence_ids"], row["sequence_ids"])


def test_the_data_set_of_whole_sequences():
    plain = TokenDataset([[1, 5, 2], [1, 2]])
    assert plain.lengths.tolist() == [3, 2]
    assert [(x["index"], x["epoch"], list(x["input_ids"])) for x in plain] == [
        (0, 0, [1, 5, 2]),
        (1, 0, [1, 2]),
    ]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once_within_the_limits(shuffle):
    sizes = lengths()
    batches = list(LengthBucketedBatchSampler(sizes, max_tokens=4096, shuffle=shuffle, seed=3))
    assert sorted(key for batch in batches for key in batch) == [(0, i) for i in range(sizes.size)]
    if not shuffle:
        # An evaluation meets its longest rows first.
        assert [sizes[i] for batch in batches for _, i in batch] == sorted(sizes, reverse=True)
    padded = [len(batch) * max(sizes[i] for _, i in batch) for batch in batches]
    assert max(padded) <= 4096
    # A plain shuffle wastes much of what it computes.
    order = np.random.default_rng(0).permutation(sizes)
    plain = sum(chunk.max() * chunk.size for chunk in np.split(order[:2992], 187))
    assert sizes.sum() / plain < 0.6
    assert sizes.sum() / sum(padded) > 0.9


def test_the_order_is_a_function_of_the_seed():
    def order(seed):
        sampler = LengthBucketedBatchSampler(lengths(), max_tokens=4096, seed=seed)
        assert list(sampler) == list(sampler), "iterating changes nothing"
        assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
        return [[index for _, index in batch] for batch in sampler]

    one, other = order(1), order(0)
    assert one == order(1)
    assert one != other
    assert {tuple(b) for b in one}.isdisjoint(map(tuple, other)), "batches regroup"


def test_rows_of_one_length_are_shuffled_all_over(monkeypatch):
    monkeypatch.setattr(packing, "_POOL_BATCHES", 1000)
    batches = list(LengthBucketedBatchSampler(np.full(400, 64), max_tokens=4 * 64))
    indices = np.array([[index for _, index in batch] for batch in batches])
    assert np.ptp(indices, axis=1).mean() > 150
    assert abs(np.corrcoef(indices.ravel(), np.arange(400))[0, 1]) < 0.2
    sizes = lengths()
    batches = LengthBucketedBatchSampler(sizes, max_tokens=4096)
    means = [np.mean([sizes[index] for _, index in batch]) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2, "nor by length"


def test_a_run_of_many_batches_continues_through_the_epochs():
    sizes = lengths(count=100)
    epoch = LengthBucketedBatchSampler(sizes, max_tokens=4096, seed=5)
    run = LengthBucketedBatchSampler(sizes, max_tokens=4096, seed=5, num_batches=30)
    batches = list(run)
    assert len(batches) == len(run) == 30
    assert batches[: len(epoch)] == list(epoch)
    seen = [key for batch in batches for key in batch]
    assert [number for number, _ in seen] == sorted(number for number, _ in seen)
    for number in range(2):
        assert sorted(i for at, i in seen if at == number) == list(range(100))
    assert [i for at, i in seen if at == 0] != [i for at, i in seen if at == 1]


def test_copies_of_rows_are_as_many_as_asked_for_and_differ():
    sizes = lengths()
    copies = np.linspace(0, 3.5, sizes.size)
    sampler = LengthBucketedBatchSampler(sizes, max_tokens=4096, seed=5, copies=copies)
    keys = [key for batch in sampler for key in batch]
    # A row has the whole number below or above.
    counts = np.bincount([row for _, row in keys], minlength=sizes.size)
    assert (np.abs(counts - copies) < 1).all()
    assert abs(counts.sum() - copies.sum()) < 3 * np.sqrt(sizes.size / 4)
    run = LengthBucketedBatchSampler(
        sizes, max_tokens=4096, seed=5, copies=copies, num_batches=3 * len(sampler)
    )
    batches = list(run)
    assert [key for batch in batches[: len(sampler)] for key in batch] == keys
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)
    assert all(sizes[[row for _, row in batch]].max() * len(batch) <= 4096 for batch in batches)


def test_accelerate_deals_the_batches_out_and_skips_them():
    sampler = LengthBucketedBatchSampler(lengths(), max_tokens=4096, num_batches=41)
    whole = list(sampler)
    shares = [list(BatchSamplerShard(sampler, num_processes=2, process_index=i)) for i in range(2)]
    assert [len(share) for share in shares] == [21, 21]
    assert shares[0] == whole[0::2]
    assert shares[1] == [*whole[1::2], whole[0]], "the last step is filled up"

    dataset = TokenDataset([np.full(size, 5) for size in lengths()])
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=list)
    seen = [[(e["epoch"], e["index"]) for e in batch] for batch in skip_first_batches(loader, 33)]
    assert seen == whole[33:]


def sampler(max_tokens):
    return LengthBucketedBatchSampler(np.array([5, 10, 3]), max_tokens=max_tokens)


EMPTY, ONE = np.array([], dtype=int), np.array([1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *[
            (
                lambda size=size, packed=packed: TokenDataset(
                    [ONE], max_length=size, packed=packed
                ),
                "max_length",
            )
            for size in (0, -1)
            for packed in (False, True)
        ],
        (lambda: TokenDataset([]), "at least one"),
        (lambda: TokenDataset([ONE, EMPTY]), "1 is empty"),
        (lambda: TokenDataset([[1, 5, 2], [1, 6, 2]], learnable=True), "no two residues"),
        *[(lambda key=key: TokenDataset([ONE])[key], "index") for key in (1, -1, (0, 1))],
        (lambda: sampler(9), "row 1 has 10 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises((ValueError, IndexError, UserError), match=message):
        call()
