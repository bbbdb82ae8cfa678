"""Packing, windows, the data set and the batch sampler: nothing lost, all of it deterministic."""

import pickle

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from performers.proteins.inputs.packing import (
    LengthBucketedBatchSampler,
    PackedRow,
    TokenDataset,
    pack_sequences,
    split_windows,
)

token_sequences = st.lists(
    st.lists(st.integers(1, 30), min_size=1, max_size=25).map(lambda t: np.array(t, np.int16)),
    max_size=12,
)


def lengths(seed=0, count=3000):
    return np.random.default_rng(seed).gamma(2, 150, count).astype(int) + 1


@given(token_sequences, st.integers(1, 40))
def test_packed_rows_are_the_sequences_end_to_end(sequences, row_length):
    rows = pack_sequences(sequences, row_length)
    assert all(row.input_ids.size == row_length for row in rows[:-1])
    if not sequences:
        assert rows == []
        return
    assert 1 <= rows[-1].input_ids.size <= row_length
    joined = np.concatenate([row.input_ids for row in rows])
    assert joined.dtype == np.int16
    assert joined.tolist() == np.concatenate(sequences).tolist()
    owner = [i for i, sequence in enumerate(sequences) for _ in sequence]
    position = 0
    for row in rows:
        expected = owner[position : position + row.input_ids.size]
        assert row.sequence_ids.tolist() == [i - expected[0] for i in expected]
        position += row.input_ids.size


@given(st.integers(0, 200), st.integers(1, 60))
def test_windows_lose_nothing_and_are_even(length, max_length):
    sequence = np.arange(length, dtype=np.int16)
    windows = split_windows(sequence, max_length)
    assert np.concatenate(windows).tolist() == sequence.tolist()
    sizes = [window.size for window in windows]
    assert len(windows) == max(1, -(-length // max_length))
    assert max(sizes) <= max_length
    assert max(sizes) - min(sizes) <= 1


def test_the_data_set_of_plain_and_of_packed_rows():
    plain = TokenDataset([np.array([1, 5, 2]), [1, 2]])
    assert len(plain) == 2
    assert plain.lengths.tolist() == [3, 2]
    example = plain[1]
    assert (example["index"], example["epoch"], list(example["input_ids"])) == (1, 0, [1, 2])
    assert sorted(example) == ["epoch", "index", "input_ids"]
    assert (plain[7, 1]["epoch"], plain[7, 1]["index"]) == (7, 1)
    packed = TokenDataset(pack_sequences([np.array([1, 5, 2])] * 3, 4))
    assert packed[2]["sequence_ids"].tolist() == [0]
    assert packed[1]["sequence_ids"].tolist() == [0, 0, 1, 1]
    assert [example["index"] for example in packed] == [0, 1, 2], "iteration ends"


@pytest.mark.parametrize("limit", [{"batch_size": 16}, {"max_tokens": 4096}])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_row_once_within_the_limits(limit, shuffle):
    sizes = lengths()
    sampler = LengthBucketedBatchSampler(sizes, **limit, shuffle=shuffle, seed=3)
    sampler.set_epoch(4)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(key for batch in batches for key in batch) == [(4, i) for i in range(sizes.size)]
    if "batch_size" in limit:
        assert sorted(len(batch) for batch in batches)[1:] == [16] * (len(batches) - 1)
    else:
        padded = [len(batch) * max(sizes[i] for _, i in batch) for batch in batches]
        assert max(padded) <= 4096


@pytest.mark.parametrize("limit", [{"batch_size": 16}, {"max_tokens": 4096}])
def test_batches_hold_similar_lengths(limit):
    sizes = lengths()
    padded = sum(
        len(batch) * max(sizes[i] for _, i in batch)
        for batch in LengthBucketedBatchSampler(sizes, **limit)
    )
    order = np.random.default_rng(0).permutation(sizes)
    plain = sum(chunk.max() * chunk.size for chunk in np.split(order[:2992], 187))
    assert sizes.sum() / plain < 0.6, "a plain shuffle wastes much of what it computes"
    assert sizes.sum() / padded > 0.9


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthBucketedBatchSampler(lengths(), batch_size=8, seed=seed)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler), "iterating changes nothing"
        assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)
        return [[index for _, index in batch] for batch in sampler]

    assert order(1, 2) == order(1, 2)
    different = [order(0, 0), order(0, 1), order(1, 0)]
    for i, one in enumerate(different):
        assert all(one != other for other in different[i + 1 :])
        assert {tuple(b) for b in one}.isdisjoint(map(tuple, different[i - 1])), "batches regroup"


def test_rows_of_one_length_are_shuffled_all_over():
    batches = list(LengthBucketedBatchSampler(np.full(400, 64), batch_size=4, pool_batches=1000))
    indices = np.array([[index for _, index in batch] for batch in batches])
    assert np.ptp(indices, axis=1).mean() > 150
    assert abs(np.corrcoef(indices.ravel(), np.arange(400))[0, 1]) < 0.2
    sizes = lengths()
    batches = LengthBucketedBatchSampler(sizes, batch_size=8, pool_batches=1000)
    means = [np.mean([sizes[index] for _, index in batch]) for batch in batches]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2, "nor by length"


def test_an_evaluation_meets_its_longest_rows_first():
    sizes = lengths()
    batches = LengthBucketedBatchSampler(sizes, max_tokens=4096, shuffle=False)
    flat = [sizes[index] for batch in batches for _, index in batch]
    assert flat == sorted(sizes, reverse=True)


def test_a_run_of_many_batches_continues_through_the_epochs():
    sizes = lengths(count=100)
    epoch = LengthBucketedBatchSampler(sizes, batch_size=8, seed=5)
    run = LengthBucketedBatchSampler(sizes, batch_size=8, seed=5, num_batches=30)
    expected = []
    for number in range(3):
        epoch.set_epoch(number)
        expected += list(epoch)
    assert len(epoch) == 13
    assert len(run) == 30
    assert list(run) == expected[:30]
    assert {key[0] for batch in run for key in batch} == {0, 1, 2}
    run.set_epoch(1)
    assert list(run)[:26] == expected[13:]


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


def sampler(lengths=(5, 10, 3), **arguments):
    return LengthBucketedBatchSampler(lengths, **arguments)


EMPTY, ONE = np.array([], dtype=int), np.array([1])
ROW = PackedRow(ONE, np.array([0], np.int32))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_sequences([ONE], 0), "row_length"),
        (lambda: pack_sequences([ONE, EMPTY], 4), "token row 1 is empty"),
        (lambda: split_windows(ONE, 0), "max_length"),
        (lambda: TokenDataset([]), "rows"),
        (lambda: TokenDataset([ONE, EMPTY]), "is empty"),
        (lambda: TokenDataset([ONE, ROW]), "1 of 2 are packed"),
        *[(lambda key=key: TokenDataset([ONE])[key], "index") for key in (1, -1, (0, 1))],
        *[(lambda bad=bad: sampler(bad, batch_size=2), "lengths") for bad in ([], [3, 0], [[3]])],
        (lambda: sampler(), "exactly one"),
        (lambda: sampler(batch_size=2, max_tokens=99), "exactly one"),
        (lambda: sampler(batch_size=0), "batch_size"),
        (lambda: sampler(max_tokens=0), "max_tokens"),
        (lambda: sampler(max_tokens=9), "row 1 has 10 tokens"),
        (lambda: sampler(batch_size=2, num_batches=0), "num_batches"),
        (lambda: sampler(batch_size=2, pool_batches=0), "pool_batches"),
        (lambda: sampler(batch_size=2, seed=-1), "seed"),
        (lambda: sampler(batch_size=2).set_epoch(-1), "epoch"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises((ValueError, IndexError), match=message):
        call()
