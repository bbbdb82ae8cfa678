"""Training from a corpus is training from the same sequences in memory, and resumes mid-epoch."""

import pytest

from performers.proteins.corpus import Corpus
from performers.proteins.training.train import train_model
from performers.training.options import TrainingOptions
from tests.cli.commands import refusal, run
from tests.proteins.corpus.test_shards import proteins, write_corpus
from tests.proteins.runs import SMALL, same_weights


@pytest.fixture
def corpus(tmp_path):
    splits = {"train": proteins(60, 0), "validation": proteins(8, 1)}
    return write_corpus(tmp_path / "corpus", splits, shard_tokens=300)


@pytest.mark.parametrize("packed", [False, True])
def test_same_as_in_memory(corpus, tmp_path, packed):
    options = TrainingOptions(**SMALL, packed=packed)
    shards = Corpus(corpus).split("train")
    validation = [sequence for _, sequence in proteins(8, 1)]
    in_memory = [shards.sequence(i) for i in range(len(shards))]
    train_model(shards, tmp_path / "disk", options, validation=validation)
    train_model(in_memory, tmp_path / "memory", options, validation=validation)
    assert same_weights(tmp_path / "disk", tmp_path / "memory", atol=0)


def test_resumes_in_the_middle_of_an_epoch(corpus, tmp_path, monkeypatch):
    arguments = [
        *("train", str(corpus), "--hidden-size", "16", "--layers", "2", "--heads", "2"),
        *("--max-length", "40", "--batch-tokens", "200", "--steps", "6", "--save-steps", "2"),
    ]
    run(*arguments, "--output", tmp_path / "whole")
    from performers.proteins.training import train as training

    step = training._ProteinTrainer.training_step

    def stops(self, *given, **options):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training._ProteinTrainer, "training_step", stops)
        run(*arguments, "--output", tmp_path / "parts", code=130)
    run(*arguments, "--output", tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts", atol=0)


def test_one_corpus_at_a_time(corpus, tmp_path):
    assert "by itself" in refusal("train", corpus, corpus, "--output", tmp_path / "model")
