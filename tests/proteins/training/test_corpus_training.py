"""Training from a corpus is training from the same sequences in memory, and resumes mid-epoch."""

from functools import partial

import pytest

from performers.app.errors import Interrupted
from performers.proteins.corpus import Corpus
from tests.cli.commands import refusal
from tests.proteins.corpus.test_shards import proteins, write_corpus
from tests.proteins.runs import same_weights, train
from tests.proteins.training.test_resume import stop_at


@pytest.fixture
def corpus(tmp_path):
    splits = {"train": proteins(60, 0), "validation": proteins(8, 1)}
    return write_corpus(tmp_path / "corpus", splits, shard_tokens=300)


@pytest.mark.parametrize("packed", [False, True])
def test_same_as_in_memory_and_resumed_in_the_middle_of_an_epoch(corpus, tmp_path, packed):
    shards = Corpus(corpus).split("train")
    validation = [sequence for _, sequence in proteins(8, 1)]
    in_memory = [shards.sequence(i) for i in range(len(shards))]
    run = partial(train, validation=validation, packed=packed, save_steps=2)
    run(tmp_path / "memory", in_memory)
    run(tmp_path / "disk", shards)
    assert same_weights(tmp_path / "disk", tmp_path / "memory", atol=0)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", shards, progress=stop_at(3))
    run(tmp_path / "parts", shards, resume=True)
    assert same_weights(tmp_path / "parts", tmp_path / "memory", atol=0)


def test_one_corpus_at_a_time(corpus, tmp_path):
    assert "by itself" in refusal("train", corpus, corpus, "--output", tmp_path / "model")
