"""The model that commands read with by default."""

import os
import threading

import numpy as np
import pytest

from performers.proteins.embedded import PRETRAINED
from tests.cli.commands import arrays, refusal, run


@pytest.fixture
def default(masked, monkeypatch):
    """A small model in the place of the one that ships."""
    monkeypatch.setattr("performers.proteins.embedded._DATA", masked.parent)
    monkeypatch.setattr("performers.proteins.embedded.PRETRAINED", masked.name)
    return masked


@pytest.mark.parametrize("named", [[], [PRETRAINED]], ids=["default", "named"])
def test_evaluate_without_a_model_reads_with_the_one_that_ships(default, fasta, named):
    assert run("evaluate", *named, fasta, "--json") == run("evaluate", default, fasta, "--json")


def test_embed_without_a_model_reads_with_the_one_that_ships(default, fasta, tmp_path):
    run("embed", fasta, "--output", tmp_path / "without.npz")
    run("embed", default, fasta, "--output", tmp_path / "with.npz")
    without, given = arrays(tmp_path / "without.npz"), arrays(tmp_path / "with.npz")
    assert np.array_equal(without["embeddings"], given["embeddings"])


def test_report_without_a_model_reads_with_the_one_that_ships(default, fasta, tmp_path):
    out, _ = run("report", fasta, "--output", tmp_path / "report", "--max-sequences", "5")
    assert (tmp_path / "report" / "report.html").is_file()
    assert "report.html" in out


@pytest.mark.parametrize("command", ["evaluate", "embed", "report"])
def test_a_first_argument_that_is_nothing_is_named(command, fasta, tmp_path):
    output = [] if command == "evaluate" else ["--output", tmp_path / "x.npz"]
    line = refusal(command, tmp_path / "modle", fasta, *output)
    assert line.startswith(f"{tmp_path / 'modle'}: no such file or folder")
    assert PRETRAINED in line


def test_a_model_alone_is_not_enough(masked):
    assert refusal("evaluate", masked) == "give at least one FASTA file after the model"
    assert refusal("evaluate", PRETRAINED) == "give at least one FASTA file after the model"


@pytest.mark.parametrize("command", ["evaluate", "embed", "report", "probe"])
def test_a_folder_of_fasta_files_is_not_a_model(command, fasta):
    output = [] if command == "evaluate" else ["--output", fasta.parent / "x.npz"]
    line = refusal(command, fasta.parent, *output)
    assert line.startswith(f"{fasta.parent} is a folder without a model: it has no config.json; ")
    assert line == refusal(command, fasta.parent, fasta, *output)


def test_a_training_that_has_not_ended_has_no_model(fasta, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert "finish it with performers train --resume" in refusal("evaluate", tmp_path, fasta)


@pytest.mark.parametrize("named", [True, False], ids=["by name", "by folder"])
def test_the_model_comes_first(default, fasta, named):
    model = PRETRAINED if named else default
    line = refusal("evaluate", fasta, model)
    assert line == f"{model} is a model, and comes before the FASTA files; give one model"


def test_the_model_that_ships_is_compared_with_by_its_name(default, causal, fasta, tmp_path):
    compared = ["report", causal, fasta, "--compare", PRETRAINED, "--output", tmp_path / "report"]
    # Refused after both models are loaded.
    assert refusal(*compared, "--protein", "nobody").startswith("--protein 'nobody' is not in")


def test_the_model_that_ships_does_not_generate(default):
    line = refusal("generate", PRETRAINED)
    assert line.startswith("the model predicts masked residues and cannot generate; give the")
    assert "--objective clm" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_read_like_a_file(masked, fasta, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(fasta.read_bytes(),))
    writer.start()
    try:
        out, _ = run("evaluate", masked, pipe, "--json")
    finally:
        writer.join()
    assert out == run("evaluate", masked, fasta, "--json")[0]
