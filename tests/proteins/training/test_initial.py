"""Runs that begin with the weights of a trained model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from performers.app.errors import UserError
from performers.app.files import sha256
from performers.models import PerformerForMaskedLM
from performers.proteins.embedded import PRETRAINED, pretrained_folder
from performers.proteins.training.initial import initial_options
from performers.proteins.training.train import train_model
from tests.cli.commands import refusal, run
from tests.proteins.runs import (
    flags,
    make_model_folder,
    proteins,
    same_weights,
    small_options,
    write_sequences,
)

# Of the run; all of the architecture is the model's.
RUN = ("--batch-tokens", 600, "--log-steps", 1, "--device", "cpu", "--redraw-steps", 0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    fasta = write_sequences(folder / "some.fasta", proteins())
    run("train", fasta, "--output", folder / "model", *flags(steps=2, dropout=0.0))
    return folder / "model"


@pytest.fixture
def fasta(tmp_path):
    return write_sequences(tmp_path / "proteins.fasta", proteins(seed=1))


def record(folder):
    return json.loads((folder / "training.json").read_text())


@pytest.mark.parametrize("window", [None, 3])
def test_weights_features_and_architecture_are_the_models(fasta, small, tmp_path, window):
    """A learning rate of zero keeps them; a window over positions has them in both halves."""
    output = tmp_path / "tuned"
    more = () if window is None else ("--position-window", window, "--max-length", 30)
    run(
        *("train", fasta, "--output", output, "--initial-model", small, *RUN, *more),
        *("--steps", 1, "--learning-rate", 0),
    )
    tuned, initial = (load_file(x / "model.safetensors") for x in (output, small))
    if window is None:
        assert same_weights(output, small)
    for name, tensor in tuned.items():
        original = name.replace("near.", "").replace("across.", "")
        torch.testing.assert_close(tensor, initial[original], rtol=0, atol=0)
    assert record(output)["initial_model"] == {
        "name": "model",
        "sha256": sha256(small / "model.safetensors"),
    }
    options, before = record(output)["options"], record(small)["options"]
    assert (options["hidden_size"], options["num_layers"]) == (16, 2)
    assert options["max_length"] == (before["max_length"] if window is None else 30)
    config = PerformerForMaskedLM.from_pretrained(output).config
    assert config.position_window == window
    assert config.hidden_dropout_prob == 0.0


def test_it_trains_on_and_resumes_without_the_initial_model(fasta, small, tmp_path):
    """And without the flag; its name and hash stay in the record."""
    initial = tmp_path / "initial"
    shutil.copytree(small, initial)
    arguments = ("train", fasta, *RUN, "--steps", 4, "--save-steps", 2, "--learning-rate", 0.01)
    begin = ("--initial-model", initial)
    run(*arguments, "--output", tmp_path / "whole", *begin)
    assert not same_weights(tmp_path / "whole", initial)

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole", stopped)
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    shutil.rmtree(initial)
    for repeated in ((), begin):
        (stopped / "model.safetensors").unlink()
        run(*arguments, "--output", stopped, "--resume", *repeated)
        assert same_weights(stopped, tmp_path / "whole")
        assert record(stopped)["initial_model"] == record(tmp_path / "whole")["initial_model"]

    line = refusal(*arguments, "--output", stopped, "--resume", "--initial-model", PRETRAINED)
    assert "--initial-model was initial" in line
    line = refusal(*arguments, "--output", stopped, "--resume", "--layers", 3)
    assert "--layers was 2, now 3" in line
    shutil.rmtree(stopped / "checkpoints")
    line = refusal(*arguments, "--output", stopped, "--resume")
    assert "give --initial-model once more" in line


def test_a_run_from_random_weights_is_not_resumed_from_a_model(fasta, small, tmp_path):
    output = tmp_path / "random"
    run("train", fasta, "--output", output, *flags(steps=1))
    arguments = ("train", fasta, "--output", output, *flags(steps=1), "--resume")
    assert "--initial-model was None" in refusal(*arguments, "--initial-model", small)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", 3), "--layers must be that of --initial-model, 2; got 3; leave out --layers"),
        (("--attention", "exact"), "--attention must be that of --initial-model, favor-softmax"),
        (("--positions", "learned"), "--positions must be that of --initial-model, rotary"),
        (("--objective", "clm"), "give --objective mlm"),
    ],
)
def test_options_that_contradict_the_model_are_refused(fasta, small, tmp_path, arguments, message):
    output = tmp_path / "output"
    line = refusal("train", fasta, "--output", output, "--initial-model", small, *arguments)
    assert message in line
    assert not output.exists()


def test_learned_positions_keep_their_length(fasta, tmp_path):
    model = make_model_folder(tmp_path / "model", position_embedding="learned")
    arguments = ("train", fasta, "--output", tmp_path / "output", "--initial-model", model)
    assert "--max-length must be that of" in refusal(*arguments, "--max-length", 30)


@pytest.mark.parametrize("changes", [{"features_per_head": True}, {"sinks": 1}])
def test_models_beyond_the_options_are_refused(fasta, tmp_path, changes):
    model = make_model_folder(tmp_path / "model", initializer_range=0.02, **changes)
    arguments = ("train", fasta, "--output", tmp_path / "output", "--initial-model", model)
    line = refusal(*arguments, *RUN, "--steps", 1)
    assert f"has {next(iter(changes))}={next(iter(changes.values()))}, for which there is" in line


def test_texts_and_folders_without_a_model_are_refused(fasta, tmp_path):
    text = tmp_path / "words.txt"
    text.write_text("some words " * 100)
    begin = ("--output", tmp_path / "output", "--initial-model")
    causal = make_model_folder(tmp_path / "causal", "clm")
    assert "is for proteins" in refusal("train", text, *begin, causal, "--objective", "clm")
    assert "--initial-model: " in refusal("train", fasta, *begin, tmp_path)


def test_the_included_model_is_one_to_begin_with():
    found = initial_options(PRETRAINED, {"num_layers": 5, "window": 8})
    before = json.loads((pretrained_folder() / "training.json").read_text())["options"]
    names = ("hidden_size", "num_heads", "num_features", "max_length", "attention")
    assert {x: found[x] for x in names} == {x: before[x] for x in names}
    assert not found.keys() & {"num_layers", "window"}
    with pytest.raises(UserError, match="--heads must be that of --initial-model, 12; got 8"):
        initial_options(PRETRAINED, {"num_heads": 8})


def test_options_of_python_must_be_those_of_the_model(small, tmp_path):
    with pytest.raises(UserError, match="--layers must be that of --initial-model, 2; got 3"):
        train_model(proteins(), tmp_path, small_options(num_layers=3), initial_model=small)
