"""Every token but the first of a text is predicted once in an epoch; rows of streams go on."""

from collections import Counter

import pytest

from performers.streams.segments import IGNORED, Segment, Segments, StreamSegments
from performers.streams.text import read_bytes
from performers.training.trainer import ShuffledBatches
from tests.streams.texts import write_texts


@pytest.fixture
def texts(tmp_path):
    files = sorted(write_texts(tmp_path).iterdir())
    return read_bytes(files, print)


def predicted(texts, keys, length):
    """Count predictions of each place of each text; every target is the token at its place."""
    seen = Counter()
    dataset = Segments(texts, length)
    for key in keys:
        row = dataset[key]
        known = row["labels"] != IGNORED
        assert row["input_ids"].shape == row["labels"].shape == (length,)
        for offset in known.nonzero().flatten().tolist():
            place = key.start + offset + 1
            whole = texts.documents[key.document].path.read_bytes()
            assert row["labels"][offset] == whole[place]
            assert row["input_ids"][offset] == whole[place - 1]
            seen[key.document, place] += 1
    return seen


@pytest.mark.parametrize("length", [1, 7, 16, 200])
def test_an_epoch_predicts_everything_once(texts, length):
    every = {(text, place) for text, n in enumerate(texts.lengths) for place in range(1, n)}
    count = sum(-(-(n - 1) // length) for n in texts.lengths.tolist())
    dataset = Segments(texts, length)
    assert len(dataset) == count
    shuffled = ShuffledBatches(count, rows=1, seed=3, num_batches=2 * count)
    keys = [dataset.segment(index) for batch in shuffled for index in batch]
    for epoch in (keys[:count], keys[count:]):
        assert predicted(texts, epoch, length) == dict.fromkeys(every, 1)
    assert keys[:count] != keys[count:] or count < 7
    streams = StreamSegments(texts.lengths, length, rows=1, seed=3, num_batches=count)
    assert predicted(texts, [key for batch in streams for key in batch], length) == dict.fromkeys(
        every, 1
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_rows_are_streams_and_say_where_a_text_begins(texts, processes):
    """Those of each process, which takes every so-maniest batch."""
    batches = list(
        StreamSegments(texts.lengths, 8, rows=3, seed=0, num_batches=60, processes=processes)
    )
    for before, after in zip(batches, batches[processes:], strict=False):
        for old, new in zip(before, after, strict=True):
            ended = old.start + 8 >= texts.lengths[old.document] - 1
            assert new.begins == ended
            if not ended:
                assert new == Segment(old.document, old.start + 8, False)
            else:
                assert new.start == 0
    assert all(key.begins for batch in batches[:processes] for key in batch)


def test_batches_depend_on_the_seed_alone(texts):
    def batches(seed, count=20):
        return list(StreamSegments(texts.lengths, 8, rows=2, seed=seed, num_batches=count))

    assert batches(1) == batches(1) != batches(2)
    assert batches(1, 5) == batches(1)[:5]
